import copy
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, gradients, make_task

import grpo
from agent import Episode, Response, Turn, run_episodes
from config import Config
from memory import HashedEmbedder
from policy import Sample, load_policy
from tasks.scoring import exact_match
from tasks.town import town_task
from training.checkpoint import checkpoints
from training.optim import clip_and_step, count_bad_steps, make_optimizers, set_lr

CONFIG = dict(max_grad_norm=1e9, max_response_tokens=8)


def rollout(policy, settings=CONFIG, tasks=3, group=4):
    """(episodes, advantages) of a random policy, with made-up rewards. The first group is dead."""
    policy.config = config = Config(**settings)
    policy.end_ids = set(range(0, policy.known_ids, 7))  # else nearly all responses are cut
    stories = [town_task(index, "train", config) for index in range(tasks) for _ in range(group)]
    episodes = run_episodes(stories, policy, config, HashedEmbedder(), exact_match)
    rewards = [random.Random(n).choice([0.0, 0.5, 1.0]) for n in range(tasks * group)]
    rewards = torch.tensor(rewards).view(tasks, group)
    rewards[0] = 0.5
    advantages = grpo.group_advantages(rewards)
    return episodes, advantages


def samples_of(episodes, advantages, keep_all=False):
    """(samples, N) of a rollout, as `train` makes them in one process."""
    samples = grpo.to_samples(episodes, advantages.flatten().tolist(), keep_all)
    return samples, grpo.rollout_sums(episodes, samples, advantages)["num_tokens"]


def moved(policy):
    """A copy with slightly other weights."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return other


# --- advantages (rules 2 and 6) -------------------------------------------------------------------


def test_advantages_are_per_group_and_not_scaled():
    """Bug: the mean is taken over all groups, or divided by the standard deviation."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, 0.0]])
    expected = [[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.5, -0.5]]
    assert grpo.group_advantages(rewards).tolist() == expected


def test_a_group_without_spread_gives_exactly_zero():
    """Bug: the rounded mean of thirds leaves a tiny advantage, which a normalising optimiser blows
    up."""
    for reward in (1 / 3, 0.1, 2 / 3, 0.0, 1.0):
        for size in range(2, 20):
            assert (grpo.group_advantages(torch.full((1, size), reward)) == 0).all()


def test_one_advantage_per_episode_whatever_its_number_of_turns():
    """Bug: the advantage is taken over turns, so long episodes weigh more in their group's mean."""

    def episode(turns):
        one = Turn(None, Response("", 2, [1], [2, 3], [0.0, 0.0]), [], 0)
        return Episode(make_task([]), turns=[one] * turns)

    samples, num_tokens = samples_of([episode(1), episode(5)], torch.tensor([[0.5, -0.5]]))
    assert [sample.advantage for sample in samples] == [0.5] + [-0.5] * 5 and num_tokens == 12


def test_dead_groups_are_counted_by_group():
    """Bug: an episode at the mean of its group counts as dead, or one live group hides the
    others."""
    advantages = torch.tensor([[0.0, 0.0, 0.0], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    sums = grpo.rollout_sums([], [], advantages)
    assert sums["dead_groups"] == 2 and sums["groups"] == 3


# --- the loss (rules 3, 5, 7, 9) ------------------------------------------------------------------


def test_loss_and_kl_by_hand():
    """Bug: the clip works on the wrong side for negative advantages, or k3 has the wrong sign."""

    def loss(new, old, advantage):
        return grpo.policy_loss(new, old, torch.tensor([advantage]), 0.2, 0.28).item()

    half, quarter = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert loss(half, quarter, 1.0) == pytest.approx(-1.28)  # ratio 2, clipped
    assert loss(half, quarter, -1.0) == pytest.approx(2.0)  # not clipped: the worse of the two
    assert loss(quarter, half, -1.0) == pytest.approx(0.8)  # ratio 1/2, clipped
    assert loss(quarter, half, 1.0) == pytest.approx(-0.5)
    assert grpo.kl_k3(half, quarter).item() == pytest.approx(0.5 + 0.693147 - 1)
    assert grpo.kl_k3(half, half).item() == 0
    far = torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4])
    assert torch.isfinite(grpo.kl_k3(*far)).all()


