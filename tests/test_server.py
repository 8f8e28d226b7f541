"""A local HTTP server stands in for an OpenAI-compatible one."""

import threading

import pytest
from conftest import make_task

from agent import Episode, Observation, instruction, render, run_episodes
from config import BadInput, Config
from memory import Entry, Memory
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
        return 503 if down and text in "fg" else text * 2

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
    assert "holds 5 answers" in capsys.readouterr().out
    for url, model in ((server.url, "another"), (server.url + "/", "m")):
        before = len(server.seen)
        Endpoint(url, model, file, 2).complete([ask("a")], 5, 0.0)
        assert len(server.seen) == before + 1  # another model's or server's answer is another
    assert file.read_text().count("\n") == 9


def test_known_answers_need_no_server(serve, tmp_path):
    """Bug: an evaluation whose answers are all in the file fails because the server is gone."""
    server, file = serve(lambda messages: "fine"), tmp_path / "f.jsonl"
    Endpoint(server.url, "m", file, 1).complete([ask("a")], 5, 0.7)
    server.shutdown()
    server.server_close()
    assert Endpoint(server.url, "m", file, 1).complete([ask("a")], 5, 0.7)[0].text == "fine"


def test_a_fault_loses_no_other_answer(serve, tmp_path):
    """Bug: one refused question throws away the paid answers of all that were in flight with it."""
    slow = threading.Event()

    def reply(messages):
        if messages[0]["content"] == "bad":
            return 413
        slow.wait(5)
        return "late"

    server, file = serve(reply), tmp_path / "f.jsonl"
    threading.Timer(0.3, slow.set).start()
    questions = [ask(text) for text in ("bad", "a", "b", "c", "d")]
    with pytest.raises(BadInput, match="413"):
        Endpoint(server.url, "m", file, in_flight=4).complete(questions, 5, 0.0)
    assert len(Endpoint(server.url, "m", file, 1).known) >= 3


def test_a_strict_server(serve, tmp_path):
    """Bug: a server that refuses unknown fields cannot be used."""
    server = serve(lambda messages: "fine")
    server.strict = True
    answers = Endpoint(server.url, "m", tmp_path / "f", 1).complete([ask("a"), ask("b")], 5, 0.0)
    assert answers[1].text == "fine"
    assert ["chat_template_kwargs" in request for request in server.seen] == [True, False, False]


@pytest.mark.parametrize(
    "reply, text",
    [
        ("<answer>Eva</answer>", "<answer>Eva</answer>"),
        ("Eva? <answer>Eva</answer></think><answer>Ben</answer>", "<answer>Ben</answer>"),
        ("<think>a</think> <think>b</think> c", " c"),
        ("<think>Is it <answer>Eva</answer>", ""),
    ],
)
def test_thoughts_are_no_operations(serve, tmp_path, reply, text):
    """Bug: operations in a model's thoughts are executed."""
    server = serve(lambda messages: reply)
    endpoint = Endpoint(server.url, "m", tmp_path / "f", 1)
    assert endpoint.complete([ask("a")], 5, 0.0)[0].text == text


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
    server = serve(lambda messages: status)
    with pytest.raises(BadInput, match=f"model m: .*{status}"):
        Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")], 5, 0.0)
    assert len(server.seen) == 1


def test_no_server_is_one_sentence(serve, tmp_path):
    """Bug: a server that is not there ends in a page of traceback."""
    server = serve(lambda messages: "")
    server.shutdown()
    server.server_close()
    with pytest.raises(BadInput, match="--endpoint http://127.0.0.1"):
        Endpoint(server.url, "m", tmp_path / "f.jsonl", 1).complete([ask("a")], 5, 0.0)


def test_the_judge(serve, config):
    """Bug: missing answers are judged, nonsense counts as yes, or an answer is judged twice."""
    verdicts = {"Ben": "Yes.", "Benjamin": "**yes**, it does", "Eva": "No", "?": "I cannot tell"}

    def reply(messages):
        _, _, judged = messages[0]["content"].partition("judged: ")
        return verdicts[judged.split("\n")[0]] if judged else "Yes"

    first = make_task([], ("Q1?", "Q2?", "Q3?"), ("Ben",) * 3)
    second = make_task([], ("R1?", "R2?"), ("Ben",) * 2)
    episodes = [
        Episode(first, Memory(), answers=["Eva", None, "Benjamin"]),
        Episode(second, Memory(), answers=["Ben", "?"]),
    ]
    server = serve(reply)
    judge = Judge(config, "judge", server.url)
    assert judge(episodes[:1]) == 1 and judge.unclear == 0
    assert judge(episodes) == 2 and judge.unclear == 1
    assert len(server.seen) == 5
    with pytest.raises(BadInput, match="--judge_endpoint"):
        Judge(config, "judge", "")
