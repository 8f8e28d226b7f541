"""Time rollouts and optimiser steps beside other implementations, and measure their memory.

    python -m tools.bench                                   all parts, with the policy of runs/town
    python -m tools.bench grpo sft --preset smollm2 --model FOLDER      two parts, another model
    python -m tools.bench rollouts --from runs/smol/sft --tasks_per_step 2

The parts are rollouts, grpo and sft. Without a run and --model, the model is a new tiny one. The
samples are demonstrated turns. The implementations alternate in one process. A ratio is the peer's
time divided by ours: median (smallest to largest). Memory is a run's peak minus the use before it.
TRL is optional: pip install trl datasets
"""

import copy
import ctypes
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from agent import run_episodes
from config import Config, need, parse_args
from grpo import grpo_step
from memory import HashedEmbedder
from policy import LanguageModel, Sample, load_policy
from sft import demonstrated_samples, sft_step
from tasks import load_tasks
from tasks.scoring import exact_match
from tools.peers import Generate, trl_steps
from training.checkpoint import latest_checkpoint
from training.distributed import make_rollout_model
from training.optim import make_optimizers, micro_batches, set_lr
from training.tiny import create_policy

STATUS = Path("/proc/self/status")


def memory(peak: bool = False) -> float:
    """GB that the GPU has allocated, or that this process uses. 0 on systems other than Linux."""
    if torch.cuda.is_initialized():
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)() / 1e9
    field = "VmHWM:" if peak else "VmRSS:"
    return float(STATUS.read_text().split(field)[1].split()[0]) / 1e6 if STATUS.exists() else 0.0


def measure(work: Callable) -> tuple[float, float]:
    """(seconds, GB): the time of work(), and its peak memory less the memory before it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier runs have freed
        STATUS.with_name("clear_refs").write_text("5")  # the peak is counted from here
    before, started = memory(), time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started, memory(peak=True) - before


def compare(title: str, work: dict[str, Callable], repeats: int = 3):
    """Run the functions of `work`, {label: function}, in turn. Print ratios to the first one."""
    measured = {label: [] for label in work}
    for _ in range(repeats + 1):
        for label, run in work.items():
            measured[label].append(measure(run))
    measured = {label: np.array(rows[1:]) for label, rows in measured.items()}  # the first warms up
    ours = next(iter(measured.values()))  # (repeats, 2)
    print(f"\n{title}")
    for label, theirs in measured.items():
        seconds, peak = np.median(theirs, axis=0)
        ratios = theirs[:, 0] / ours[:, 0]
        spread = f"({ratios.min():.2f} to {ratios.max():.2f})"
        times = f"{seconds:8.3g} s {peak:6.2f} GB {np.median(ratios):6.2f} x  {spread}"
        print(f"    {label:40} {times}", flush=True)


def rollouts(policy: LanguageModel, config: Config):
    """Whole episodes, beside transformers' generate."""
    policy = make_rollout_model(policy, Accelerator(cpu=config.cpu))
    stream, embed = load_tasks(config, "train", policy.count), HashedEmbedder()
    tasks = [stream(i) for i in range(config.tasks_per_step) for _ in range(config.group_size)]

    def play(player):
        return lambda: run_episodes(tasks, player, config, embed, exact_match)

    work = {"ours": play(policy), "generate, one batch (TRL without vLLM)": play(Generate(policy))}
    compare(f"rollouts: {config.tasks_per_step} tasks, {config.group_size} episodes each", work)


def demonstrated(policy: LanguageModel, config: Config) -> list[Sample]:
    """`sft_batch` turns of demonstrations, with made-up advantages and log-probs."""
    stream = load_tasks(config, "train", policy.count)
    tasks = list(map(stream, range(config.sft_batch)))
    every = replace(config, keep_score=0.0)
    samples = next(demonstrated_samples([tasks], every, policy, HashedEmbedder(), main=False))
    rng = random.Random(config.seed)
    samples = rng.sample(samples, config.sft_batch)
    for sample in samples:
        sample.logprobs = [-1.0] * len(sample.response_ids)
        sample.advantage = rng.choice((-0.5, 0.5))
    return samples


def step(policy: LanguageModel, config: Config, kind: str):
    """One optimiser step, 'sft' or 'grpo', beside TRL's trainer with the same micro-batches."""
    config = replace(config, kl=0.0)
    samples, other = demonstrated(policy, config), copy.deepcopy(policy.model)
    optimizers = make_optimizers(policy, "adamw")
    set_lr(optimizers, 1e-6)
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    take_step = partial(sft_step, policy) if kind == "sft" else partial(grpo_step, policy, None)
    accelerator = Accelerator(cpu=config.cpu)
    work = {"ours": partial(take_step, samples, num_tokens, optimizers, accelerator, config)}
    batches = micro_batches(samples, config.micro_batch_tokens)
    work |= trl_steps(other, policy.tokenizer, batches, kind, config)
    compare(f"{kind}: a step on {len(samples)} turns in {len(batches)} micro-batches", work)


PARTS = {"rollouts": rollouts, "grpo": partial(step, kind="grpo"), "sft": partial(step, kind="sft")}
FLAGS = [("parts", dict(nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all"))]


def main():
    config, args = parse_args("Timings.", FLAGS, default_runs=("grpo", "sft"))
    for name in args.parts:
        need(name in PARTS, f"there is no part {name!r}; the parts are: {', '.join(PARTS)}")
    config.cpu = config.cpu or not torch.cuda.is_available()
    start = latest_checkpoint(args.start) if args.start else config.model
    policy = load_policy(start, config) if start else create_policy(config)
    policy.to("cpu" if config.cpu else "cuda")
    print(f"{start or 'a new tiny model'}: {policy.model.num_parameters():,} parameters")
    for name in args.parts or PARTS:
        PARTS[name](policy, config)


if __name__ == "__main__":
    main()
