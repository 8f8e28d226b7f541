"""Supervised fine-tuning: a first policy from demonstrations.

    python sft.py                                                       the town, a tiny model, on a CPU: runs/town/sft
    python sft.py --task hotpotqa --data hotpot_train.json --documents 50
    python sft.py --model Qwen/Qwen3-0.6B --task hotpotqa --data hotpot_train.json
    python sft.py --demonstrations taught.jsonl --model ...             a teacher's, which --teacher writes: see demonstrations.py

1. Demonstrators play training tasks, a block whenever rows run out, through the agent loop, from the observation alone. In the
   town scripts follow a mixture of workflows, one per episode, most of them poor: SFT learns the mixture, and GRPO has to find what
   pays.
2. Episodes with a task score below `keep_score` are dropped, as the paper drops its teacher's.
3. Every turn of the others is one row, (prompt, response), and the loss is the cross-entropy of the response tokens:

       L = - sum_rows sum_t log pi(response_t | prompt, response_<t) / (response tokens of the batch)
"""

import itertools
import math
import random
import time

from accelerate import Accelerator

import parallel
from config import RESUME, BadInput, check_new_file, check_one_process, parse_args
from demonstrations import demonstrate, lessons, record, recorded
from memory import load_embedder
from optim import clip_and_step, count_bad_steps, make_optimizers, scale_lr, schedule
from policy import check_prompts, open_player, open_policy
from run import Run
from scoring import summarize, tally
from tasks import held_out_tasks, load_tasks


def batches(taught, config):
    """The batch of rows of each step. taught: [(share of the steps, blocks of rows)], the lessons one after the other."""
    rng, step = random.Random(config.seed), 0
    for number, (share, blocks) in enumerate(taught, start=1):
        until = config.sft_steps if number == len(taught) else step + round(share * config.sft_steps)
        rows = passes(blocks, rng)
        for step in range(step, until):
            yield list(itertools.islice(rows, config.sft_batch))
        step = until


def passes(blocks, rng):
    """Rows without end: shuffled block by block, as they are demonstrated, in the first pass; all together in those that follow."""
    rows = []
    for block in blocks:
        rows += block
        yield from rng.sample(block, len(block))
    while True:
        yield from rng.sample(rows, len(rows))


def rows_of(turns, encode, policy):
    """[(prompt ids, response ids)], with the end token that tells the policy to stop. turns: [(what `encode` takes, response text)]."""
    rows = []
    for start in range(0, len(turns), 1000):
        shown, written = zip(*turns[start : start + 1000])
        texts = policy.tokenizer(list(written), add_special_tokens=False)["input_ids"]
        rows += [(prompt, text + [policy.tokenizer.eos_token_id]) for prompt, text in zip(encode(list(shown)), texts)]
    return rows


def demonstrated(blocks, config, policy, embed, accelerator):
    """Yields the rows of each block of tasks: the turns of the scripted demonstrations whose score is good enough."""
    for number, tasks in enumerate(blocks):
        episodes = demonstrate(tasks, config, embed, policy.count, quiet=not accelerator.is_main_process)
        kept = [episode for episode in episodes if episode.reward >= config.keep_score]
        if number == 0:
            accelerator.print(f"the first {len(episodes)} demonstrations: mean score {summarize(tally(episodes))['reward']:.3f}; {len(kept)} kept")
        if turns := [(turn.observation, turn.response.text) for episode in kept for turn in episode.turns]:
            yield rows_of(turns, policy.encode, policy)


def lessons_to_learn(config, policy, stream, embed, accelerator):
    """[(share of the steps, blocks of rows)]: of config.demonstrations, or of scripted ones, which are played when their turn comes.

    The first block of each is made at once: BadInput, before any training, if there is none.
    """
    if config.demonstrations:
        rows = rows_of(recorded(config), policy.frame, policy)
        longest = max((len(prompt) for prompt, _ in rows), default=0)
        if longest > config.max_prompt_tokens:
            raise BadInput(f"{config.demonstrations}: a prompt of {longest} tokens is over --max_prompt_tokens {config.max_prompt_tokens}")
        accelerator.print(f"{len(rows)} rows from {config.demonstrations}")
        taught = [(1.0, iter([rows] if rows else []))]
    else:
        taught = [(share, demonstrated(blocks, config, policy, embed, accelerator)) for share, blocks in lessons(config, stream)]
    begun = []
    for share, blocks in taught:
        first = next(blocks, None)
        if not first:
            raise BadInput(f"no demonstration reached --keep_score {config.keep_score}: nothing to learn from (questions of a saved set "
                           "that have no \"support\" cannot be demonstrated by a script: use a --teacher)")
        begun.append((share, itertools.chain([first], blocks)))
    return begun


