import copy
import random
import string
import time
from dataclasses import replace

import pytest
from conftest import Scripted, make_task

from agent import TAGS, Observation, Response, instruction, parse, render, run_episodes, unbox
from chat import fit
from config import OPERATIONS, Config
from memory import Entry
from tasks.scoring import exact_match


def play(config, embed, chunks, script, questions=("Who?",), answers=("Ben",)):
    """The finished episode of one scripted policy, and what the policy was shown."""
    policy = Scripted({questions[0]: script})
    task = make_task(chunks, questions, answers)
    [episode] = run_episodes([task], policy, config, embed, exact_match)
    return episode, policy.seen[questions[0]]


def parsed(text, config):
    return [(one.kind, one.text, one.number, bool(one.error)) for one in parse(text, config)]


def errors(turn):
    return [bool(operation.error) for operation in turn.operations]


# --- the grammar ---


def test_operations_in_order_with_text_around(config):
    """Bug: operations are grouped by kind, or text between them breaks the parse."""
    text = (
        "I think <delete_memory> 2 </delete_memory> then "
        "<create_memory>Ben: a baker</create_memory>\n"
        "<update_memory>1: Anna lives in Oslo</update_memory><scratchpad></scratchpad>"
        "<read_memory>Anna</read_memory>"
    )
    assert parsed(text, config) == [
        ("delete", "", 2, False),
        ("create", "Ben: a baker", 0, False),
        ("update", "Anna lives in Oslo", 1, False),
        ("scratchpad", "", 0, False),
        ("read", "Anna", 0, False),
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<update_memory>note</update_memory>", ("scratchpad", "note", 0, False)),
        ("<modify_memory>Memory 2: new</modify_memory>", ("update", "new", 2, False)),
        ("<delete_memory>Memory 3</delete_memory>", ("delete", "", 3, False)),
        (r"<final_answer>so \boxed{Ben {x}}</final_answer>", ("answer", "Ben {x}", 0, False)),
        ("<final_answer>Ben</final_answer>", ("answer", "", 0, True)),
    ],
)
def test_dialects_give_update_memory_its_own_meaning(text, expected):
    """Bug: update_memory is read as Update in both dialects; in one it is the scratchpad."""
    assert parsed(text, Config(dialect="released")) == [expected]
    [(kind, *_, wrong)] = parsed("<update_memory>note</update_memory>", Config())
    assert kind == "update" and wrong


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("<update_memory>no number</update_memory>", ["update"]),
        ("<update_memory>2:</update_memory>", ["update"]),
        ("<delete_memory>1 and 2</delete_memory>", ["delete"]),
        ("<create_memory>  </create_memory>", ["create"]),
        ("<make_coffee>now</make_coffee>", ["unknown", "unknown"]),
        ("<create_memory>one <create_memory>two</create_memory>", ["create"]),
        ("</create_memory>", ["create"]),
        ("<create_memory>cut off", ["create"]),
        ("<create_memory", ["create"]),
        ("<create_memory>cut off</create_memory", ["create"]),
        ("<create_memory/>", ["unknown"]),
        ("<delete_memory>2, 3</delete_memory>", ["delete"]),
        ("<delete_memory>#</delete_memory>", ["delete"]),
        ("<update_memory>#2 no colon</update_memory>", ["update"]),
        ("<delete-memory>2</delete-memory>", ["unknown", "unknown"]),
        ("<answer1>Ben</answer1>", ["unknown", "unknown"]),
    ],
)
def test_malformed_operations_are_counted(config, text, wrong):
    """Bug: a malformed tag raises, or is not counted."""
    assert [one.kind for one in parse(text, config) if one.error] == wrong


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<CREATE_MEMORY>Ben</CREATE_MEMORY>", ("create", "Ben", 0, False)),
        ("<Create_Memory>Ben</create_memory>", ("create", "Ben", 0, False)),
        ('<create_memory id="1">Ben</create_memory>', ("create", "Ben", 0, False)),
        ("< create_memory >Ben</ create_memory >", ("create", "Ben", 0, False)),
        ("<delete_memory>#2</delete_memory>", ("delete", "", 2, False)),
        ("<delete_memory>[2]</delete_memory>", ("delete", "", 2, False)),
        ("<delete_memory>Memory 2</delete_memory>", ("delete", "", 2, False)),
        ("<delete_memory>memory #2</delete_memory>", ("delete", "", 2, False)),
        ("<update_memory>#2: new</update_memory>", ("update", "new", 2, False)),
        ("<update_memory>[2] : new\nline</update_memory>", ("update", "new\nline", 2, False)),
    ],
)
def test_what_is_clear_is_executed(config, text, expected):
    """Bug: a response that is nearly right does nothing, and nothing is counted."""
    assert parsed(text, config) == [expected]


