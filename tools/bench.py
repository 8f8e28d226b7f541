"""Time rollouts and optimiser steps, and other implementations of them, in one run.

    python -m tools.bench                  all parts: rollouts, grpo and sft
    python -m tools.bench rollouts         some of them: this one takes 12 seconds on two CPU cores

A ratio is the peer's time divided by ours, so above 1 ours is faster. It is the median over the
repeats, with the smallest and the largest. Ours and the peers take turns, so a busy machine slows
down all of them. TRL is optional: pip install trl datasets
"""

import copy
import random
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM

from agent import run_episodes
from config import Config, need
from grpo import grpo_step
from memory import HashedEmbedder
from policy import LanguageModel, Sample
from sft import sft_step
from tasks import load_tasks
from tasks.scoring import exact_match
from tools.peers import Generate, trl_steps
from training.optim import make_optimizers, set_lr
from training.tiny import corpus, create_policy, train_tokenizer

# Two layers under the real vocabulary: a shape for a CPU, where the output head costs the most.
SHAPE = dict(
    vocab_size=151_936, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=64, intermediate_size=256,
)  # fmt: skip
CPU = not torch.cuda.is_available()


def seconds_of(work: Callable) -> float:
    started = time.perf_counter()
    work()
    if not CPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(title: str, ours: Callable, peers: dict[str, Callable], repeats: int = 5):
    """Time `ours` and each of `peers`, {label: function}, in turn, and print the ratios."""
    work = {"ours": ours} | peers
    times = {label: [] for label in work}
    for _ in range(repeats + 1):
        for label, run in work.items():
            times[label].append(seconds_of(run))
    times = {label: np.array(seconds[1:]) for label, seconds in times.items()}  # the first warms up
    print(f"\n{title}: ours {np.median(times['ours']):.3g} s")
    for label in peers:
        ratios = times[label] / times["ours"]
        spread = f"({ratios.min():.2f} to {ratios.max():.2f})"
        print(f"    {label:58} {np.median(ratios):8.2f} x  {spread}")


# --- rollouts -------------------------------------------------------------------------------------
def rollouts():
    """Whole episodes of the town, beside transformers' generate."""
    config = Config(cpu=CPU)
    policy = create_policy(config, corpus(config)).to("cpu" if CPU else "cuda")
    policy.end_ids = set(range(0, policy.known_ids, 7))  # about 7 tokens, as in a trained policy
    stream, embed = load_tasks(config, "train", policy.count), HashedEmbedder()
    tasks = [stream(episode // 8) for episode in range(64)]

    def play(player):
        return run_episodes(tasks, player, config, embed, exact_match)

    peers = {"generate, one batch (TRL without vLLM)": lambda: play(Generate(policy))}
    compare("rollouts: 8 tasks, 8 episodes each", lambda: play(policy), peers, repeats=3)


# --- the optimiser step ---------------------------------------------------------------------------
def made_policy(config: Config, shape: dict) -> tuple[Qwen3ForCausalLM, LanguageModel]:
    """(a Qwen3 of that shape with random weights, a policy of a copy of it)."""
    tokenizer = train_tokenizer(corpus(Config()), Config())
    torch.manual_seed(0)
    with torch.device("cpu" if config.cpu else "cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, eos_token_id=tokenizer.eos_token_id))
    return model, LanguageModel(copy.deepcopy(model), tokenizer, config)


def made_samples(number: int, prompt: tuple, response: tuple) -> list[Sample]:
    """Samples of random tokens. prompt, response: (fewest, most) tokens."""
    rng, samples = random.Random(0), []
    for _ in range(number):
        prompt_ids = [rng.randrange(5, 100) for _ in range(rng.randint(*prompt))]
        ids = [rng.randrange(5, 100) for _ in range(rng.randint(*response))]
        samples.append(Sample(prompt_ids, ids, [-5.0] * len(ids), rng.choice((-0.5, 0.5))))
    return samples


def make_steps(model, policy: LanguageModel, samples: list[Sample], kind: str) -> dict:
    """{label: a function that takes a step}: ours, and TRL's on `model` if it is installed."""
    optimizers = make_optimizers(policy, "adamw")
    set_lr(optimizers, 1e-6)
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    take_step = partial(sft_step, policy) if kind == "sft" else partial(grpo_step, policy, None)
    accelerator, config = Accelerator(cpu=policy.config.cpu), policy.config
    ours = partial(take_step, samples, num_tokens, optimizers, accelerator, config)
    return {"ours": ours} | trl_steps(model, policy.tokenizer, samples, kind, config)


def step(kind: str):
    """Time one optimiser step of a small model on 16 samples that are as long as reading turns."""
    limits = {"max_prompt_tokens": 600, "max_response_tokens": 128, "micro_batch_tokens": 4096}
    model, policy = made_policy(Config(cpu=CPU, **limits), SHAPE)
    steps = make_steps(model, policy, made_samples(16, (64, 512), (8, 128)), kind)
    ours = steps.pop("ours")
    compare(f"{kind.upper()}: a step on 16 samples, vocabulary 151,936", ours, steps, repeats=3)


PARTS = {"rollouts": rollouts, "grpo": partial(step, "grpo"), "sft": partial(step, "sft")}


def main():
    names = sys.argv[1:] or list(PARTS)
    for name in names:
        need(name in PARTS, f"there is no part {name!r}; the parts are: {', '.join(PARTS)}")
    for name in names:
        PARTS[name]()


if __name__ == "__main__":
    main()
