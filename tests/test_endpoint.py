"""A server of the test's own in the place of an OpenAI-compatible one."""

import threading
from collections import deque

import pytest
from conftest import Scripted, make_task

from agent import instruction, render, run_episodes
from config import BadInput, Config
from endpoint import Endpoint, EndpointPolicy
from scoring import Judge, exact_match


def ask(text):
    return [{"role": "user", "content": text}]


def test_a_server_plays_episodes(serve, tmp_path, embed):
    """Bug: prompts are not those that a local model gets, or one question is asked after the other."""
    def reply(messages):
        text = messages[1]["content"]
        name = text.split("Text: ")[1].split()[0] if "Text: " in text else text.split("#1 ")[1].split()[0] if "#1 " in text else ""
        if "Question: " in text:
            return f"<think>Is it <answer>Eva</answer>?</think><answer>{name}</answer>" if name else "<read_memory>bakes</read_memory>"
        return f"<create_memory>{name} bakes</create_memory>"

    server, config = serve(reply), Config(max_prompt_tokens=1000)
    policy = EndpointPolicy(Endpoint(server.url, "big", tmp_path / "responses.jsonl", in_flight=4), config)
    tasks = [make_task([f"{name} bakes."], (f"Who bakes {name}?",), (name,)) for name in ("Ben", "Eva", "Leo", "Mia", "Tom", "Uwe")]
    episodes = run_episodes(tasks, policy, config, embed, exact_match)
    assert all(episode.reward == 1 and len(episode.turns) == 3 and episode.turns[0].response.tokens == 7 for episode in episodes)
    assert 1 < server.most <= 4
    assert all(one["path"] == "/v1/chat/completions" and one["model"] == "big" and one["max_tokens"] == config.max_response_tokens
               and one["chat_template_kwargs"] == {"enable_thinking": False} for one in server.seen)
    shown = {render(turn.observation) for episode in episodes for turn in episode.turns}
    assert {(m["role"], m["content"]) for one in server.seen for m in one["messages"]} == {
        ("system", instruction(config)), *(("user", text) for text in shown)}


def test_no_episode_waits_for_another(serve, tmp_path, embed):
    """Bug: all episodes wait for the slowest answer of each turn."""
    ended = threading.Event()

    def reply(messages):
        text = messages[1]["content"]
        if "Ben" in text and "Text: " in text:
            return "" if ended.wait(10) else 503
        if "Question: " in text:
            ended.set()
        return "<answer>Eva</answer>"

    server, config = serve(reply), Config(max_prompt_tokens=1000)
    policy = EndpointPolicy(Endpoint(server.url, "m", tmp_path / "f.jsonl", in_flight=2), config)
    tasks = [make_task(["It rains."] * 2, (f"Who is {name}?",), ("Eva",)) for name in ("Ben", "Eva")]
    done = []
    episodes = run_episodes(tasks, policy, config, embed, exact_match, lambda turns, number: done.append((turns, number)))
    assert [episode.reward for episode in episodes] == [1, 1]
    assert done[:2] == [(1, 0), (1, 0)] and done[-1][1] == 2  # one reads on, while the other's first turn is under way
    many = Endpoint(server.url, "m", tmp_path / "g.jsonl", 2).complete([[*ask("x"), *ask("y")]] * 2, 5, 0.0)
    assert many[0] == many[1] and sum(len(one["messages"]) == 2 and one["messages"][1]["content"] == "y" for one in server.seen) == 1  # once for both


def test_what_was_answered_is_not_asked_again(serve, tmp_path, capsys):
    """Bug: a job that lost its server pays for everything twice, or chokes on the half line that it left."""
    server, down = serve(lambda messages: 503 if down and messages[0]["content"] in "fg" else messages[0]["content"] * 2), []
    down.append(True)
    file = tmp_path / "a" / "responses.jsonl"
    with pytest.raises(BadInput, match="answers so far are in"):
        Endpoint(server.url, "m", file, in_flight=2).complete([ask(c) for c in "abcdefg"], 5, 0.0)
    assert sum(m["messages"][0]["content"] in "fg" for m in server.seen) >= 4  # it was tried again
    with open(file, "a") as text:
        text.write('{"key": "half')
    down.clear()
    before = len(server.seen)
    got = Endpoint(server.url, "m", file, in_flight=2).complete([ask(c) for c in "abcdefg"], 5, 0.0)
    assert [c.text for c in got] == ["aa", "bb", "cc", "dd", "ee", "ff", "gg"] and len(server.seen) - before == 2
    assert len(Endpoint(server.url, "m", file, 1).known) == 7 and "holds 7 answers" in capsys.readouterr().out
    for url, model, fresh in ((server.url, "another", False), (server.url + "/", "m", False), (server.url, "m", True)):
        before = len(server.seen)
        Endpoint(url, model, file, 2, fresh=fresh).complete([ask("a")], 5, 0.0)
        assert len(server.seen) == before + 1  # another model's or server's answer is another
    assert file.read_text().count("\n") == 1


