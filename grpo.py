"""GRPO: reinforcement learning of the memory policy from the task's own reward.

    python grpo.py                                  from runs/town/sft to runs/town/grpo, on a CPU
    python grpo.py --name mine --seed 1             from runs/mine/sft
    python grpo.py --from runs/town/sft --name b    from that run's settings and model
    python grpo.py --model Qwen/Qwen3-8B ...        from a pretrained model, without SFT

Each step, as in the paper's eqs. 8 and 9:

1. Roll out: `group_size` episodes of each of `tasks_per_step` tasks, all turns sampled at `temperature`.
2. A_i = r_i - mean_{j in group} r_j: one advantage per episode, from its one terminal reward, not divided by the standard
   deviation (Dr.GRPO). It holds for every token of every turn, memory operations included.
3. Every turn was a fresh prompt, so every turn is one row. Maximise over all response tokens t of all rows

       J = 1/N sum_t [ min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) - kl KL(pi || pi_ref)_t ]

   with rho_t = pi(t) / pi_old(t), and N the number of response tokens in the whole step.

What is ours where the paper is silent: turns that were cut at the token limit count in the reward, but their tokens are out
of the loss and of N; groups in which all rewards are equal have no gradient, so their rows are skipped (they stay in N),
unless the KL term needs them.
With one update per rollout pi_old is pi itself: rho is 1, but its gradient is not 0.
"""

import time
from pathlib import Path

import torch

import parallel
from agent import run_episodes
from config import RESUME, BadInput, Config, parse_args
from memory import load_embedder
from optim import clip_and_step, count_bad_steps, make_optimizers, scale_lr, schedule
from policy import check_prompts, open_policy
from run import Run, trained_model, unfinished
from scoring import scorer, summarize, tally
from tasks import held_out_tasks, load_tasks


def group_advantages(rewards):
    """A_i = r_i - mean of its group, eq. 8. rewards: (tasks, group_size) -> the same shape.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]])).tolist()
    [[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    spread = rewards != rewards[:, :1]  # equal rewards give exactly zero, whatever the rounding of their mean
    return torch.where(spread.any(1, keepdim=True), rewards - rewards.mean(1, keepdim=True), 0.0)


def policy_loss(logprobs, old, advantages, clip_low, clip_high):
    """-min(rho A, clip(rho) A) of each token, the clipped surrogate of eq. 9. All shapes (N,).

    >>> new, old = torch.tensor([0.5, 0.5, 0.5, 0.2]).log(), torch.tensor([0.5, 0.25, 0.25, 0.5]).log()
    >>> policy_loss(new, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.28)  # rho: 1, 2, 2, 0.4
    tensor([-1.0000, -1.2800,  2.0000,  0.8000])
    """
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_k3(logprobs, reference):
    """The k3 estimate of KL(pi || pi_ref), exp(d) - d - 1 with d = log pi_ref - log pi: unbiased, never negative. (N,)

    >>> kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # 1/2 - log(1/2) - 1
    tensor([0.1931])
    """
    difference = (reference - logprobs).clamp(-20, 20)  # exp of more would overflow
    return difference.exp() - difference - 1


def training_rows(episodes, advantages, all_rows=False):
    """([(prompt ids, response ids, sampled log-probs, advantage)], N): the rows with a gradient, and N of the docstring.

    all_rows: those without an advantage too, for the KL term.
    """
    rows, tokens = [], 0
    for episode, advantage in zip(episodes, advantages):
        for response in (turn.response for turn in episode.turns):
            if response.truncated:
                continue
            tokens += len(response.ids)
            if advantage != 0 or all_rows:
                rows.append((response.prompt_ids, response.ids, response.logprobs, advantage))
    return rows, tokens


def with_old(wrapped, rows, accelerator, config):
    """The rows, each with its log-probs (n,) under the present policy as one more item: pi_old of the updates to come."""
    scored = []
    with torch.no_grad():
        for batch in parallel.shared_batches(accelerator, wrapped, rows, config):
            logprobs, _ = wrapped(batch)
            parts = logprobs.split([len(row[1]) for row in batch])
            scored += [(*row, part) for row, part in zip(batch, parts) if row is not parallel.IDLE]
    return scored


def update(wrapped, reference, rows, tokens, optimizers, accelerator, config):
    """One optimiser step on `rows`, this process's, of training_rows or with_old; `tokens` is the N of all processes.

    Returns its metrics, also of all processes.
    """
    totals, gap = dict.fromkeys(("loss", "entropy", "clipped", "kl", "ratio", "scored"), 0.0), 0.0
    for batch in parallel.shared_batches(accelerator, wrapped, rows, config):
        logprobs, entropy = wrapped(batch)  # (n,)
        sizes = torch.tensor([len(row[1]) for row in batch], device=logprobs.device)
        advantages = torch.tensor([row[3] for row in batch], device=logprobs.device).repeat_interleave(sizes)  # (n,)
        sampled = torch.tensor([x for row in batch for x in row[2]], device=logprobs.device)
        old = torch.cat([row[4] for row in batch]).to(logprobs) if len(batch[0]) > 4 else logprobs.detach()
        losses = policy_loss(logprobs, old, advantages, config.clip_low, config.clip_high)
        if config.kl:
            with torch.no_grad():
                target, _ = reference(batch)
            kl = kl_k3(logprobs, target)
            losses, totals["kl"] = losses + config.kl * kl, totals["kl"] + kl.sum().item()
        # One denominator for the whole step: micro-batches, their order, and whose they are do not matter.
        (losses.sum() * accelerator.num_processes / tokens).backward()
        with torch.no_grad():
            ratio = (logprobs - old).exp()
            totals["loss"] += losses.sum().item()
            totals["entropy"] += entropy.sum().item()
            totals["clipped"] += ((ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)).sum().item()
            totals["ratio"] += (logprobs - sampled).exp().sum().item()
            totals["scored"] += len(logprobs)
            gap = max(gap, (logprobs - sampled).abs().max().item()) if len(logprobs) else gap
    norm = clip_and_step(wrapped, optimizers, config.max_grad_norm)
    totals = parallel.total(accelerator, totals)
    scored = totals.pop("scored")
    return {name: total / scored for name, total in totals.items()} | {
        "loss": totals["loss"] / tokens, "gap": max(parallel.gather(accelerator, gap)), "grad_norm": norm}


def find_start(config, start):
    """The model to start from: that of --from, else this name's SFT policy, else --model."""
    if start and (Path(start) / "model").is_dir():
        folder = Path(start) / "model"
    elif not (folder := trained_model(config, "sft")):
        if not config.model:
            raise BadInput(f"{config.folder('sft') / 'model'} does not exist: run sft.py with the same --name first, or give a "
                           "run folder with --from, or a pretrained --model")
        return config.model
    if steps := unfinished(folder):
        print(f"{folder} has had {steps}: --resume {folder.parent} would go on with it")
    return str(folder.resolve())  # the checkpoint itself: the link may show another one when this run is resumed