@pytest.mark.parametrize("text", ["3 < 4", "a <b and c", "x < y > z", "<3", "a <- b"])
def test_a_less_than_sign_is_text(config, text):
    """Bug: an ordinary sentence is counted as an invalid operation."""
    assert parse(text, config) == []
    [operation] = parse(f"<create_memory>{text}</create_memory>", config)
    assert (operation.text, operation.error) == (text, "")


@pytest.mark.parametrize(
    "text, answers",
    [
        ("<think>Is it <answer>Eva</answer>?</think><answer>Ben</answer>", ["Ben"]),
        ("Is it <answer>Eva</answer>?</think>\n<answer>Ben</answer>", ["Ben"]),
        ("<think>a</think><answer>Eva</answer><think>b</think><answer>Ben</answer>", ["Ben"]),
        ("<think>Is it <answer>Eva</answer>", []),
    ],
)
def test_thoughts_are_no_operations(config, text, answers):
    """Bug: operations that a model only thinks about are executed."""
    assert [one.text for one in parse(text, config)] == answers


def test_unbox_balances_braces():
    """Bug: the first box, or a box cut at its first closing brace, is taken for the answer."""
    texts = (r"\boxed{a}\boxed{b {c}}", r"\boxed{a", "a", r"\boxed{}")
    assert [unbox(text) for text in texts] == ["b {c}", "", "", ""]


def mutate(rng, text, pieces):
    """Random damage to a response: tags are dropped, doubled or cut, characters change."""
    for _ in range(rng.randint(0, 8)):
        at = rng.randint(0, len(text))
        new = rng.choice([rng.choice(pieces), rng.choice(string.printable), ""])
        text = text[:at] + new + text[at + rng.randint(0, 3) :]
    return text


def replay(episode):
    """{id: text} of the store that the executed operations should leave behind."""
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
    return store


