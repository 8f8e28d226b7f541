"""Supervised fine-tuning: a first policy from demonstrations.

    python sft.py                                    the town, with a tiny model: runs/town/sft
    python sft.py --preset smollm2 --name smol       a chat model, on the town
    python sft.py --preset smollm2 --task hotpotqa --data hotpot_train_v1.1.json --questions 1
    python sft.py --demonstrations taught.jsonl ...  a teacher's episodes, made by tools/teach.py

1. Demonstrators play training tasks through the agent loop, one block of tasks at a time. In the
   town, scripts play a mixture of workflows, one per episode, most of them poor. SFT learns the
   mixture, and GRPO has to find the workflow that scores best.
2. Episodes with a score below `keep_score` are dropped, as the paper drops its teacher's.
3. Every turn of a kept episode is one sample (prompt, response). The loss is the cross-entropy of
   the response tokens:

       L = - sum_samples sum_t log pi(response_t | prompt, response_<t) / (response tokens)
"""

import itertools
import math
import random
import time
from collections.abc import Iterable, Iterator

from accelerate import Accelerator

from agent import Episode, observe
from config import Config, need, parse_args
from memory import Embedder, load_embedder
from policy import LanguageModel, Sample, load_policy
from tasks import Stream, Task, held_out_tasks, load_tasks
from tasks.demonstrators import curriculum, demonstrate, recorded
from training import distributed as dist
from training.checkpoint import Run, starting_model
from training.optim import clip_and_step, count_bad_steps, lr_factor, make_optimizers, set_lr
from training.tiny import create_policy

# --- samples --------------------------------------------------------------------------------------


def demonstrated_samples(
    blocks: Iterable[list[Task]], config: Config, policy: LanguageModel, embed: Embedder, main: bool
) -> Iterator[list[Sample]]:
    """Yields a list of samples per block of tasks: the turns of episodes that score enough."""
    for number, tasks in enumerate(blocks):
        episodes = demonstrate(tasks, config, embed, policy)
        kept = [episode for episode in episodes if episode.reward >= config.keep_score]
        if number == 0 and main:
            print(f"{len(kept)} of the first {len(episodes)} demonstrations are good enough")
        turns = [turn for episode in kept for turn in episode.turns]
        if turns:
            prompts = [ids for _, ids in policy.encode([turn.observation for turn in turns])]
            responses = policy.chat.encode_responses([turn.response.text for turn in turns])
            yield [Sample(*pair) for pair in zip(prompts, responses)]


def recorded_samples(config: Config, policy: LanguageModel) -> list[Sample]:
    """The samples of a teacher's file. Raises BadInput if a prompt or a response is too long."""
    pairs = recorded(config)
    prompts = policy.chat.encode_prompts([prompt for prompt, _ in pairs])
    responses = policy.chat.encode_responses([response for _, response in pairs])
    for kind, rows in (("prompt", prompts), ("response", responses)):
        longest, flag = max(map(len, rows), default=0), f"max_{kind}_tokens"
        long = f"{config.demonstrations} has a {kind} of {longest} tokens: raise --{flag}"
        need(longest <= getattr(config, flag), long)
    return [Sample(*pair) for pair in zip(prompts, responses)]


def make_curriculum(
    config: Config, policy: LanguageModel, stream: Stream, embed: Embedder, main: bool
) -> list[tuple[float, Iterator]]:
    """[(share of the SFT steps, blocks of samples)]. The first block of each is made at once.

    Raises BadInput if no demonstration scores enough.
    """
    if config.demonstrations:
        parts = [(1.0, iter([recorded_samples(config, policy)]))]
    else:
        parts = [
            (share, demonstrated_samples(blocks, config, policy, embed, main))
            for share, blocks in curriculum(config, stream)
        ]
    nothing = (
        f"no demonstration reached --keep_score {config.keep_score}. Questions of a saved set "
        'without "support" cannot be demonstrated by a script: use a teacher (tools/teach.py)'
    )
    begun = [(share, next(blocks, None), blocks) for share, blocks in parts]
    need(all(first for _, first, _ in begun), nothing)
    return [(share, itertools.chain([first], blocks)) for share, first, blocks in begun]


