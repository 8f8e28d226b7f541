"""A local HTTP server stands in for an OpenAI-compatible one."""

import threading
import time

import pytest
from conftest import make_task

from agent import Episode, Observation, instruction, render, run_episodes
from config import BadInput, Config
from memory import Entry
from tasks.scoring import exact_match
from tools.server import Endpoint, Judge, ServerPolicy


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where runs/ is made


def ask(text):
    return [{"role": "user", "content": text}]


def policy_of(server, **settings):
    config = Config(endpoint=server.url, model="big", max_prompt_tokens=1000, **settings)
    return ServerPolicy(config, config.temperature)


def test_a_server_plays_episodes(serve, embed):
    """Bug: prompts are not those a local model gets, or requests are sent one after the other."""

    def reply(messages):
        text = messages[1]["content"]
        if "Text: " in text:
            return f"<create_memory>{text.split('Text: ')[1].split()[0]} bakes</create_memory>"
        if "#1 " not in text:
            return "<think>Is it <answer>Eva</answer>?</think><read_memory>bakes</read_memory>"
        return f"<answer>{text.split('#1 ')[1].split()[0]}</answer>"

    server = serve(reply)
    policy = policy_of(server, in_flight=4)
    names = ("Ben", "Eva", "Leo", "Mia", "Tom", "Uwe")
    tasks = [make_task([f"{name} bakes."], (f"Who bakes {name}?",), (name,)) for name in names]
    episodes = run_episodes(tasks, policy, policy.config, embed, exact_match)
    assert all(episode.reward == 1 and len(episode.turns) == 3 for episode in episodes)
    assert episodes[0].turns[0].response.tokens == 7
    assert 1 < server.most <= 4
    for request in server.seen:
        assert request["path"] == "/v1/chat/completions" and request["model"] == "big"
        assert request["max_tokens"] == policy.config.max_response_tokens
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
    turns = [turn for episode in episodes for turn in episode.turns]
    expected = {("user", render(turn.observation)) for turn in turns}
    expected.add(("system", instruction(policy.config)))
    messages = [message for request in server.seen for message in request["messages"]]
    assert {(message["role"], message["content"]) for message in messages} == expected


def test_a_long_prompt_is_shortened(serve):
    """Bug: the server gets more than max_prompt_tokens, or the turn keeps entries it never saw."""
    server = serve(lambda messages: "")
    entries = tuple(Entry(id, f"fact {id} " * 20) for id in range(3))
    observation = Observation(("Who?",), "", "fact", entries, chunk="It rains.")
    policy = policy_of(server)
    limit = policy.prompt_length(observation) - 1
    shorter = policy.with_config(Config(max_prompt_tokens=limit), temperature=0.0)
    responses = policy.respond([observation]) + shorter.respond([observation])
    assert [len(response.observation.entries) for response in responses] == [3, 2]
    assert [request["temperature"] for request in server.seen] == [1, 0]
    for request, response in zip(server.seen, responses):
        assert request["messages"][1]["content"] == render(response.observation)
    with pytest.raises(BadInput, match="--endpoint needs --model"):
        ServerPolicy(Config(endpoint=server.url), 1.0)


def test_known_answers_are_not_asked_again(serve, tmp_path, capsys):
    """Bug: a job that lost its server pays twice, or cannot read the half line that it left."""
    down = True

    def reply(messages):
        text = messages[0]["content"]
        return (503, "busy") if down and text in "fg" else text * 2

    server, file = serve(reply), tmp_path / "a" / "responses.jsonl"
    questions = [ask(letter) for letter in "abcdefg"]
    with pytest.raises(BadInput, match="answers so far are in"):
        Endpoint(server.url, "m", file, in_flight=2).complete(questions, 5, 0.0)
    retried = [one for one in server.seen if one["messages"][0]["content"] in "fg"]
    assert len(retried) >= 4 and capsys.readouterr().out.count("trying again") == 1
    with open(file, "a") as text:
        text.write('{"key": "half')
    down, before = False, len(server.seen)
    answers = Endpoint(server.url, "m", file, in_flight=2).complete(questions, 5, 0.0)
    assert [answer.text for answer in answers] == ["aa", "bb", "cc", "dd", "ee", "ff", "gg"]
    assert len(server.seen) - before == 2
    for url, model in ((server.url, "another"), (server.url + "/", "m")):
        before = len(server.seen)
        Endpoint(url, model, file, 2).complete([ask("a")], 5, 0.0)
        assert len(server.seen) == before + 1  # another model's or server's answer is another
    assert file.read_text().count("\n") == 9 + 3  # a row for each server and model


