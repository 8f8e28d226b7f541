import json
from dataclasses import replace
from pathlib import Path

import pytest

from agent import Response, run_episodes
from config import BadInput, Config
from policy import Sample
from sft import recorded_samples
from tasks.demonstrators import TownDemonstrator, read_file, recorded
from tasks.scoring import exact_match
from tasks.town import town_task
from tools import teach


def record(config, embed, last=None, teacher=None):
    """The scores of the file after a scripted teacher, which is stopped at the task `last`."""

    def stream(index):
        if index == last:
            raise KeyboardInterrupt
        return town_task(index, "train", config)

    return teach.record(teacher or TownDemonstrator("append", config, 0.0), stream, config, embed)


@pytest.fixture
def config(tmp_path):
    return Config(demonstrations=str(tmp_path / "taught.jsonl"), sft_tasks=30, sample_rows=8)


def test_a_teacher_may_be_stopped(config, embed):
    """Bug: episodes from before the stop are lost or played twice, or poor ones are learned."""
    with pytest.raises(KeyboardInterrupt):
        record(config, embed, last=20)
    path = Path(config.demonstrations)
    before = path.read_text()
    assert before.count("\n") == 17  # the settings, and two blocks of 8
    path.write_text(before + '{"task": "town-tr')
    scores = record(config, embed)
    assert path.read_text().startswith(before)
    _, lines = read_file(path)
    assert [line["task"] for line in lines] == [f"town-train-{n}" for n in range(30)]
    assert scores == [line["score"] for line in lines] and len(set(scores)) > 1
    assert all(bool(line["turns"]) == (line["score"] >= 0.5) for line in lines)
    assert len(recorded(config)) == sum(len(line["turns"]) for line in lines)


def test_a_short_file_is_played_once(config, embed):
    """Bug: a set with fewer tasks than --sft_tasks is played again within one block."""
    tasks = [town_task(index, "train", config) for index in range(5)]
    teacher = TownDemonstrator("append", config, 0.0)
    scores = teach.record(teacher, lambda index: tasks[index % 5], config, embed)
    assert len(scores) == len(read_file(config.demonstrations)[1]) == 5


def test_a_file_teaches_what_was_played(config, embed, tiny):
    """Bug: the prompts of a teacher's file differ from those that the trained policy is shown."""
    config = replace(config, sample_rows=30)  # one block, so the script guesses the same below
    record(config, embed)
    tasks = [town_task(index, "train", config) for index in range(30)]
    teacher = TownDemonstrator("append", config, 0.0)
    episodes = run_episodes(tasks, teacher, config, embed, exact_match)
    good = [episode for episode in episodes if episode.reward >= config.keep_score]
    turns = [turn for episode in good for turn in episode.turns]
    prompts = [ids for _, ids in tiny.encode([turn.observation for turn in turns])]
    responses = tiny.chat.encode_responses([turn.response.text for turn in turns])
    expected = [Sample(*pair) for pair in zip(prompts, responses)]
    assert recorded_samples(config, tiny) == expected != []


def test_a_cut_response_is_no_example(config, embed):
    """Bug: the pupil learns to stop in the middle of an operation."""

    class Cut(TownDemonstrator):
        def respond(self, observations):
            return [replace(one, truncated=True) for one in super().respond(observations)]

    config = replace(config, sft_tasks=8)
    scores = record(config, embed, teacher=Cut("append", config, 0.0))
    assert max(scores) >= 0.5 and recorded(config) == []


def test_a_shortened_prompt_is_recorded_as_shown(config, embed):
    """Bug: the file holds entries that the teacher was not shown."""

    class Short(TownDemonstrator):
        def respond(self, observations):
            shown = [replace(one, scratchpad="shortened") for one in observations]
            return [Response("", observation=one) for one in shown]

    config = replace(config, sft_tasks=2, keep_score=0.0)
    record(config, embed, teacher=Short("append", config))
    assert all("Scratchpad: shortened\n" in prompt for prompt, _ in recorded(config))


def test_a_file_has_one_set_of_settings(config, embed, tmp_path):
    """Bug: half of a file is made with other settings, or another kind of file is continued."""
    config = replace(config, sft_tasks=2)
    record(config, embed)
    before = Path(config.demonstrations).read_text()
    other = replace(config, questions=3, temperature=0.5, model="another")
    with pytest.raises(BadInput, match="made with another teacher, questions, temperature"):
        record(other, embed)
    assert Path(config.demonstrations).read_text() == before
    foreign = tmp_path / "data.jsonl"
    foreign.write_text('{"id": 1}\n{"id": 2}')
    with pytest.raises(BadInput, match="data.jsonl is another kind of file"):
        record(replace(config, demonstrations=str(foreign)), embed)
    assert foreign.read_text() == '{"id": 1}\n{"id": 2}'


def test_the_command(serve, tmp_path, monkeypatch, capsys):
    """Bug: the teacher is sampled greedily, loaded here although a server has it, or not named. Or
    the base model of a run plays in place of the run."""
    server = serve(lambda messages: "<answer>Rome</answer>")
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        command = ["teach", "--endpoint", server.url, "--cpu", "--max_prompt_tokens", "1000"]
        monkeypatch.setattr("sys.argv", command + [str(flag) for flag in flags])
        teach.main()

    with pytest.raises(BadInput, match="--model is missing"):
        call("--demonstrations", "taught.jsonl")
    Path("run").mkdir()
    Path("run/config.json").write_text('{"stage": "sft", "model": "big"}')
    with pytest.raises(BadInput, match="a run cannot be the teacher"):
        call("--from", "run", "--demonstrations", "taught.jsonl", "--sft_tasks", 1)
    with pytest.raises(BadInput, match="--demonstrations FILE is missing"):
        call("--model", "big")
    with pytest.raises(BadInput, match="longer than"):
        call("--model", "big", "--demonstrations", "taught.jsonl", "--max_prompt_tokens", 50)
    assert not Path("taught.jsonl").exists() and not server.seen
    flags = ("--model", "big", "--demonstrations", "taught.jsonl", "--keep_score", 0)
    call(*flags, "--sft_tasks", 2, "--temperature", 0.8)
    assert "taught.jsonl: 2 of 2 episodes are good enough" in capsys.readouterr().out
    settings, lines = read_file("taught.jsonl")
    assert settings["teacher"] == "big" and len(lines) == 2
    assert {request["temperature"] for request in server.seen} == {0.8}
    shown = {request["messages"][1]["content"] for request in server.seen}
    assert {prompt for line in lines for prompt, _ in line["turns"]} == shown
    assert json.loads(Path("taught.jsonl").read_text().splitlines()[0])["settings"] == settings
