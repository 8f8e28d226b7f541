import copy
import random

import pytest
import torch
from accelerate import Accelerator
from conftest import gradients, make_task

import grpo
from agent import Episode, Response, Turn, run_episodes
from config import Config
from memory import HashedEmbedder, Memory
from optim import clip_and_step, count_bad_steps, make_optimizers
from scoring import exact_match
from tasks import town_task


def rollout(policy, config, tasks=3, group=4):
    """Episodes of a random policy with made-up rewards, and their rows."""
    stories = [town_task(index, "train", config) for index in range(tasks) for _ in range(group)]
    episodes = run_episodes(stories, policy, config, HashedEmbedder(), exact_match)
    rewards = torch.tensor([random.Random(n).choice([0.0, 0.5, 1.0]) for n in range(tasks * group)]).view(tasks, group)
    advantages = grpo.group_advantages(rewards).flatten().tolist()
    return episodes, advantages, *grpo.training_rows(episodes, advantages)


CONFIG = dict(max_grad_norm=1e9, max_response_tokens=8)


# --- advantages (rules 2 and 6) ---


def test_advantages_are_per_group_and_not_scaled():
    """Bug: the mean is taken over all groups, or the advantage is divided by the standard deviation."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, 0.0]])
    assert grpo.group_advantages(rewards).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.5, -0.5]]


def test_a_group_without_spread_gives_exactly_zero():
    """Bug: the rounding of a mean of thirds leaves a tiny advantage, which an optimiser that normalises blows up."""
    for reward in (1 / 3, 0.1, 2 / 3, 0.0, 1.0):
        for size in range(2, 20):
            assert (grpo.group_advantages(torch.full((1, size), reward)) == 0).all()


def test_one_advantage_per_episode_whatever_its_number_of_turns():
    """Bug: the advantage is taken over turns, so that long episodes weigh more in their group's mean."""
    def episode(turns):
        one = Turn(None, Response("", 2, [1], [2, 3], [0.0, 0.0]), [], 0)
        return Episode(make_task([]), Memory(), turns=[one] * turns)

    rows, tokens = grpo.training_rows([episode(1), episode(5)], [0.5, -0.5])
    assert [row[3] for row in rows] == [0.5] + [-0.5] * 5 and tokens == 12


# --- the loss (rules 3, 5, 7, 9) ---


def test_loss_and_kl_by_hand():
    """Bug: the clip works on the wrong side for negative advantages, or k3 has its sign turned round."""
    half, quarter = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    loss = lambda new, old, a: grpo.policy_loss(new, old, torch.tensor([a]), 0.2, 0.28).item()
    assert loss(half, quarter, 1.0) == pytest.approx(-1.28)  # ratio 2, clipped
    assert loss(half, quarter, -1.0) == pytest.approx(2.0)  # not clipped: the worse of the two
    assert loss(quarter, half, -1.0) == pytest.approx(0.8)  # ratio 1/2, clipped
    assert loss(quarter, half, 1.0) == pytest.approx(-0.5)
    assert grpo.kl_k3(half, quarter).item() == pytest.approx(0.5 + 0.693147 - 1)
    assert grpo.kl_k3(half, half).item() == 0
    assert torch.isfinite(grpo.kl_k3(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]))).all()


def test_one_update_per_rollout_has_ratio_one_and_a_gradient(tiny):
    """Bug: where the ratio is 1, an implementation that detaches too much learns nothing (rule 5)."""
    config = Config(**CONFIG)
    tiny.config = config
    _, _, rows, tokens = rollout(tiny, config)
    metrics, found = gradients(tiny, rows, tokens, config)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-3) and metrics["gap"] < 1e-3
    assert sum(gradient.norm() for gradient in found.values()) > 1e-4