def test_one_update_per_rollout_has_ratio_one_and_a_gradient(tiny):
    """Bug: where the ratio is 1, code that detaches too much learns nothing (rule 5)."""
    samples, num_tokens = samples_of(*rollout(tiny))
    metrics, found = gradients(tiny, samples, num_tokens, tiny.config)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-3) and metrics["logprob_diff"] < 1e-3
    assert sum(gradient.norm() for gradient in found.values()) > 1e-4


@pytest.mark.parametrize("settings", [dict(), dict(kl=0.1), dict(updates_per_rollout=2)])
def test_micro_batches_and_order_do_not_matter(tiny, settings):
    """Bug: the loss is normalised per micro-batch, so its size or the order of the samples changes
    the step (rule 3)."""
    samples, num_tokens = samples_of(*rollout(tiny, CONFIG | settings))
    config, policy = tiny.config, moved(tiny)  # away from the old and the reference policy
    if config.updates_per_rollout > 1:
        samples = grpo.with_old_logprobs(tiny, samples, Accelerator(cpu=True), config)
    metrics, whole = gradients(policy, samples, num_tokens, config, tiny)
    one_by_one = Config(**CONFIG, **settings, micro_batch_tokens=1)
    backwards = list(reversed(samples))
    other, single = gradients(policy, backwards, num_tokens, one_by_one, tiny)
    for name in whole:
        tolerance = 1e-6 + 1e-4 * whole[name].abs().max().item()
        assert torch.allclose(whole[name], single[name], atol=tolerance)
    for name in ("loss", "entropy", "kl", "ratio", "clipped"):
        assert metrics[name] == pytest.approx(other[name], abs=1e-4)
    assert (metrics["kl"] > 0) == (config.kl > 0)
    assert (metrics["clipped"] > 0) == (config.updates_per_rollout > 1)


def test_old_logprobs_are_those_before_the_first_update(tiny):
    """Bug: pi_old goes to another sample, because micro-batches reorder them, or carries a
    gradient."""
    samples, _ = samples_of(*rollout(tiny))
    scored = grpo.with_old_logprobs(tiny, samples, Accelerator(cpu=True), tiny.config)
    assert sorted(one.key for one in scored) == sorted(one.key for one in samples)
    for sample in scored:
        sampled = torch.tensor(sample.logprobs)
        assert torch.allclose(sample.old_logprobs, sampled, atol=1e-4)
        assert not sample.old_logprobs.requires_grad
    assert all(sample.old_logprobs is None for sample in samples)


def test_of_several_updates_the_first_tells_how_well_sampler_and_trainer_agree(tiny):
    """Bug: `ratio` and `logprob_diff` come from a later update, whose weights have moved, so every
    run with several updates looks as if its sampler was wrong (rule 11)."""
    episodes, advantages = rollout(tiny, CONFIG | dict(updates_per_rollout=3))
    samples, num_tokens = samples_of(episodes, advantages)
    counts = {"samples": len(samples), "num_tokens": num_tokens}
    optimizers = make_optimizers(tiny, "muon")
    set_lr(optimizers, 0.01)
    accelerator = Accelerator(cpu=True)
    metrics = grpo.update_policy(tiny, None, samples, counts, optimizers, accelerator, tiny.config)
    assert metrics["logprob_diff"] < 1e-3 and metrics["ratio"] == pytest.approx(1, abs=1e-3)
    logprobs, _ = tiny(samples)
    sampled = torch.tensor([x for sample in samples for x in sample.logprobs])
    assert (logprobs - sampled).abs().max() > 0.01 and metrics["clipped"] > 0


def test_the_kl_term_needs_every_sample(tiny):
    """Bug: samples of dead groups are skipped although the KL penalty has a gradient there."""
    episodes, advantages = rollout(tiny)
    samples, num_tokens = samples_of(episodes, advantages)
    dead = torch.zeros_like(advantages)
    every, same = samples_of(episodes, dead, keep_all=True)
    assert len(every) > len(samples) > 0
    assert same == num_tokens == sum(len(sample.response_ids) for sample in every)
    assert samples_of(episodes, dead) == ([], num_tokens)


