import random
import string
import time

import pytest
from conftest import Scripted, make_task

from agent import TAGS, instruction, parse, render, run_episodes, unbox
from config import OPERATIONS, Config
from scoring import exact_match


def play(config, embed, chunks, script, questions=("Who?",), answers=("Ben",)):
    """The finished episode of one scripted policy, and what the policy was shown."""
    policy = Scripted({questions[0]: script})
    [episode] = run_episodes([make_task(chunks, questions, answers)], policy, config, embed, exact_match)
    return episode, policy.seen[questions[0]]


def kinds(text, config):
    return [(o.kind, o.text, o.number, bool(o.error)) for o in parse(text, config)]


# --- the grammar ---


def test_operations_in_order_with_text_around(config):
    """Bug: operations are grouped by kind, or text between them breaks the parse."""
    text = ("I think <delete_memory> 2 </delete_memory> then <create_memory>Ben: a baker</create_memory>\n"
            "<update_memory>1: Anna lives in Oslo</update_memory><scratchpad></scratchpad><read_memory>Anna</read_memory>")
    assert kinds(text, config) == [("delete", "", 2, False), ("create", "Ben: a baker", 0, False),
                                   ("update", "Anna lives in Oslo", 1, False), ("scratchpad", "", 0, False),
                                   ("read", "Anna", 0, False)]


def test_dialects_give_update_memory_its_own_meaning():
    """Bug: update_memory is Update in one dialect and the scratchpad in the other; one table must decide."""
    released = Config(dialect="released")
    assert kinds("<update_memory>note</update_memory>", released) == [("scratchpad", "note", 0, False)]
    assert kinds("<modify_memory>Memory 2: new</modify_memory>", released) == [("update", "new", 2, False)]
    assert kinds("<delete_memory>Memory 3</delete_memory>", released) == [("delete", "", 3, False)]
    assert kinds(r"<final_answer>so \boxed{Ben {x}}</final_answer>", released) == [("answer", "Ben {x}", 0, False)]
    assert kinds("<final_answer>Ben</final_answer>", released)[0][3]
    assert kinds("<update_memory>note</update_memory>", Config())[0][3]


@pytest.mark.parametrize("text, wrong", [
    ("<update_memory>no number</update_memory>", ["update"]),
    ("<update_memory>2:</update_memory>", ["update"]),
    ("<delete_memory>1 and 2</delete_memory>", ["delete"]),
    ("<create_memory>  </create_memory>", ["create"]),
    ("<make_coffee>now</make_coffee>", ["unknown", "unknown"]),
    ("<create_memory>one <create_memory>two</create_memory>", ["create"]),
    ("</create_memory>", ["create"]),
    ("<create_memory>cut off", ["create"]),
])
def test_malformed_operations_are_counted(config, text, wrong):
    """Bug: a malformed tag raises, or passes in silence."""
    assert [o.kind for o in parse(text, config) if o.error] == wrong


def test_unbox_balances_braces():
    """Bug: the first box, or a box cut at its first closing brace, is taken for the answer."""
    assert [unbox(t) for t in (r"\boxed{a}\boxed{b {c}}", r"\boxed{a", "a", r"\boxed{}")] == ["b {c}", "", "", ""]


def mutate(rng, text, pieces):
    """Grammar-aware noise: tags dropped, doubled, swapped, cut; characters changed."""
    for _ in range(rng.randint(0, 8)):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice([rng.choice(pieces), rng.choice(string.printable), ""]) + text[at + rng.randint(0, 3):]
    return text


