"""GRPO: reinforcement learning of the memory policy from the task's own reward.

    python grpo.py                                  from runs/town/sft to runs/town/grpo
    python grpo.py --name mine                      from runs/mine/sft to runs/mine/grpo
    python grpo.py --from runs/town/sft --name b    from that run's settings and model
    python grpo.py --preset paper --data FILE       from a pretrained model, without SFT

Each step, as in the paper's eqs. 8 and 9:

1. Roll out `group_size` episodes of each of `tasks_per_step` tasks, sampled at `temperature`.
2. A_i = r_i - mean_{j in group} r_j: one advantage per episode, from its one terminal reward, not
   divided by the standard deviation (Dr. GRPO). It applies to every token of every turn.
3. Every turn was a fresh prompt, so every turn is one sample. Maximise over all response tokens t

       J = 1/N sum_t [ min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) - kl KL_t ]

   with rho_t = pi(t) / pi_old(t) and N the number of response tokens in the whole step.

Our choices where the paper is silent: a turn that is cut at the token limit counts in the reward,
but its tokens are left out of the loss and of N. A group with equal rewards has no gradient. Its
samples are skipped, unless the KL term needs them, but its tokens stay in N. No entropy bonus, no
critic. With one update per rollout, pi_old is pi itself: rho is 1, but its gradient is not 0.
"""

import time
from dataclasses import replace

import torch
from accelerate import Accelerator