def test_known_answers_need_no_server(serve, tmp_path):
    """Bug: an evaluation whose answers are all in the file fails because the server is gone."""
    server, file = serve(lambda messages: "fine"), tmp_path / "f.jsonl"
    Endpoint(server.url, "m", file, 1).complete([ask("a")], 5, 0.7)
    server.shutdown()
    server.server_close()
    assert Endpoint(server.url, "m", file, 1).complete([ask("a")], 5, 0.7)[0].text == "fine"


def test_a_fault_loses_no_other_answer(serve, tmp_path):
    """Bug: one refused question stops the questions after it, or loses answers in flight."""
    slow, bad = threading.Event(), True

    def reply(messages):
        if bad and messages[0]["content"] == "bad":
            return 422, "not this one"
        slow.wait(5)
        return "late"

    server, file = serve(reply), tmp_path / "f.jsonl"
    threading.Timer(0.3, slow.set).start()
    questions = [ask(text) for text in ("bad", *"abcdefgh")]
    with pytest.raises(BadInput, match="HTTP 422: not this one; answers so far are in .*f.jsonl"):
        Endpoint(server.url, "m", file, in_flight=4).complete(questions, 5, 0.0)
    assert len(server.seen) == 9 and server.most == 4
    bad = False
    answers = Endpoint(server.url, "m", file, in_flight=4).complete(questions, 5, 0.0)
    assert [answer.text for answer in answers] == ["late"] * 9 and len(server.seen) == 10


def test_a_request_that_hangs(serve, tmp_path, monkeypatch):
    """Bug: one hanging request takes five timeouts of ten minutes, or stops the others."""
    monkeypatch.setattr("tools.server.TIMEOUT", 0.3)
    done = threading.Event()
    server = serve(lambda messages: str(messages[0]["content"] == "slow" and done.wait(5)))
    endpoint = Endpoint(server.url, "m", tmp_path / "f.jsonl", in_flight=2)
    with pytest.raises(BadInput, match="timed out"):
        endpoint.complete([ask("slow"), *map(ask, "abcde")], 5, 0.0)
    done.set()
    asked = [one["messages"][0]["content"] for one in server.seen]
    assert sorted(asked) == [*"abcde", "slow", "slow"]
    assert sum("text" in row for row in endpoint.known.values()) == 5