@pytest.mark.parametrize("dialect", TAGS)
@pytest.mark.parametrize("responses", [10_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_any_response_is_survived(embed, dialect, responses):
    """Bug: some mixture of tags raises, or leaves the store at odds with an independent replay of the operations."""
    config, rng, written = Config(dialect=dialect), random.Random(responses), 0
    before, box = ("Memory ", "\\boxed{Ben}") if dialect == "released" else ("", "Ben")
    operations = {"create": "Anna lives in Rome", "read": "Anna", "update": f"{before}1: Anna lives in Oslo", "delete": f"{before}1",
                  "scratchpad": "2", "answer": box}
    good = [f"<{TAGS[dialect][kind]}>{text}</{TAGS[dialect][kind]}>" for kind, text in operations.items()] + [""]
    pieces = [f"<{slash}{tag}>" for tag in TAGS[dialect].values() for slash in ("", "/")] + [
        "1", "2:", "Anna", " ", "<", ">", "</", "\n", "<x>", "٣", "9" * 30, "Memory", "\\boxed", "{", "}"]
    while written < responses:
        script = [mutate(rng, "".join(rng.choices(good, k=3)), pieces) for _ in range(50)]
        episode, shown = play(config, embed, [str(n) for n in range(30)], script)
        written += len(shown)
        store, used = {}, set()
        for turn in episode.turns:
            shown = {entry.id for entry in turn.observation.entries}
            for operation in turn.operations:
                if operation.error or operation.id is None:
                    continue
                if operation.kind == "create":
                    assert operation.id not in used
                    used.add(operation.id)
                else:
                    assert operation.id in shown and operation.id in store
                store[operation.id] = operation.text
                if operation.kind == "delete":
                    del store[operation.id]
        memory = episode.memory
        assert store == memory.texts and len(memory) == len(store)
        for id, text in store.items():
            assert (memory._vectors[memory._row[id]] == embed([text])[0]).all()
        assert episode.done and len(episode.turns) <= 31 * (1 + config.max_reads)
        assert 0 <= episode.reward <= 1


def test_parsing_is_linear(config):
    """Bug: a regular expression that backtracks takes minutes for a long response of opening brackets."""
    for text in ("<" * 1_000_000, "<create_memory>" * 50_000, "<update_memory>" + " " * 1_000_000 + "</update_memory>"):
        started = time.perf_counter()
        parse(text, config)
        assert time.perf_counter() - started < 10  # linear: well under one second; quadratic: hours


# --- the turn rules ---


def test_read_alone_shows_the_chunk_again(config, embed):
    """Bug: a Read's result comes only with the next chunk, or a Read beside a Create shows the chunk twice."""
    script = ["<create_memory>Anna has a cat</create_memory><read_memory>Anna</read_memory>",
              "<read_memory>cat</read_memory><scratchpad>x</scratchpad>", "", "<answer>Ben</answer>"]
    episode, seen = play(config, embed, ["first", "second"], script)
    assert [o.chunk for o in seen] == ["first", "second", "second", None]
    assert [o.query for o in seen] == ["", "Anna", "cat", "cat"]
    assert [[entry.text for entry in o.entries] for o in seen] == [[], ["Anna has a cat"], ["Anna has a cat"], ["Anna has a cat"]]
    assert episode.reward == 1


def test_reads_in_a_row_are_limited(config, embed):
    """Bug: a policy that only Reads never ends."""
    episode, seen = play(config, embed, ["first", "second"], ["<read_memory>x</read_memory>"] * 100)
    assert [o.chunk for o in seen] == ["first"] * 4 + ["second"] * 4 + [None] * 4
    assert episode.answers == [None] and episode.reward == 0


def test_an_invalid_write_does_not_count_as_one(config, embed):
    """Bug: a Read is robbed of its second look by a Create that was never executed."""
    script = ["<read_memory>x</read_memory><create_memory></create_memory>", "", "<answer>Ben</answer>"]
    _, seen = play(config, embed, ["first"], script)
    assert [o.chunk for o in seen] == ["first", "first", None]


def test_answers_count_in_their_own_turn_alone(config, embed):
    """Bug: answers are accepted while reading, or one answer is scored for every question."""
    script = ["<answer>Ben</answer>", "<answer>Ben</answer>", "nothing", "<answer>Ben</answer>"]
    episode, seen = play(config, embed, ["first"], script, questions=("Q1?", "Q2?", "Q3?"), answers=("Ben", "Ben", "Leo"))
    assert episode.turns[0].operations[0].error
    assert [o.question for o in seen] == [None, "Q1?", "Q2?", "Q3?"]
    assert episode.scores == [1, 0, 0] and episode.answers == ["Ben", None, "Ben"] and episode.reward == 1 / 3


def test_operations_after_a_bad_one_still_happen(config, embed):
    """Bug: the first bad tag swallows the rest of the response."""
    script = ["<delete_memory>1</delete_memory><make_tea>x</make_tea><create_memory>Anna has a cat</create_memory>"]
    episode, _ = play(config, embed, ["first"], script)
    assert list(episode.memory.texts.values()) == ["Anna has a cat"]
    assert [bool(o.error) for o in episode.turns[0].operations] == [True, True, True, False]


def test_numbers_mean_the_list_shown(config, embed):
    """Bug: 0 is taken for the last entry, or a number shifts when an entry above it is deleted in the same response."""
    create = "".join(f"<create_memory>Anna {w}</create_memory>" for w in ("a1", "b2", "c3"))
    script = [create + "<read_memory>Anna</read_memory>", "<delete_memory>0</delete_memory><delete_memory>4</delete_memory>",
              "<delete_memory>1</delete_memory><update_memory>2: Anna new</update_memory><update_memory>1: x</update_memory>"]
    episode, _ = play(config, embed, ["1", "2", "3"], script)
    assert [bool(o.error) for o in episode.turns[1].operations] == [True, True]
    assert [bool(o.error) for o in episode.turns[2].operations] == [False, False, True]
    assert episode.memory.texts == {1: "Anna new", 2: "Anna c3"}


def test_stores_are_not_shared(config, embed):
    """Bug: entries found by their text in a shared store: one rollout deletes its sibling's entry."""
    tasks = [make_task(["a", "b"], questions=(name,)) for name in ("Q1?", "Q2?")]
    create = "<create_memory>Anna has a cat</create_memory><read_memory>Anna</read_memory>"
    policy = Scripted({"Q1?": [create, "<delete_memory>1</delete_memory>"], "Q2?": [create, ""]})
    first, second = run_episodes(tasks, policy, config, embed, exact_match)
    assert first.memory.texts == {} and second.memory.texts == {0: "Anna has a cat"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_switched_off_is_a_counted_no_op(operation, embed):
    """Bug: an ablated operation still acts, or is still described to the model."""
    config = Config(disable=[operation])
    content = {"update": "1: y", "delete": "1"}.get(operation, "x")
    tag = TAGS["paper"][operation]
    script = ["<create_memory>x</create_memory><read_memory>x</read_memory>", f"<{tag}>{content}</{tag}>"]
    episode, _ = play(config, embed, ["1", "2"], script)
    assert episode.turns[1].operations[0].error == "switched off"
    assert f"<{tag}>" not in instruction(config) and f"<{tag}>" in instruction(Config())


def test_random_retrieval_draws_from_the_store(embed):
    """Bug: the Table 4 ablation still shows what is most similar."""
    config = Config(retrieval="random", top_k=1)
    create = "".join(f"<create_memory>{w}</create_memory>" for w in "abcdefgh") + "<read_memory>a</read_memory>"
    _, seen = play(config, embed, list("123456789"), [create])
    assert len({o.entries[0].text for o in seen[1:]}) > 1


def test_observation_block(config, embed):
    """Bug: the numbers shown are not the ones that Update and Delete go by, or the text shown is not the chunk's."""
    script = ["<create_memory>Anna has a cat</create_memory><scratchpad>2</scratchpad><read_memory>Anna</read_memory>"]
    _, seen = play(config, embed, ["one", "two"], script)
    block = render(seen[1])
    for line in ("Questions: Who?", "Scratchpad: 2", "Query: Anna", "#1 Anna has a cat", "Text: two"):
        assert line in block.split("\n")
    assert "Question: Who?" in render(seen[2]) and "Text:" not in render(seen[2])