# --- the trainer ---------------------------------------------------------------------------------------------------


def update(wrapped, rows, tokens, optimizers, accelerator, config):
    """One optimiser step on `rows`, this process's; `tokens` is the number of response tokens of all. Returns metrics, also of all."""
    sums = {"loss": 0.0, "sure": 0}
    for batch in parallel.shared_batches(accelerator, wrapped, rows, config):
        logprobs, _ = wrapped(batch)  # (N,)
        (-logprobs.sum() * accelerator.num_processes / tokens).backward()
        sums["loss"] -= logprobs.sum().item()
        sums["sure"] += (logprobs > math.log(0.5)).sum().item()
    norm = clip_and_step(wrapped, optimizers, config.max_grad_norm)
    sums = parallel.total(accelerator, sums)
    return {"loss": sums["loss"] / tokens, "sure": sums["sure"] / tokens, "grad_norm": norm}


def teach(config, name):
    """Write the demonstrations of a stronger model, which may be stopped and started again."""
    check_one_process("sft.py --teacher")
    if not config.demonstrations:
        raise BadInput("--teacher needs --demonstrations FILE, where its episodes are to be written")
    check_new_file("--demonstrations", config.demonstrations, overwrite=True)  # one that is there is gone on with
    device = Accelerator(cpu=config.cpu).device
    teacher = open_player(name, config, device)
    stream, embed = load_tasks(config, "train", teacher.count), load_embedder(config.embedder, device)
    check_prompts(teacher, [stream(0)], config)
    scores = record(teacher, name, stream, config, embed)
    print(f"{len(scores)} episodes, {sum(score >= config.keep_score for score in scores)} of them kept, in {config.demonstrations}; "
          f"next: python sft.py --demonstrations {config.demonstrations}, with the model to train")


def main():
    config, extra = parse_args("Supervised fine-tuning on demonstrations.", extra=[
        RESUME, ("--teacher", dict(metavar="MODEL", help="let this model, a hub name, a folder or (with --endpoint) a server's, play the "
                                   "training tasks, write that to --demonstrations, and do nothing else"))])
    if extra["teacher"]:
        return teach(config, extra["teacher"])
    run = Run(config, "sft", extra["resume"])
    run.begin_from(config.model)
    accelerator = run.accelerator
    policy = open_policy(str(run.checkpoint or config.model), config)
    embed = load_embedder(config.embedder, accelerator.device)
    stream = load_tasks(config, "train", policy.count)
    held_out = held_out_tasks(config, "dev", min(100, config.eval_tasks), policy.count)
    check_prompts(policy, held_out, config)
    taught = lessons_to_learn(config, policy, stream, embed, accelerator)
    wrapped = parallel.distribute(accelerator, policy)
    optimizers = make_optimizers(policy, config.sft_lr, config.optimizer)
    run.begin(policy, optimizers)
    for step, batch in zip(run.steps(config.sft_steps), itertools.islice(batches(taught, config), run.step, None)):
        started = time.perf_counter()
        factor = schedule(step, config.sft_steps, warmup=config.sft_steps // 10, decay=0.6)
        scale_lr(optimizers, factor)
        metrics = update(wrapped, parallel.share(accelerator, batch), sum(len(response) for _, response in batch), optimizers,
                         accelerator, config)
        bad_steps = count_bad_steps(run.metrics.get("bad_steps", 0), [metrics["grad_norm"]])
        seconds, trained_on = time.perf_counter() - started, sum(len(prompt) + len(response) for prompt, response in batch)
        metrics |= {"lr": factor * config.sft_lr, "bad_steps": bad_steps, "seconds": seconds, "tokens_per_second": trained_on / seconds}
        if step == config.sft_steps:
            player = parallel.rollout_policy(accelerator, policy)
            metrics["held_out_em"] = parallel.held_out_em(accelerator, player, held_out, config, embed)
        run.log(metrics)
    run.finish(config.sft_steps, f"python grpo.py --name {config.name}")


if __name__ == "__main__":
    main()