@pytest.mark.parametrize("settings", [dict(), dict(kl=0.1), dict(updates_per_rollout=2)])
def test_micro_batches_and_order_do_not_matter(tiny, settings):
    """Bug: the loss is normalised per micro-batch, so that its size or the order of the rows changes the step (rule 3)."""
    config = Config(**CONFIG, **settings)
    tiny.config = config
    _, _, rows, tokens = rollout(tiny, config)
    reference = copy.deepcopy(tiny)
    with torch.no_grad():
        for p in tiny.parameters():
            p.add_(0.05 * torch.randn_like(p))  # away from old and reference policy
    if config.updates_per_rollout > 1:
        rows = grpo.with_old(reference, rows, Accelerator(cpu=True), config)
    metrics, whole = gradients(tiny, rows, tokens, config, reference)
    small = Config(**CONFIG, **settings, micro_batch_tokens=1)  # one row at a time
    other, single = gradients(tiny, list(reversed(rows)), tokens, small, reference)
    for name in whole:
        assert torch.allclose(whole[name], single[name], atol=1e-6 + 1e-4 * whole[name].abs().max().item())
    for name in ("loss", "entropy", "kl", "ratio", "clipped"):
        assert metrics[name] == pytest.approx(other[name], abs=1e-4)
    assert (metrics["kl"] > 0) == (config.kl > 0)
    assert (metrics["clipped"] > 0) == (config.updates_per_rollout > 1)


def test_the_kl_term_needs_every_row(tiny):
    """Bug: rows of dead groups are skipped although the KL penalty has a gradient there."""
    config = Config(**CONFIG)
    tiny.config = config
    episodes, advantages, rows, tokens = rollout(tiny, config)
    every, same = grpo.training_rows(episodes, [0.0] * len(episodes), all_rows=True)
    assert len(every) >= len(rows) and same == tokens == sum(len(row[1]) for row in every)
    assert grpo.training_rows(episodes, [0.0] * len(episodes)) == ([], tokens)


def test_truncated_turns_are_out_of_loss_and_denominator(tiny):
    """Bug: the cut-off tail of a response is reinforced as if the policy had meant to stop there (rule 7)."""
    config = Config(max_response_tokens=6)
    tiny.config = config
    episodes, advantages, rows, tokens = rollout(tiny, config)
    turns = [turn.response for episode in episodes for turn in episode.turns]
    assert any(r.truncated for r in turns) and any(not r.truncated for r in turns)
    assert tokens == sum(len(r.ids) for r in turns if not r.truncated)
    end = tiny.tokenizer.eos_token_id
    assert all(ids[-1] == end for _, ids, _, _ in rows)
    dead = sum(len(r.ids) for e, a in zip(episodes, advantages) if a == 0 for r in (t.response for t in e.turns) if not r.truncated)
    assert sum(len(ids) for _, ids, _, _ in rows) == tokens - dead  # rows without gradient are skipped, but stay in N


def test_the_rows_hold_the_very_ids_that_were_sampled(tiny):
    """Bug: responses are rebuilt from their text, which can come back as other tokens (rule 1)."""
    config = Config(max_response_tokens=6)
    tiny.config = config
    episodes, _, rows, _ = rollout(tiny, config)
    sampled = {(tuple(t.response.prompt_ids), tuple(t.response.ids)) for e in episodes for t in e.turns}
    assert rows and all((tuple(prompt), tuple(ids)) in sampled for prompt, ids, _, _ in rows)


# --- the step (rules 8, 9, 12) ---


def test_small_steps_move_the_weights(tiny):
    """Bug: weights kept in bf16 do not move at a learning rate of 1e-6 (rule 8)."""
    before = [p.clone() for p in tiny.parameters()]
    tiny.model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    clip_and_step(tiny, make_optimizers(tiny, 1e-6, "adamw"), 1.0)
    assert all(p.dtype == torch.float32 for p in tiny.parameters())
    assert all((p != b).any() for p, b in zip(tiny.parameters(), before))


def test_a_non_finite_step_is_left_out(tiny):
    """Bug: one inf in a gradient destroys the weights of a week (rule 12)."""
    before = [p.clone() for p in tiny.parameters()]
    tiny.model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    next(tiny.parameters()).grad[0, 0] = float("nan")
    norm = clip_and_step(tiny, make_optimizers(tiny, 1e-3, "muon"), 1.0)
    assert norm != norm and all(torch.equal(p, b) for p, b in zip(tiny.parameters(), before))
    assert all(p.grad is None for p in tiny.parameters())


def test_the_run_stops_after_several_bad_steps():
    """Bug: a run whose every step is left out goes on for days, or one bad step ends it (rule 12)."""
    nan = float("nan")
    assert count_bad_steps(0, [nan, 1.0]) == 1 and count_bad_steps(1, [nan]) == 2 and count_bad_steps(2, [1.0]) == 0
    assert count_bad_steps(2, []) == 0  # all groups dead: no update
    with pytest.raises(SystemExit, match="not finite"):
        count_bad_steps(2, [nan])