from agent import Episode, observe, run_episodes
from config import Config, need, parse_args
from memory import load_embedder
from policy import LanguageModel, Sample, compute_dtype, load_policy
from tasks import held_out_tasks, load_tasks
from tasks.scoring import score_function, summarize, tally
from training import distributed as dist
from training.checkpoint import Run, starting_model, step_name
from training.optim import clip_and_step, count_bad_steps, lr_factor, make_optimizers, set_lr


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = r_i - mean of its group, eq. 8. (tasks, group_size) -> the same shape.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]])).tolist()
    [[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    # Equal rewards give exactly 0, however their mean is rounded.
    spread = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)
    return torch.where(spread, rewards - rewards.mean(dim=1, keepdim=True), 0.0)


def policy_loss(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-min(rho A, clip(rho) A) of each token, the clipped surrogate of eq. 9. All shapes (n,).

    >>> new = torch.tensor([0.5, 0.5, 0.5, 0.2]).log()
    >>> old = torch.tensor([0.5, 0.25, 0.25, 0.5]).log()
    >>> policy_loss(new, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.28)  # rho: 1, 2, 2, 0.4
    tensor([-1.0000, -1.2800,  2.0000,  0.8000])
    """
    rho = (logprobs - old).exp()
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(rho * advantages, clipped * advantages)


def kl_k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(pi || pi_ref) of each token (n,): exp(d) - d - 1 with d = log pi_ref -
    log pi. It is unbiased and never negative.

    >>> kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # 1/2 - log(1/2) - 1
    tensor([0.1931])
    """
    difference = (reference - logprobs).clamp(-20, 20)  # exp of more would overflow
    return difference.exp() - difference - 1


def to_samples(episodes: list[Episode], advantages: list[float], keep_all: bool) -> list[Sample]:
    """One sample per turn that was not cut, with its episode's advantage.

    keep_all: keep those with advantage 0, too. Only their KL term has a gradient.
    """
    return [
        Sample(turn.response.prompt_ids, turn.response.ids, turn.response.logprobs, advantage)
        for episode, advantage in zip(episodes, advantages)
        for turn in episode.turns
        if not turn.response.truncated and (advantage != 0 or keep_all)
    ]


def rollout_sums(episodes: list[Episode], samples: list[Sample], advantages: torch.Tensor) -> dict:
    """This process's sums of a step, for all_reduce_sum. `num_tokens` is its part of N."""
    responses = [turn.response for episode in episodes for turn in episode.turns]
    return tally(episodes) | {
        "num_tokens": sum(len(one.ids) for one in responses if not one.truncated),
        "samples": len(samples),
        "sample_tokens": sum(len(one.prompt_ids) + len(one.response_ids) for one in samples),
        "dead_groups": (advantages == 0).all(dim=1).sum().item(),
        "groups": len(advantages),
    }


def with_old_logprobs(
    model: torch.nn.Module, samples: list[Sample], accelerator: Accelerator, config: Config
) -> list[Sample]:
    """Collective: copies of the samples with old_logprobs, for several updates per rollout."""
    scored = []
    with torch.no_grad():
        for batch in dist.shared_batches(model, samples, config.micro_batch_tokens, accelerator):
            logprobs, _ = model(batch)
            parts = logprobs.split([len(sample.response_ids) for sample in batch])
            pairs = [(one, part) for one, part in zip(batch, parts) if one is not dist.IDLE]
            scored += [replace(sample, old_logprobs=part) for sample, part in pairs]
    return scored


def grpo_step(
    model: torch.nn.Module,
    reference: LanguageModel | None,
    samples: list[Sample],
    num_tokens: int,
    optimizers: list[torch.optim.Optimizer],
    accelerator: Accelerator,
    config: Config,
) -> dict[str, float]:
    """Collective: one optimiser step on this process's samples. Returns metrics of all processes.

    num_tokens: N, over all processes. The loss is divided by N. Entropy, clipped, kl and ratio are
    means over the tokens of `samples`, which are the tokens that have a gradient.
    """
    sums = dict.fromkeys(("loss", "entropy", "clipped", "kl", "ratio", "scored"), 0.0)
    differences = [torch.zeros(1, device=accelerator.device)]
    for batch in dist.shared_batches(model, samples, config.micro_batch_tokens, accelerator):
        logprobs, entropy = model(batch)  # (n,)
        advantages = torch.tensor([one.advantage for one in batch for _ in one.response_ids])
        advantages = advantages.to(logprobs)  # (n,)
        sampled = torch.tensor([x for sample in batch for x in sample.logprobs]).to(logprobs)
        if batch[0].old_logprobs is None:
            old = logprobs.detach()
        else:
            old = torch.cat([sample.old_logprobs for sample in batch])
        losses = policy_loss(logprobs, old, advantages, config.clip_low, config.clip_high)
        if config.kl:
            with torch.no_grad():
                target, _ = reference(batch)
            kl = kl_k3(logprobs, target)
            losses = losses + config.kl * kl
            sums["kl"] += kl.sum().item()
        loss = losses.sum() / num_tokens  # the same for any split into micro-batches and ranks
        (loss * accelerator.num_processes).backward()  # the processes' gradients are averaged
        with torch.no_grad():
            rho = (logprobs - old).exp()
            outside = (rho < 1 - config.clip_low) | (rho > 1 + config.clip_high)
            sums["loss"] += loss.item()
            sums["entropy"] += entropy.sum().item()
            sums["clipped"] += outside.sum().item()
            sums["ratio"] += (logprobs - sampled).exp().sum().item()
            sums["scored"] += len(logprobs)
            differences.append((logprobs - sampled).abs())
    grad_norm = clip_and_step(model, optimizers, config.max_grad_norm)
    largest = dist.all_reduce_max(torch.cat(differences).max().item(), accelerator)
    sums = dist.all_reduce_sum(sums, accelerator)
    scored, loss = sums.pop("scored"), sums.pop("loss")
    means = {name: value / scored for name, value in sums.items()}
    return means | {"loss": loss, "logprob_diff": largest, "grad_norm": grad_norm}


def update_policy(model, reference, samples, counts: dict, optimizers, accelerator, config) -> dict:
    """Collective: the optimiser steps on one rollout, eq. 9. Returns their metrics."""
    updates = config.updates_per_rollout if counts["samples"] else 0  # none: all dead or all cut
    if updates > 1:
        samples = with_old_logprobs(model, samples, accelerator, config)
    num_tokens = counts["num_tokens"]
    steps = [
        grpo_step(model, reference, samples, num_tokens, optimizers, accelerator, config)
        for _ in range(updates)
    ]
    if not steps:
        return {}
    # Sampler and trainer have the same weights only in the first update. If the norm of any update
    # is not finite, neither is their mean, and count_bad_steps sees it.
    first = {name: steps[0][name] for name in ("ratio", "logprob_diff")}
    return steps[-1] | first | {"grad_norm": sum(one["grad_norm"] for one in steps) / updates}


def train(run: Run, config: Config, start: str | None):
    """Run the remaining steps, from the run's newest checkpoint or from the starting model."""
    accelerator, embed = run.accelerator, load_embedder(config.embedder, run.accelerator.device)
    start = starting_model(run, config, start)
    need(start, "no model to start from: run sft.py and leave out --preset, or give --from RUN")
    policy = load_policy(start, config)
    stream = load_tasks(config, "train", policy.count)
    held_out = held_out_tasks(config, "dev", min(100, config.eval_tasks), policy.count)
    # Raises BadInput now if the first prompt of a held-out task is too long.
    policy.encode([observe(Episode(task), config) for task in held_out])
    model = dist.distribute(policy, accelerator)  # the module to call in training
    optimizers = make_optimizers(policy, config.optimizer)
    rollout_model = dist.make_rollout_model(policy, accelerator)
    run.begin(policy, optimizers)
    reference = None
    if config.kl:  # the policy that this run started from, kept as its first checkpoint
        dtype = compute_dtype(config, accelerator.device) if dist.is_sharded() else torch.float32
        reference = load_policy(run.folder / step_name(0), config, dtype)
        reference.to(accelerator.device).requires_grad_(False)
    for step in run.steps(config.grpo_steps):
        started = time.perf_counter()
        first = config.sft_tasks + (step - 1) * config.tasks_per_step  # the tasks after SFT's
        indices = dist.shard(range(first, first + config.tasks_per_step), accelerator)
        tasks = [task for task in map(stream, indices) for _ in range(config.group_size)]
        episodes = run_episodes(tasks, rollout_model, config, embed, score_function(config), step)
        rollout_seconds = dist.all_reduce_max(time.perf_counter() - started, accelerator)
        rewards = torch.tensor([episode.reward for episode in episodes])
        advantages = group_advantages(rewards.view(-1, config.group_size))  # (tasks, group), eq. 8
        samples = to_samples(episodes, advantages.flatten().tolist(), keep_all=config.kl > 0)
        counts = dist.all_reduce_sum(rollout_sums(episodes, samples, advantages), accelerator)
        factor = lr_factor(step, config.grpo_steps, config.warmup_steps, config.grpo_decay)
        lr = factor * config.grpo_lr
        set_lr(optimizers, lr)
        metrics = summarize(counts)
        metrics |= update_policy(model, reference, samples, counts, optimizers, accelerator, config)
        dist.sync_weights(rollout_model, policy)
        metrics["dead_groups"] = counts["dead_groups"] / counts["groups"]
        metrics["bad_steps"] = count_bad_steps(run.metrics, metrics)
        metrics |= {"lr": lr, "rollout_seconds": rollout_seconds}
        metrics["seconds"] = time.perf_counter() - started
        metrics["tokens_per_second"] = counts["sample_tokens"] / metrics["seconds"]
        if step % config.save_every == 0 or step == config.grpo_steps:
            em = dist.held_out_em(rollout_model, held_out, config, accelerator)
            metrics["held_out_em"] = em
        run.log(metrics)


def main():
    config, args = parse_args("GRPO from an SFT policy.", resume=True, default_runs=("sft",))
    run = Run(config, "grpo", args.resume)
    train(run, config, args.start)
    test_file = " --data TEST_FILE" if config.data else ""
    run.finish(config.grpo_steps, f"python evaluate.py --from {run.folder}{test_file}")


if __name__ == "__main__":
    main()