@pytest.mark.parametrize("dialect", TAGS)
@pytest.mark.parametrize("number", [10_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_any_response_is_survived(embed, dialect, number):
    """Bug: some mixture of tags raises, or the store differs from a replay of the operations."""
    config, rng, written = Config(dialect=dialect), random.Random(number), 0
    before, box = ("Memory ", "\\boxed{Ben}") if dialect == "released" else ("", "Ben")
    contents = {"create": "Anna lives in Rome", "read": "Anna", "scratchpad": "2", "answer": box}
    contents |= {"update": f"{before}1: Anna lives in Oslo", "delete": f"{before}1"}
    tags = TAGS[dialect]
    good = [f"<{tags[kind]}>{text}</{tags[kind]}>" for kind, text in contents.items()] + [""]
    pieces = [f"<{slash}{tag}>" for tag in tags.values() for slash in ("", "/")]
    pieces += ["1", "2:", "Anna", " ", "<", ">", "</", "\n", "<x>", "٣", "9" * 30]
    pieces += ["Memory", "\\boxed", "{", "}"]
    while written < number:
        script = [mutate(rng, "".join(rng.choices(good, k=3)), pieces) for _ in range(50)]
        episode, shown = play(config, embed, [str(n) for n in range(30)], script)
        written += len(shown)
        store, memory = replay(episode), episode.memory
        assert store == memory.texts and len(memory) == len(store)
        for id, text in store.items():
            assert (memory.vectors[id] == embed([text])[0]).all()
        assert episode.done and len(episode.turns) <= 31 * (1 + config.max_reads)
        assert 0 <= episode.reward <= 1


def test_parsing_is_linear(config):
    """Bug: a regular expression that backtracks takes minutes for a long response of brackets."""
    spaces = "<update_memory>" + " " * 1_000_000 + "</update_memory>"
    texts = ["<" * 1_000_000, "<create_memory>" * 50_000, "<answer " * 100_000, spaces]
    for text in texts + ["\\boxed{" * 200_000, "\\boxed{{}" * 200_000]:
        started = time.perf_counter()
        parse(text, config)
        unbox(text)
        assert time.perf_counter() - started < 10  # linear: well under a second; quadratic: hours


# --- the turn rules ---


def test_read_alone_shows_the_chunk_again(config, embed):
    """Bug: a Read's result comes only with the next chunk, or a Read beside a Create shows the
    chunk twice."""
    script = [
        "<create_memory>Anna has a cat</create_memory><read_memory>Anna</read_memory>",
        "<read_memory>cat</read_memory><scratchpad>x</scratchpad>",
        "",
        "<answer>Ben</answer>",
    ]
    episode, seen = play(config, embed, ["first", "second"], script)
    assert [one.chunk for one in seen] == ["first", "second", "second", None]
    assert [one.query for one in seen] == ["", "Anna", "cat", "cat"]
    texts = [[entry.text for entry in one.entries] for one in seen]
    assert texts == [[], ["Anna has a cat"], ["Anna has a cat"], ["Anna has a cat"]]
    assert episode.reward == 1


def test_reads_in_a_row_are_limited(config, embed):
    """Bug: a policy that only Reads never ends."""
    script = ["<read_memory>x</read_memory>"] * 100
    episode, seen = play(config, embed, ["first", "second"], script)
    assert [one.chunk for one in seen] == ["first"] * 4 + ["second"] * 4 + [None] * 4
    assert episode.answers == [None] and episode.reward == 0


def test_an_invalid_write_does_not_count_as_one(config, embed):
    """Bug: because of a Create that was not executed, a Read does not show the chunk again."""
    read = "<read_memory>x</read_memory><create_memory></create_memory>"
    _, seen = play(config, embed, ["first"], [read, "", "<answer>Ben</answer>"])
    assert [one.chunk for one in seen] == ["first", "first", None]


def test_answers_count_in_their_own_turn_alone(config, embed):
    """Bug: answers are accepted while reading, or one answer is scored for every question."""
    script = ["<answer>Ben</answer>", "<answer>Ben</answer>", "nothing", "<answer>Ben</answer>"]
    questions, answers = ("Q1?", "Q2?", "Q3?"), ("Ben", "Ben", "Leo")
    episode, seen = play(config, embed, ["first"], script, questions, answers)
    assert errors(episode.turns[0]) == [True]
    assert [one.question for one in seen] == [None, "Q1?", "Q2?", "Q3?"]
    assert episode.scores == [1, 0, 0] and episode.answers == ["Ben", None, "Ben"]
    assert episode.reward == 1 / 3


def test_operations_after_a_bad_one_still_happen(config, embed):
    """Bug: the first bad tag swallows the rest of the response."""
    bad = "<delete_memory>1</delete_memory><make_tea>x</make_tea>"
    script = [bad + "<create_memory>Anna has a cat</create_memory>"]
    episode, _ = play(config, embed, ["first"], script)
    assert list(episode.memory.texts.values()) == ["Anna has a cat"]
    assert errors(episode.turns[0]) == [True, True, True, False]


def test_numbers_mean_the_list_shown(config, embed):
    """Bug: 0 is taken for the last entry, or a number shifts when an entry above it is deleted in
    the same response."""
    texts = ("Anna a1", "Anna b2", "Anna c3")
    create = "".join(f"<create_memory>{text}</create_memory>" for text in texts)
    script = [
        create + "<read_memory>Anna</read_memory>",
        "<delete_memory>0</delete_memory><delete_memory>4</delete_memory>",
        "<delete_memory>1</delete_memory><update_memory>2: Anna new</update_memory>"
        "<update_memory>1: x</update_memory>",
    ]
    episode, _ = play(config, embed, ["1", "2", "3"], script)
    assert errors(episode.turns[1]) == [True, True]
    assert errors(episode.turns[2]) == [False, False, True]
    assert episode.memory.texts == {1: "Anna new", 2: "Anna c3"}


def test_stores_are_not_shared(config, embed):
    """Bug: entries are found by their text in a shared store, so one rollout deletes its sibling's
    entry."""
    tasks = [make_task(["a", "b"], questions=(name,)) for name in ("Q1?", "Q2?")]
    create = "<create_memory>Anna has a cat</create_memory><read_memory>Anna</read_memory>"
    scripts = {"Q1?": [create, "<delete_memory>1</delete_memory>"], "Q2?": [create, ""]}
    first, second = run_episodes(tasks, Scripted(scripts), config, embed, exact_match)
    assert first.memory.texts == {} and second.memory.texts == {0: "Anna has a cat"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_switched_off_is_a_counted_no_op(operation, embed):
    """Bug: an ablated operation still acts, or is still described to the model."""
    config = Config(disable=[operation])
    content = {"update": "1: y", "delete": "1"}.get(operation, "x")
    tag = TAGS["paper"][operation]
    create = "<create_memory>x</create_memory><read_memory>x</read_memory>"
    episode, _ = play(config, embed, ["1", "2"], [create, f"<{tag}>{content}</{tag}>"])
    assert episode.turns[1].operations[0].error == "switched off"
    assert f"<{tag}>" not in instruction(config) and f"<{tag}>" in instruction(Config())


def test_random_retrieval_draws_from_the_store(embed):
    """Bug: the random retrieval of Table 4 still shows the most similar entries."""
    config = Config(retrieval="random", top_k=1)
    create = "".join(f"<create_memory>{word}</create_memory>" for word in "abcdefgh")
    script = [create + "<read_memory>a</read_memory>"]
    _, seen = play(config, embed, list("123456789"), script)
    assert len({one.entries[0].text for one in seen[1:]}) > 1


def test_observation_block(config, embed):
    """Bug: the numbers shown are not those that Update and Delete refer to, or the text shown is
    not the chunk's."""
    create = "<create_memory>Anna has a cat</create_memory><scratchpad>2</scratchpad>"
    script = [create + "<read_memory>Anna</read_memory>"]
    _, seen = play(config, embed, ["one", "two"], script)
    lines = render(seen[1]).split("\n")
    for line in ("Questions: Who?", "Scratchpad: 2", "Query: Anna", "#1 Anna has a cat"):
        assert line in lines
    assert "Text: two" in lines
    assert "Question: Who?" in render(seen[2]) and "Text:" not in render(seen[2])


def test_a_context_stands_beside_the_question_alone(config, embed):
    """Bug: the full-context baseline reads its text as one more chunk, or does not see it when it
    answers."""
    task = replace(make_task([]), context="Ben is a baker.")
    policy = Scripted({"Who?": ["<answer>Ben</answer>"]})
    [episode] = run_episodes([task], policy, config, embed, exact_match)
    [shown] = policy.seen["Who?"]
    assert (shown.chunk, shown.question, episode.reward) == ("Ben is a baker.", "Who?", 1)


# --- observations that were shortened ---


class ShowsOneEntry(Scripted):
    """A scripted policy whose prompt has room for one entry only."""

    def respond(self, observations):
        responses = super().respond(observations)
        shortened = [replace(one, entries=one.entries[:1]) for one in observations]
        return [Response(one.text, observation=o) for one, o in zip(responses, shortened)]


def test_an_entry_that_was_cut_off_cannot_be_changed(config, embed):
    """Bug: a turn records the observation from before it was shortened, so a model changes entries
    that it never saw, and training shows it another prompt."""
    create = "<create_memory>Anna a1</create_memory><create_memory>Anna b2</create_memory>"
    second = "<update_memory>2: x</update_memory><delete_memory>2</delete_memory>"
    script = [
        create + "<read_memory>Anna</read_memory>",
        second + "<update_memory>1: Anna new</update_memory>",
    ]
    policy = ShowsOneEntry({"Who?": script})
    [episode] = run_episodes([make_task(["1", "2"])], policy, config, embed, exact_match)
    assert len(policy.seen["Who?"][1].entries) == 2
    assert episode.turns[1].observation.entries == (Entry(0, "Anna a1"),)
    assert errors(episode.turns[1]) == [True, True, False]
    assert episode.memory.texts == {0: "Anna new", 1: "Anna b2"}


def words(observation):
    return len(render(observation).split())


def test_fit_changes_no_observation():
    """Bug: shortening for one model changes what another one, or the trace, is shown."""
    entries = tuple(Entry(number, "Anna has a cat") for number in range(9))
    observation = Observation(("Who?",), "note " * 99, "Anna", entries, chunk="Anna sleeps.")
    before = copy.deepcopy(observation)
    for limit in (130, 60, 20):
        shortened = fit(observation, words, limit)
        assert words(shortened) <= limit and shortened != observation
        assert shortened.chunk == observation.chunk
        assert observation == before


def test_the_text_beside_a_question_is_shortened_before_the_memory():
    """Bug: the full-context baseline's long text pushes out entries and notes, or is refused."""
    entries = (Entry(0, "Anna has a cat"),)
    shown = Observation(("Who?",), "a note", "Anna", entries, chunk="word " * 999, question="Who?")
    shortened = fit(shown, words, 100)
    assert 50 < words(shortened) <= 100 and shown.chunk.startswith(shortened.chunk)
    assert replace(shortened, chunk=shown.chunk) == shown


# --- what an episode draws ---


class Draws:
    """A policy that writes the numbers which its episode's generator draws."""

    def respond(self, observations):
        return [Response(f"<scratchpad>{one.rng.random()}</scratchpad>") for one in observations]


def test_each_episode_has_its_own_generator(config, embed):
    """Bug: what an episode draws depends on its neighbours, or the episodes of one group, or of two
    steps, draw the same."""
    first, second = (replace(make_task(["1", "2"]), id=name) for name in ("one", "two"))

    def drawn(tasks, seed=0):
        episodes = run_episodes(tasks, Draws(), config, embed, exact_match, seed)
        return [[turn.response.text for turn in episode.turns] for episode in episodes]

    together = drawn([first, first, second])
    assert len({text for texts in together for text in texts}) == 9
    assert drawn([second, first, first]) == [together[2], *together[:2]]
    assert drawn([first]) == together[:1]
    assert drawn([first], seed=1) != together[:1]