def main():
    config, extra = parse_args("GRPO from an SFT policy.", extra=[RESUME],
                               default_run=lambda name: Config(name=name).folder("sft"))
    run = Run(config, "grpo", extra["resume"])
    accelerator = run.accelerator
    run.begin_from(run.start or find_start(config, extra["start"]))
    policy = open_policy(str(run.checkpoint or run.start), config)
    embed = load_embedder(config.embedder, accelerator.device)
    stream = load_tasks(config, "train", policy.count)
    held_out = held_out_tasks(config, "dev", min(100, config.eval_tasks), policy.count)
    check_prompts(policy, held_out, config)
    wrapped = parallel.distribute(accelerator, policy)
    reference = parallel.frozen(accelerator, open_policy(run.start, config)) if config.kl else None
    optimizers = make_optimizers(policy, config.grpo_lr, config.optimizer)
    player = parallel.rollout_policy(accelerator, policy)
    run.begin(policy, optimizers)
    for step in run.steps(config.grpo_steps):
        started = time.perf_counter()
        first = config.sft_tasks + (step - 1) * config.tasks_per_step  # tasks that SFT has not seen
        tasks = [stream(index) for index in parallel.share(accelerator, range(first, first + config.tasks_per_step))]
        episodes = run_episodes([task for task in tasks for _ in range(config.group_size)], player, config, embed, scorer(config),
                                seed=step)
        rollout_seconds = max(parallel.gather(accelerator, time.perf_counter() - started))
        rewards = torch.tensor([episode.reward for episode in episodes]).view(len(tasks), config.group_size)
        advantages = group_advantages(rewards)
        rows, tokens = training_rows(episodes, advantages.flatten().tolist(), all_rows=config.kl > 0)
        sums = parallel.total(accelerator, tally(episodes) | {
            "dead_groups": (advantages == 0).all(1).sum().item(), "response_tokens": tokens, "rows": len(rows),
            "row_tokens": sum(len(row[0]) + len(row[1]) for row in rows)})
        number_of_updates = config.updates_per_rollout if sums["rows"] else 0
        if number_of_updates > 1:
            rows = with_old(wrapped, rows, accelerator, config)
        factor = schedule(step, config.grpo_steps, config.warmup_steps, config.grpo_decay)
        scale_lr(optimizers, factor)
        updates = [update(wrapped, reference, rows, sums["response_tokens"], optimizers, accelerator, config)
                   for _ in range(number_of_updates)]
        parallel.refresh(player, policy)
        bad_steps = count_bad_steps(run.metrics.get("bad_steps", 0), [one["grad_norm"] for one in updates])
        seconds = time.perf_counter() - started
        metrics = {"dead_groups": sums["dead_groups"] / config.tasks_per_step, **summarize(sums)}
        if updates:  # of several, the first one tells how well sampler and trainer agree
            metrics |= updates[-1] | {name: updates[0][name] for name in ("ratio", "gap")}
        metrics |= {"lr": factor * config.grpo_lr, "bad_steps": bad_steps, "rollout_seconds": rollout_seconds,
                    "seconds": seconds, "tokens_per_second": sums["row_tokens"] / seconds}
        if step % config.save_every == 0 or step == config.grpo_steps:
            metrics["held_out_em"] = parallel.held_out_em(accelerator, player, held_out, config, embed)
        run.log(metrics)
    then = f"python evaluate.py --name {config.name}"
    run.finish(config.grpo_steps, then if config.task == "town" else f"{then} --data DEV_FILE")


if __name__ == "__main__":
    main()
