"""What happens at the edges: broken numbers, empty texts, strange policies and odd sizes."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import Scripted, make_task

import grpo
from agent import Episode, run_episodes
from config import Config
from memory import Memory
from policy import LanguageModel, Sample, load_policy
from tasks import Question
from tasks.scoring import exact_match, f1, summarize, tally
from tasks.town import town_task
from training.checkpoint import latest_checkpoint
from training.optim import count_bad_steps, make_optimizers, set_lr


def play(config, embed, script, chunks=("one", "two"), answers=("Ben",)):
    """The episode of one task whose turns are scripted."""
    task, policy = make_task(chunks, ("Who?",), answers), Scripted({"Who?": script})
    [episode] = run_episodes([task], policy, config, embed, exact_match)
    return episode


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_stop_the_rollouts(tiny, embed, bad, temperature):
    """Bug: greedy decoding continues with NaN and scores 0, as if the policy had answered
    wrongly."""
    tiny.temperature = temperature
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight[7] = bad
    with pytest.raises(SystemExit, match="weights are broken"):
        run_episodes([town_task(0, "test", tiny.config)], tiny, tiny.config, embed, exact_match)


@pytest.mark.parametrize(
    "place, bad",
    [
        ("reward", math.nan),
        ("reward", math.inf),
        ("reward", -math.inf),
        ("weight", math.nan),
        ("weight", math.inf),
        ("weight", -math.inf),
        ("old log-prob", math.nan),
        ("old log-prob", -math.inf),
    ],
)
def test_a_step_with_a_bad_number_is_left_out(tiny, place, bad):
    """Bug: one NaN in a reward or a log-prob turns all weights into NaN."""
    samples = [Sample([5, 6, 7], [8, 1], [0.0, 0.0], 0.5), Sample([5, 6], [9, 1], [0.0, 0.0], -0.5)]
    if place == "reward":
        advantages = grpo.group_advantages(torch.tensor([[bad, 0.0]])).flatten().tolist()
        samples = [replace(one, advantage=value) for one, value in zip(samples, advantages)]
    elif place == "weight":
        with torch.no_grad():
            tiny.model.get_output_embeddings().weight[7, 0] = bad
    else:
        samples = [replace(one, old_logprobs=torch.tensor([bad, bad])) for one in samples]
    before = [p.clone() for p in tiny.parameters()]
    optimizers = make_optimizers(tiny, "muon")
    set_lr(optimizers, 1e-3)
    metrics = grpo.grpo_step(tiny, None, samples, 4, optimizers, Accelerator(cpu=True), Config())
    assert count_bad_steps({}, metrics) == 1
    for now, then in zip(tiny.parameters(), before):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())


# --- groups and policies --------------------------------------------------------------------------


def run_grpo(monkeypatch, policy, folder, steps=1):
    """Run grpo.py from `policy`. Returns the metrics of each step, and whether weights changed."""
    start = folder / "runs/town/sft"
    policy.save(start / "step-000001")
    progress = {"step": 1, "best": None}
    (start / "step-000001/progress.json").write_text(json.dumps(progress))
    settings = {"stage": "sft"} | replace(policy.config, sft_steps=1).saved()
    (start / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(folder)
    flags = f"--cpu --grpo_steps {steps} --tasks_per_step 1 --group_size 2 --eval_tasks 1"
    monkeypatch.setattr("sys.argv", ["grpo.py", *flags.split()])
    grpo.main()
    run = Path("runs/town/grpo")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after = load_policy(latest_checkpoint(run), policy.config)
    pairs = zip(policy.parameters(), after.parameters())
    return lines, any(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_all_wrong_or_all_right(tiny, tmp_path, monkeypatch, reward):
    """Bug: a step without any spread still moves the weights, or fails because it has no
    samples."""
    monkeypatch.setattr(Episode, "reward", reward)
    lines, moved = run_grpo(monkeypatch, tiny, tmp_path, steps=2)
    assert [line["dead_groups"] for line in lines] == [1, 1]
    assert "loss" not in lines[0] and not moved


@pytest.mark.parametrize("ends", [False, True])
def test_a_policy_that_never_stops_or_always_does(tiny, tmp_path, monkeypatch, ends):
    """Bug: if no response ends, all are cut and the empty step fails. If every response ends at
    once, the empty texts fail."""
    rewards = itertools.cycle([0.0, 1.0])
    monkeypatch.setattr(Episode, "reward", property(lambda self: next(rewards)))
    init = LanguageModel.__init__

    def with_ends(self, *arguments):
        init(self, *arguments)
        self.end_ids = set(
            range(self.known_ids if ends else 0)
        )  # any token ends a response, or none

    monkeypatch.setattr(LanguageModel, "__init__", with_ends)
    [line], moved = run_grpo(monkeypatch, tiny, tmp_path)
    assert line["truncated"] == (not ends) and line["dead_groups"] == 0 and moved == ends
    assert (line["tokens"] == line["turns"]) == ends and ("loss" in line) == ends


@pytest.mark.parametrize(
    "response, entries",
    [
        ("<create_memory></create_memory><update_memory>" * 1000, 0),  # nothing but tags
        # Nested: the inner one counts.
        ("<create_memory>a<create_memory>b</create_memory></create_memory>", 1),
        ("</create_memory>" * 1000, 0),  # closed, never opened
        ("<create_memory>a</create_memory>" * 20_000, 20_000),
        ("<delete_memory>1</delete_memory>" * 20_000, 0),
    ],
)
def test_responses_made_of_tags(config, embed, response, entries):
    """Bug: a response that is all tags takes hours, raises, or leaves half an operation behind."""
    episode = play(config, embed, [response], chunks=("one",))
    assert len(episode.memory) == entries and episode.done


# --- texts, answers, sizes ------------------------------------------------------------------------


def test_an_empty_document(config, embed):
    """Bug: a chunk without text, or a task without chunks, has no turn, or one too many."""
    answer = "<answer>Ben</answer>"
    assert len(play(config, embed, ["", "", answer], chunks=("", "")).turns) == 3
    assert play(config, embed, [answer], chunks=()).reward == 1


def test_an_empty_gold_answer(config, embed):
    """Bug: no answer at all scores on a question whose gold answer is empty, or is nothing
    but an article."""
    for gold in ("", "the"):
        for response in ("", "<answer></answer>", "<answer>Ben</answer>"):
            assert play(config, embed, ["", "", response], answers=(gold,)).reward == 0
        assert f1("Ben", Question("Who?", (gold,))) == 0


@pytest.mark.parametrize("capacity, kept", [(0, 3), (1, 1)])
def test_capacity_none_and_one(embed, capacity, kept):
    """Bug: capacity 0 refuses everything, or a full store of one can never be rewritten."""
    script = [
        "<create_memory>Anna</create_memory>" * 3 + "<read_memory>Anna</read_memory>",
        "<update_memory>1: Ben</update_memory>",
        "<answer>Ben</answer>",
    ]
    episode = play(Config(capacity=capacity), embed, script)
    assert len(episode.memory) == kept and "Ben" in episode.memory.texts.values()
    refused = [one for one in episode.turns[0].operations if one.error == "the memory is full"]
    assert len(refused) == 3 - kept


def test_more_entries_asked_for_than_there_are(embed):
    """Bug: a top-k above the number of entries raises, or repeats one."""
    memory = Memory()
    [query] = embed(["Anna"])
    assert memory.search(query, 100) == []
    for text in ("Anna", "Anna Ben"):
        memory.create(text, embed([text])[0])
    assert [entry.id for entry in memory.search(query, 100)] == [0, 1]
    assert memory.search(np.zeros(len(query), np.float32), 100) == []  # a query without a word


def test_mean_reward_of_many(config, embed):
    """Bug: an episode that answers nothing is left out of the mean."""
    episodes = [play(config, embed, []), play(config, embed, ["", "", "<answer>Ben</answer>"])]
    assert summarize(tally(episodes))["reward"] == 0.5