def test_a_known_answer_waits_for_none(serve, tmp_path):
    """Bug: what stands in the file is given only when a question that the server is slow with has its answer."""
    server, slow = serve(lambda messages: "late" if slow.wait(10) else 503), threading.Event()
    file = tmp_path / "f.jsonl"
    slow.set()
    Endpoint(server.url, "m", file, 1).complete([ask("a")], 5, 0.0)
    slow.clear()
    served = Endpoint(server.url, "m", file, 1).serve(deque(["b", "c", "a"]), ask, 5, 0.0)
    assert [item for item, _ in next(served)] == ["a"]
    slow.set()
    assert sorted(item for some in served for item, _ in some) == ["b", "c"]


def test_a_fault_loses_no_other_answer(serve, tmp_path):
    """Bug: one refused question throws away the answers of all that were in flight with it, which were paid for."""
    slow = threading.Event()

    def reply(messages):
        if messages[0]["content"] == "bad":
            return 413
        slow.wait(5)
        return "late"

    server, file = serve(reply), tmp_path / "f.jsonl"
    threading.Timer(0.3, slow.set).start()
    with pytest.raises(BadInput, match="413"):
        Endpoint(server.url, "m", file, in_flight=4).complete([ask("a"), ask("b"), ask("c"), ask("bad")], 5, 0.0)
    assert len(Endpoint(server.url, "m", file, 1).known) == 3


def test_a_server_that_knows_no_thinking(serve, tmp_path):
    """Bug: servers that refuse unknown fields cannot be used at all."""
    server = serve(lambda messages: "fine")
    server.strict = True
    assert Endpoint(server.url, "m", tmp_path / "f", 1).complete([ask("a"), ask("b")], 5, 0.0)[1].text == "fine"
    assert ["chat_template_kwargs" in one for one in server.seen] == [True, False, False]


def test_a_foreign_file_is_not_touched(serve, tmp_path):
    """Bug: a data file named by mistake is cut at its last line's end, which is its beginning."""
    for content in ('[{"question": "no line end"}]', "no json\n", '{"id": 1}\n{"id": 2}'):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(BadInput, match="data.json"):
            Endpoint("http://127.0.0.1:1", "m", tmp_path / "data.json", 1)
        assert (tmp_path / "data.json").read_text() == content


def test_samples_differ_and_come_again(serve, tmp_path):
    """Bug: all episodes of a group get one and the same sample out of the file, or a job that goes on draws new ones."""
    numbers = iter(range(100))
    server = serve(lambda messages: str(next(numbers)))
    draw = lambda: [c.text for c in Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")] * 4, 5, 0.7)]
    first = draw()
    assert len(set(first)) == 4 and draw() == first
    greedy = Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")] * 4, 5, 0.0)
    assert len({c.text for c in greedy}) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_is_one_sentence_at_once(serve, tmp_path, status):
    """Bug: a wrong key or model name is tried again for minutes, and then shown as a traceback."""
    server = serve(lambda messages: status)
    with pytest.raises(BadInput, match=f"model m: .*{status}"):
        Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")], 5, 0.0)
    assert len(server.seen) == 1


def test_no_server_is_one_sentence(serve, tmp_path):
    """Bug: a server that is not there ends in a page of traceback."""
    server = serve(lambda messages: "")
    server.shutdown(), server.server_close()
    with pytest.raises(BadInput, match="--endpoint http://127.0.0.1"):
        Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")], 5, 0.0)


def test_the_judge(serve, tmp_path, config, embed):
    """Bug: a verdict is given to another answer, unanswered questions are judged, or what is no verdict counts as one."""
    def reply(messages):
        asked = messages[0]["content"]
        return {"Ben": "Yes.", "Benjamin": "**yes**, it does", "Eva": "No", "?": "I cannot tell"}[
            asked.split("judged: ")[1].split("\n")[0]] if "judged: " in asked else "Yes"

    tasks = [make_task([], ("Q1?", "Q2?", "Q3?"), ("Ben",) * 3), make_task([], ("R1?", "R2?"), ("Ben",) * 2)]
    script = Scripted({"Q1?": ["<answer>Eva</answer>", "", "<answer>Benjamin</answer>"], "R1?": ["<answer>Ben</answer>", "<answer>?</answer>"]})
    episodes = run_episodes(tasks, script, config, embed, exact_match)
    judge = Judge(Endpoint(serve(reply).url, "judge", tmp_path / "verdicts.jsonl", 2))
    assert judge(episodes) == [[0, 0, 1], [1, 0]] and judge.unclear == 1