def batches(parts: list[tuple[float, Iterator]], config: Config) -> Iterator[list[Sample]]:
    """Yields the batch of each step: `sft_batch` samples."""
    rng, step = random.Random(config.seed), 0
    for number, (share, blocks) in enumerate(parts, start=1):
        last = number == len(parts)
        until = config.sft_steps if last else step + round(share * config.sft_steps)
        samples = passes(blocks, rng)
        for _ in range(step, until):
            yield list(itertools.islice(samples, config.sft_batch))
        step = until


def passes(blocks: Iterator, rng: random.Random) -> Iterator[Sample]:
    """Yields samples without end. The first pass shuffles each block on its own, so that blocks are
    made when they are needed. Later passes shuffle all samples together."""
    samples = []
    for block in blocks:
        samples += block
        yield from rng.sample(block, len(block))
    while True:
        yield from rng.sample(samples, len(samples))


# --- the trainer ----------------------------------------------------------------------------------


def sft_step(
    model, samples: list[Sample], num_tokens: int, optimizers, accelerator: Accelerator, config
) -> dict[str, float]:
    """One optimiser step on this process's samples. Returns metrics over all processes.

    num_tokens: the response tokens of all processes. The loss is divided by it.
    """
    sums = {"loss": 0.0, "token_accuracy": 0.0}
    for batch in dist.shared_batches(model, samples, config.micro_batch_tokens, accelerator):
        logprobs, _ = model(batch)  # (n,)
        loss = -logprobs.sum() / num_tokens
        (loss * accelerator.num_processes).backward()  # the processes' gradients are averaged
        sums["loss"] += loss.item()
        sums["token_accuracy"] += (logprobs > math.log(0.5)).sum().item() / num_tokens
    grad_norm = clip_and_step(model, optimizers, config.max_grad_norm)
    return dist.all_reduce_sum(sums, accelerator) | {"grad_norm": grad_norm}


def train(run: Run, config: Config, start: str | None):
    """Run the remaining steps, from the run's newest checkpoint or from the base model."""
    accelerator = run.accelerator
    start = starting_model(run, config, start)
    need(start or config.task == "town", f"--task {config.task} needs a --model: a chat model")
    policy = load_policy(start, config) if start else create_policy(config)
    embed = load_embedder(config.embedder, accelerator.device)
    stream = load_tasks(config, "train", policy.count)
    held_out = held_out_tasks(config, "dev", min(100, config.eval_tasks), policy.count)
    # Raises BadInput now if the first prompt of a held-out task is too long.
    policy.encode([observe(Episode(task), config) for task in held_out])
    parts = make_curriculum(config, policy, stream, embed, run.main)
    model = dist.distribute(policy, accelerator)
    optimizers = make_optimizers(policy, config.optimizer)
    run.begin(policy, optimizers)
    remaining = itertools.islice(batches(parts, config), run.step, None)
    for step, batch in zip(run.steps(config.sft_steps), remaining):
        started = time.perf_counter()
        factor = lr_factor(step, config.sft_steps, warmup=config.sft_steps // 10, decay=0.6)
        lr = factor * config.sft_lr
        set_lr(optimizers, lr)
        num_tokens = sum(len(sample.response_ids) for sample in batch)
        samples = dist.shard(batch, accelerator)
        metrics = sft_step(model, samples, num_tokens, optimizers, accelerator, config)
        metrics["lr"] = lr
        metrics["bad_steps"] = count_bad_steps(run.metrics, metrics)
        metrics["seconds"] = time.perf_counter() - started
        read = num_tokens + sum(len(sample.prompt_ids) for sample in batch)
        metrics["tokens_per_second"] = read / metrics["seconds"]
        if step == config.sft_steps:
            rollout_model = dist.make_rollout_model(policy, accelerator)
            em = dist.held_out_em(rollout_model, held_out, config, accelerator)
            metrics["held_out_em"] = em
        run.log(metrics)


def main():
    config, args = parse_args("Supervised fine-tuning on demonstrations.", resume=True)
    run = Run(config, "sft", args.resume)
    train(run, config, args.start)
    run.finish(config.sft_steps, f"python grpo.py --from {run.folder}")


if __name__ == "__main__":
    main()