def test_truncated_turns_are_out_of_loss_and_denominator(tiny):
    """Bug: the tail of a response that was cut is reinforced as if the policy had meant to stop
    there (rule 7)."""
    episodes, advantages = rollout(tiny, dict(max_response_tokens=6))
    samples, num_tokens = samples_of(episodes, advantages)
    turns = [turn.response for episode in episodes for turn in episode.turns]
    assert any(one.truncated for one in turns) and any(not one.truncated for one in turns)
    assert num_tokens == sum(len(one.ids) for one in turns if not one.truncated)
    assert all(sample.response_ids[-1] in tiny.end_ids for sample in samples)
    dead = sum(
        len(turn.response.ids)
        for episode, advantage in zip(episodes, advantages.flatten())
        for turn in episode.turns
        if advantage == 0 and not turn.response.truncated
    )
    # Samples without a gradient are skipped, but stay in N.
    assert dead and sum(len(sample.response_ids) for sample in samples) == num_tokens - dead


def test_the_samples_hold_the_very_ids_that_were_sampled(tiny):
    """Bug: responses are rebuilt from their text, which can come back as other tokens (rule 1)."""
    episodes, advantages = rollout(tiny, dict(max_response_tokens=6))
    samples, _ = samples_of(episodes, advantages)
    turns = [turn.response for episode in episodes for turn in episode.turns]
    sampled = {(tuple(one.prompt_ids), tuple(one.ids)): one.logprobs for one in turns}
    assert samples
    for sample in samples:
        assert sampled[sample.key] == sample.logprobs


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_are_means_over_the_tokens_with_a_gradient(tiny):
    """Bug: entropy, clipped, kl and ratio are divided by N, which also counts skipped samples, so
    they shrink with the share of dead groups; or they are a mean of the micro-batches' means."""
    reference, old = moved(tiny), moved(tiny)
    samples = [
        Sample([5, 6, 7], [8, 9, 10, 1], [-4.0] * 4, 0.5),
        Sample([5, 6], [9, 1], [-5.0] * 2, -0.5),
    ]
    config = Config(kl=0.1, micro_batch_tokens=1, max_grad_norm=1e9)
    samples = grpo.with_old_logprobs(old, samples, Accelerator(cpu=True), config)
    metrics, _ = gradients(tiny, samples, 100, config, reference)  # N = 100, and 6 have a gradient
    with torch.no_grad():
        (logprobs, entropy), (target, _) = tiny(samples), reference(samples)
    before = torch.cat([sample.old_logprobs for sample in samples])
    sampled = torch.tensor([x for sample in samples for x in sample.logprobs])
    ratio = (logprobs - before).exp()
    clipped = (ratio < 0.8) | (ratio > 1.28)
    assert clipped.any() and len(ratio) == 6
    assert metrics["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert metrics["clipped"] == pytest.approx(clipped.float().mean().item())
    assert metrics["kl"] == pytest.approx(grpo.kl_k3(logprobs, target).mean().item(), rel=1e-3)
    assert metrics["ratio"] == pytest.approx((logprobs - sampled).exp().mean().item(), rel=1e-4)
    largest = (logprobs - sampled).abs().max().item()
    assert metrics["logprob_diff"] == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_nan_in_one_micro_batch_shows(tiny, bad):
    """Bug: Python's max(0.5, nan) is 0.5, so a broken log-prob in a later micro-batch is hidden
    (rule 11)."""
    samples = [Sample([5] * length, [8, 1], [-1.0, -1.0], 0.5) for length in (4, 3, 2)]
    samples[bad].logprobs = [-1.0, math.nan]
    config = Config(micro_batch_tokens=1)  # one sample each
    metrics, _ = gradients(tiny, samples, 6, config)
    assert math.isnan(metrics["logprob_diff"])


# --- the step (rules 8, 9, 12) --------------------------------------------------------------------


def test_small_steps_move_the_weights(tiny):
    """Bug: weights kept in bf16 do not move at a learning rate of 1e-6 (rule 8)."""
    before = [p.clone() for p in tiny.parameters()]
    tiny.model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizers = make_optimizers(tiny, "adamw")
    set_lr(optimizers, 1e-6)
    clip_and_step(tiny, optimizers, 1.0)
    assert all(p.dtype == torch.float32 for p in tiny.parameters())
    assert all((p != b).any() for p, b in zip(tiny.parameters(), before))


def test_a_non_finite_step_is_left_out(tiny):
    """Bug: one NaN in a gradient destroys the weights of a week (rule 12)."""
    before = [p.clone() for p in tiny.parameters()]
    tiny.model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    next(tiny.parameters()).grad[0, 0] = float("nan")
    optimizers = make_optimizers(tiny, "muon")
    set_lr(optimizers, 1e-3)
    norm = clip_and_step(tiny, optimizers, 1.0)
    assert math.isnan(norm)
    assert all(torch.equal(p, b) for p, b in zip(tiny.parameters(), before))
    assert all(p.grad is None for p in tiny.parameters())


def test_the_run_stops_after_several_bad_steps():
    """Bug: a run that skips every step runs for days, or one bad step ends it (rule 12)."""
    bad, good = {"grad_norm": math.nan}, {"grad_norm": 1.0}
    assert count_bad_steps({}, bad) == 1
    assert count_bad_steps({"bad_steps": 1.0}, bad) == 2
    assert count_bad_steps({"bad_steps": 2.0}, good) == 0
    assert count_bad_steps({"bad_steps": 2.0}, {}) == 0  # all groups are dead: no update
    with pytest.raises(SystemExit, match="not finite"):
        count_bad_steps({"bad_steps": 2.0}, bad)


def test_a_bad_update_before_a_good_one_shows(tiny, monkeypatch):
    """Bug: of several updates per rollout, only the last one's gradient is looked at (rule 12)."""
    norms = iter([math.nan, 1.0])

    def fake_step(*_):
        return {"grad_norm": next(norms), "ratio": 1.0, "logprob_diff": 0.0}

    monkeypatch.setattr(grpo, "grpo_step", fake_step)
    monkeypatch.setattr(grpo, "with_old_logprobs", lambda model, samples, *_: samples)
    config = Config(updates_per_rollout=2)
    counts = {"samples": 1, "num_tokens": 1}
    metrics = grpo.update_policy(tiny, None, [], counts, [], Accelerator(cpu=True), config)
    assert count_bad_steps({"bad_steps": 1.0}, metrics) == 2


# --- the run --------------------------------------------------------------------------------------


def test_the_kl_reference_is_the_runs_own_first_checkpoint(tiny, tmp_path, monkeypatch):
    """Bug: a resumed run takes its newest weights as the reference, loses the reference among old
    checkpoints, or needs the SFT run, which may be gone."""

    def made_up(episode):  # a random policy earns nothing, so its gradient would be zero
        return sum(id for turn in episode.turns for id in turn.response.ids) % 10 / 9

    def load(name, *rest):
        policy = load_policy(name, *rest)
        if Path(name).name == "step-000000":
            references.append(copy.deepcopy(policy))
        return policy

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["grpo.py", *arguments])
        grpo.main()
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    references, folder = [], Path("runs/town/grpo")
    monkeypatch.setattr(grpo, "load_policy", load)
    monkeypatch.setattr(Episode, "reward", property(made_up))
    monkeypatch.chdir(tmp_path)
    tiny.save("tiny")
    few = "--grpo_steps 4 --save_every 2 --eval_tasks 1 --max_response_tokens 8".split()
    lines = run(*TINY, *few, "--model", "tiny", "--kl", "0.1")
    assert lines[0]["kl"] < 1e-6 < lines[3]["kl"]
    assert checkpoints(folder)[0].name == "step-000000"
    shutil.rmtree("tiny")
    shutil.rmtree(folder / "step-000004")
    again = run("--resume", str(folder))
    assert again[3]["kl"] == pytest.approx(lines[3]["kl"], rel=0.05)
    resumed = load_policy(folder / "step-000002", tiny.config)
    assert len(references) == 2
    for reference in references:
        for weight, first, later in zip(*(one.parameters() for one in (reference, tiny, resumed))):
            assert torch.equal(weight, first) and not torch.equal(weight, later)
