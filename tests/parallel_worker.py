"""What test_parallel.py runs in two processes, and in one to compare with: torchrun parallel_worker.py updates FILE; or, with grpo.py's flags, GRPO with
a fault."""

import os
import random
import sys

import torch
from accelerate import Accelerator
from conftest import Recorder, tiny_policy

import grpo
import parallel
from config import Config


def random_rows(number, seed):
    """Rows of grpo.training_rows, of very different lengths."""
    rng = random.Random(seed)

    def ids(most):
        return [rng.randrange(20, 90) for _ in range(rng.randint(1, most))]

    rows = [(ids(60), ids(15)) for _ in range(number)]
    return [(prompt, response, [-rng.random() for _ in response], rng.uniform(-1, 1)) for prompt, response in rows]


def two_updates(accelerator, number, seed=0):
    """Metrics, gradients and weights (as lists) after two updates on `number` rows, with all that a step can have."""
    config = Config(kl=0.1, micro_batch_tokens=150, max_grad_norm=0.3)
    policy, reference = tiny_policy(seed), parallel.frozen(accelerator, tiny_policy(seed + 1))
    everything = random_rows(number, seed)
    rows = parallel.share(accelerator, everything)
    wrapped = parallel.distribute(accelerator, policy)
    optimizer = Recorder(policy.parameters(), lr=0.1)
    player = parallel.rollout_policy(accelerator, policy)
    rows = grpo.with_old(wrapped, rows, accelerator, config)
    tokens = sum(len(row[1]) for row in everything)
    metrics = [grpo.update(wrapped, reference, rows, tokens, [optimizer], accelerator, config) for _ in range(2)]
    parallel.refresh(player, policy)
    weights = [parallel.whole(p.detach(), True) for p in policy.parameters()]
    assert all(torch.equal(own, weight) for own, weight in zip(player.parameters(), weights))
    return {"metrics": metrics, "weights": weights, "gradients": [parallel.whole(g, True) for g in optimizer.gradients]}


def fail_in_one(episodes, count=iter(range(100))):
    """In place of grpo.tally: the second process finds a fault in its second step, while the first goes on to a meeting."""
    if next(count) == 1 and os.environ["RANK"] == "1":
        raise SystemExit("the second process has found a fault")
    return grpo_tally(episodes)


def updates(file):
    """Save two_updates of both kinds of parallelism, with enough rows for both processes and with one row."""
    accelerator, results = Accelerator(cpu=True), {}
    for sharded in ("false", "true"):
        os.environ |= {"ACCELERATE_USE_FSDP": sharded, "FSDP_VERSION": "2"}
        for number in (9, 1):
            results[sharded, number] = two_updates(accelerator, number)
    if accelerator.is_main_process:
        torch.save(results, file)


if __name__ == "__main__":
    if sys.argv[1] == "updates":
        updates(sys.argv[2])
    else:  # grpo.py with a fault
        grpo_tally, grpo.tally = grpo.tally, fail_in_one
        grpo.main()