FIELDS = {"max_tokens": 5, "temperature": 0, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("complaint", ["Unsupported parameter: '{}'", "Bad request."])
@pytest.mark.parametrize(
    "refuses",
    [(), *zip(FIELDS), ("system",), ("chat_template_kwargs", "temperature"), tuple(FIELDS)],
)
def test_refused_fields(serve, tmp_path, capsys, refuses, complaint):
    """Bug: a server that refuses a field cannot be used, or loses fields that it accepts. (If it
    does not name the field, those before it are left out, too.)"""
    server, file = serve(lambda messages: "fine"), tmp_path / "f"
    server.refuses, server.complaint = refuses, complaint
    questions = [ask("a"), ask("b")]
    answers = Endpoint(server.url, "m", file, 1).complete(questions, 5, 0.0)
    assert answers[1].text == "fine" and len(server.seen) == 2
    lost = set(refuses)
    if refuses and complaint == "Bad request.":
        order = ["chat_template_kwargs", "system", "max_tokens", "temperature"]
        lost = set(order[: 1 + max(map(order.index, refuses))])
    expected = {name: value for name, value in FIELDS.items() if name not in lost}
    if "max_tokens" in lost:
        expected["max_completion_tokens"] = 5
    for request in (*server.seen, server.probes[-1]):
        known = {*FIELDS, "max_completion_tokens"}
        assert {name: request[name] for name in known if name in request} == expected
    if complaint != "Bad request.":
        assert len(server.probes) <= 1 + len(refuses)
    assert ("answers without" in capsys.readouterr().out) == bool(refuses)
    before = len(server.probes)
    endpoint = Endpoint(server.url, "m", file, 1)
    endpoint.complete(questions, 5, 0.0)
    assert len(server.seen) == 2  # after a restart nothing is asked
    endpoint.complete([ask("c")], 5, 0.0)
    assert len(server.seen) == 3 and len(server.probes) == before
    Endpoint(server.url, "other", file, 1).complete([ask("c")], 5, 0.0)
    assert len(server.probes) == 2 * before


def test_an_error_after_the_probe_is_an_error(serve, tmp_path):
    """Bug: the first question that a server refuses turns thinking on for all others."""
    server = serve(lambda messages: (400, "temperature") if messages[0]["content"] == "b" else "a")
    endpoint = Endpoint(server.url, "m", tmp_path / "f", 1)
    with pytest.raises(BadInput, match="HTTP 400: temperature"):
        endpoint.complete([ask("b"), ask("a")], 5, 0.0)
    assert len(server.seen) == 2 and all(FIELDS.items() <= one.items() for one in server.seen)


def test_a_server_that_refuses_everything(serve, tmp_path):
    """Bug: the error shown is about a field that was changed on the way, not the server's own."""
    server, file = serve(lambda messages: "fine"), tmp_path / "f"

    def result(body):
        forbidden = [
            name for name in ("chat_template_kwargs", "max_completion_tokens") if name in body
        ]
        return 422, f"{forbidden[0]}: not permitted" if forbidden else "no model m"

    server.result = result
    with pytest.raises(BadInput, match="HTTP 422: no model m; "):
        Endpoint(server.url, "m", file, 1).complete([ask("a")], 5, 0.0)
    assert not server.seen and not file.exists()


def test_fields_are_part_of_the_question(serve, tmp_path):
    """Bug: answers of a model that thought, or had another temperature, are taken for others."""
    keys = set()
    for refuses in [(), *zip(FIELDS)]:
        server, file = serve(lambda messages: "fine"), tmp_path / "-".join(["f", *refuses])
        server.refuses = refuses
        endpoint = Endpoint(server.url, "m", file, 1)
        endpoint.url = "http://same"  # in the keys
        endpoint.complete([ask("a")], 5, 0.0)
        keys |= {key for key, row in endpoint.known.items() if "text" in row}
    assert len(keys) == 4


@pytest.mark.parametrize(
    "status, message",
    [
        (400, "This model's maximum context length is 8192 tokens. However, you requested 9000 "
         "tokens (8500 in the messages, 500 in the completion via max_tokens)"),
        (400, "request (9000 tokens) exceeds the available context size (4096 tokens)"),
        (400, "prompt is too long: 210000 tokens > 200000 maximum"),
        (400, "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000"),
        (400, "The decoder prompt (length 9000) is longer than the maximum model length of 8192"),
        (413, "Input length (9000 tokens) exceeds the maximum allowed length (8192 tokens)"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_too_long(serve, tmp_path, status, message):
    """Bug: the user is not told what to lower, or max_tokens in the text is taken as refused."""
    server, file = serve(lambda messages: (status, message)), tmp_path / "f.jsonl"
    with pytest.raises(
        BadInput, match="Lower --max_prompt_tokens.* answers so far are in .*f.json"
    ):
        Endpoint(server.url, "m", file, 1).complete([ask("a")], 5, 0.0)
    assert len(server.seen) == 1
    server.result = lambda body: (status, message)
    with pytest.raises(BadInput, match="Lower --max_prompt_tokens"):
        Endpoint(server.url, "other", file, 1).complete([ask("a")], 5, 0.0)
    assert len(server.probes) == 2


@pytest.mark.parametrize("body", ['[{"error": {"message": "no such model"}}]', '"no such model"'])
def test_an_error_of_another_shape(serve, tmp_path, body):
    """Bug: the client cannot read the body of an error, so it is tried again for minutes."""
    server = serve(lambda messages: (400, body))
    with pytest.raises(BadInput, match="HTTP 400: .*no such model"):
        Endpoint(server.url, "m", tmp_path / "f", 1).complete([ask("a")], 5, 0.0)
    assert len(server.seen) == 1


def test_no_content(serve, tmp_path):
    """Bug: an answer that is only a thought, its content null, ends in a traceback."""
    server = serve(lambda messages: None)
    [answer] = Endpoint(server.url, "m", tmp_path / "f", 1).complete([ask("a")], 5, 0.0)
    assert answer.text == ""


@pytest.mark.parametrize(
    "reply, word",
    [
        ("Yes.", "yes"),
        ("No? Rather no. </think>Yes", "yes"),
        ("<think>no</think> <think>no</think> yes", "yes"),
        ("<think>Perhaps no", ""),
    ],
)
def test_a_judge_thinks_first(serve, tmp_path, monkeypatch, reply, word):
    """Bug: a word of the judge's thoughts is its verdict."""
    monkeypatch.chdir(tmp_path)
    server = serve(lambda messages: reply)
    assert Judge(Config(), "judge", server.url).verdicts(["Right?"]) == [word]


def test_a_foreign_file_is_not_touched(tmp_path):
    """Bug: a data file named by mistake is cut at the end of its last full line."""
    path = tmp_path / "data.json"
    for content in ('[{"question": "no line end"}]', "no json\n", '{"id": 1}\n{"id": 2}'):
        path.write_text(content)
        with pytest.raises(BadInput, match="data.json"):
            Endpoint("http://127.0.0.1:1", "m", path, 1)
        assert path.read_text() == content


def test_samples_differ_and_repeat(serve, tmp_path):
    """Bug: a group's episodes all get one sample from the file, or a restart draws new ones."""
    numbers = iter(range(100))
    server = serve(lambda messages: str(next(numbers)))

    def draw(count, temperature=0.7, seed=0):
        endpoint = Endpoint(server.url, "m", tmp_path / "f.jsonl", in_flight=4, seed=seed)
        answers = endpoint.complete([ask("a")] * count, 5, temperature)
        answers += endpoint.complete([ask("a")], 5, temperature)
        return [answer.text for answer in answers]

    first = draw(3)
    assert len(set(first)) == 4 and draw(3) == first
    assert draw(5)[:4] == first
    assert not set(draw(3, seed=1)) & set(first)
    before = len(server.seen)
    assert len(set(draw(3, temperature=0.0))) == 1 and len(server.seen) == before + 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_is_one_sentence_at_once(serve, tmp_path, status):
    """Bug: a wrong key or model name is tried again for minutes, and then ends in a traceback."""
    server = serve(lambda messages: "")
    server.status = status
    with pytest.raises(BadInput, match=f"model m: HTTP {status}: no"):
        Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")], 5, 0.0)
    assert len(server.probes) == 1 and not server.seen


def test_no_server_is_one_sentence(serve, tmp_path):
    """Bug: a server that is not there ends in a page of traceback."""
    server = serve(lambda messages: "")
    server.shutdown()
    server.server_close()
    with pytest.raises(BadInput, match="--endpoint http://127.0.0.1"):
        Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")], 5, 0.0)


def test_a_server_that_goes_away(serve, tmp_path, monkeypatch):
    """Bug: each of the remaining questions is tried again for 80 seconds."""
    monkeypatch.setattr("tools.server.PAUSES", (0.1, 0.1))
    server, asked, down = serve(lambda messages: "fine"), [], []
    endpoint = Endpoint(server.url, "m", tmp_path / "f.jsonl", in_flight=2)
    client = endpoint.client.chat_completion

    def chat_completion(messages, **settings):
        asked.append(messages[0]["content"])
        if len(asked) == 4 and not down:
            down.append(True)
            server.shutdown()
            server.server_close()
        return client(messages, **settings)

    endpoint.client.chat_completion = chat_completion
    with pytest.raises(BadInput, match="refused"):
        endpoint.complete([ask(str(number)) for number in range(20)], 5, 0.0)
    assert len(set(asked)) <= 6


def test_a_key_that_expires(serve, tmp_path, monkeypatch):
    """Bug: the remaining questions are sent, too, or wait for their next try."""
    monkeypatch.setattr("tools.server.PAUSES", (30,))
    replies = {"a": "fine", "b": (503, "busy")}
    server = serve(lambda messages: replies.get(messages[0]["content"], (401, "expired")))
    start = time.monotonic()
    with pytest.raises(BadInput):
        endpoint = Endpoint(server.url, "m", tmp_path / "f.jsonl", in_flight=2)
        endpoint.complete([ask(letter) for letter in "abcdefghij"], 5, 0.0)
    assert time.monotonic() - start < 10 and len(server.seen) <= 5


def test_the_judge(serve, config):
    """Bug: missing answers are judged, nonsense counts as yes, or an answer is judged twice."""
    verdicts = {"Ben": "Yes.", "Benjamin": "**yes**, it does", "Eva": "No", "?": "I cannot tell"}

    def reply(messages):
        _, _, judged = messages[0]["content"].partition("judged: ")
        return verdicts[judged.split("\n")[0]]

    first = make_task([], ("Q1?", "Q2?", "Q3?"), ("Ben",) * 3)
    second = make_task([], ("R1?", "R2?"), ("Ben",) * 2)
    episodes = [
        Episode(first, answers=["Eva", None, "Benjamin"]),
        Episode(second, answers=["Ben", "?"]),
    ]
    server = serve(reply)
    judge = Judge(config, "judge", server.url)
    assert judge(episodes[:1]) == 1
    assert judge(episodes) == 2
    assert len(server.seen) == 4 and len(server.probes) == 1
    server.status = 404
    with pytest.raises(BadInput, match="HTTP 404"):
        Judge(config, "another", server.url)
    with pytest.raises(BadInput, match="--judge_endpoint"):
        Judge(config, "judge", "")
