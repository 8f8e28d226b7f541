"""What happens at the edges: the README's table of degenerate cases, row by row."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import Scripted, make_task

import grpo
from agent import mean_reward, run_episodes
from config import Config
from memory import Memory
from policy import make_optimizers
from tasks import Question, exact_match, f1, town_task


def play(config, embed, script, chunks=("one", "two"), answers=("Ben",)):
    [episode] = run_episodes([make_task(chunks, ("Who?",), answers)], Scripted({"Who?": script}), config, embed, exact_match)
    return episode


# --- numbers that are not finite ---


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_stop_the_rollouts(tiny, embed, bad, temperature):
    """Bug: greedy decoding goes on with NaN and scores 0, as if the policy had answered wrongly."""
    tiny.temperature = temperature
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight[7] = bad
    with pytest.raises(SystemExit, match="weights are broken"):
        run_episodes([town_task(0, "test", tiny.config)], tiny, tiny.config, embed, exact_match)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["reward", "old log-probability", "weight"])
def test_a_step_with_a_bad_number_is_left_out(tiny, bad, place):
    """Bug: one NaN in a reward or a log-probability turns all weights into NaN."""
    rows = [([5, 6, 7], [8, 1], [0.0, 0.0], 0.5), ([5, 6], [9, 1], [0.0, 0.0], -0.5)]
    if place == "reward":
        advantages = grpo.group_advantages(torch.tensor([[bad, 0.0]])).flatten().tolist()
        rows = [(*row[:3], advantage) for row, advantage in zip(rows, advantages)]
    if place == "old log-probability":
        rows = [(*row, torch.tensor([bad, bad])) for row in rows]
    if place == "weight":
        with torch.no_grad():
            tiny.model.get_output_embeddings().weight[7, 0] = bad
    before = [p.clone() for p in tiny.parameters()]
    metrics = grpo.update(tiny, None, rows, 4, make_optimizers(tiny, 1e-3, "muon"), Accelerator(cpu=True), Config())
    same = all(torch.equal(p.nan_to_num(), b.nan_to_num()) for p, b in zip(tiny.parameters(), before))
    # an old probability of 0 or infinity makes a ratio that is clipped: some gradient, and a finite one
    assert same if not math.isfinite(metrics["grad_norm"]) else all(p.isfinite().all() for p in tiny.parameters())
    assert place != "reward" or not math.isfinite(metrics["grad_norm"])


# --- groups and policies ---


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_all_wrong_or_all_right(tiny, embed, reward):
    """Bug: a step without any spread still moves the weights, or fails for want of rows."""
    tasks = [town_task(0, "train", tiny.config)] * 4
    episodes = run_episodes(tasks, tiny, tiny.config, embed, lambda answer, question: reward)
    advantages = grpo.group_advantages(torch.full((1, 4), reward))
    rows, tokens = grpo.training_rows(episodes, advantages.flatten().tolist())
    assert rows == [] and (advantages == 0).all()


@pytest.mark.parametrize("ends, length", [([], 5), (list(range(179)), 1)])
def test_a_policy_that_never_stops_or_always_does(tiny, embed, ends, length):
    """Bug: without an end token every row is cut, and the empty step fails; with it at once, empty responses do."""
    tiny.config.max_response_tokens, tiny.end_ids = 5, torch.tensor(ends, dtype=torch.long)
    episodes = run_episodes([town_task(0, "train", tiny.config)] * 2, tiny, tiny.config, embed, exact_match)
    turns = [turn for episode in episodes for turn in episode.turns]
    assert all(len(turn.response.ids) == length and turn.response.truncated == (not ends) for turn in turns)
    rows, tokens = grpo.training_rows(episodes, [0.5, -0.5])
    assert len(rows) == (len(turns) if ends else 0) and tokens == len(rows)


@pytest.mark.parametrize("response, entries", [
    ("<create_memory></create_memory><update_memory>" * 1000, 0),  # nothing but tags
    ("<create_memory>a<create_memory>b</create_memory></create_memory>", 1),  # nested: the inner one counts
    ("</create_memory>" * 1000, 0),  # closed, never opened
    ("<create_memory>a</create_memory>" * 100_000, 100_000),
    ("<delete_memory>1</delete_memory>" * 100_000, 0),
])
def test_responses_made_of_tags(config, embed, response, entries):
    """Bug: a response that is all tags takes hours, raises, or leaves half an operation behind."""
    episode = play(config, embed, [response], chunks=("one",))
    assert len(episode.memory) == entries and episode.done


# --- texts, answers, sizes ---


def test_an_empty_document(config, embed):
    """Bug: a chunk without text, or a task without chunks, has no turn, or one too many."""
    assert len(play(config, embed, ["", "", "<answer>Ben</answer>"], chunks=("", "")).turns) == 3
    assert play(config, embed, ["<answer>Ben</answer>"], chunks=()).reward == 1


def test_an_empty_gold_answer(config, embed):
    """Bug: not answering earns the point of a question whose gold answer is empty, or is nothing but an article."""
    for gold in ("", "the"):
        assert play(config, embed, ["", "", ""], answers=(gold,)).reward == 0
        assert play(config, embed, ["", "", "<answer></answer>"], answers=(gold,)).reward == 0
        assert play(config, embed, ["", "", "<answer>Ben</answer>"], answers=(gold,)).reward == 0
        assert f1("Ben", Question("Who?", (gold,))) == 0


@pytest.mark.parametrize("capacity, kept", [(0, 3), (1, 1)])
def test_capacity_none_and_one(embed, capacity, kept):
    """Bug: capacity 0 refuses everything, or a full store of one can never be rewritten."""
    config = Config(capacity=capacity)
    script = ["<create_memory>Anna</create_memory>" * 3 + "<read_memory>Anna</read_memory>",
              "<update_memory>1: Ben</update_memory>", "<answer>Ben</answer>"]
    episode = play(config, embed, script)
    assert len(episode.memory) == kept and "Ben" in episode.memory.texts.values()
    assert sum(operation.error == "the memory is full" for operation in episode.turns[0].operations) == 3 - kept


def test_more_entries_asked_for_than_there_are(embed):
    """Bug: a top-k above the number of entries raises, or repeats one."""
    memory = Memory()
    assert memory.search(embed(["Anna"])[0], 100) == []
    for text in ("Anna", "Anna Ben"):
        memory.create(text, embed([text])[0])
    assert [entry.id for entry in memory.search(embed(["Anna"])[0], 100)] == [0, 1]
    assert memory.search(np.zeros(1024, np.float32), 100) == []  # a query without a word


def test_mean_reward_of_many(config, embed):
    """Bug: an episode that answers nothing is left out of the mean."""
    assert mean_reward([play(config, embed, []), play(config, embed, ["", "", "<answer>Ben</answer>"])]) == 0.5
