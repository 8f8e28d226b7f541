"""What test_parallel.py runs in two processes: parallel_worker.py ddp, or parallel_worker.py fsdp.

One launch makes several runs, because starting a process takes seconds. Results are written into
the working directory.
"""

import gc
import os
import random
import shutil
import sys
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from conftest import TINY, Recorder, tiny_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import grpo
import sft
from agent import Episode
from config import Config
from policy import Sample
from training import distributed


def random_samples(number: int, seed: int) -> list[Sample]:
    """Samples of very different lengths. The long ones begin alike, so that batches share it."""
    rng = random.Random(seed)

    def ids(most):
        return [rng.randrange(20, 90) for _ in range(rng.randint(1, most))]

    samples = []
    for index in range(number):
        common = [*range(20, 90)] if index % 3 == 0 or number == 1 else []
        prompt, response = common + ids(60), ids(15)
        logprobs = [-rng.random() for _ in response]
        samples.append(Sample(prompt, response, logprobs, rng.uniform(-1, 1)))
    return samples


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def two_updates(accelerator: Accelerator, number: int, seed: int = 0) -> dict:
    """Metrics, gradients and weights after two GRPO updates on `number` samples, with a KL term."""
    config = Config(kl=0.1, micro_batch_tokens=300, max_grad_norm=0.3)
    policy = tiny_policy(seed)
    reference = tiny_policy(seed + 1).requires_grad_(False).to(accelerator.device)
    everything = random_samples(number, seed)
    samples = distributed.shard(everything, accelerator)
    model = distributed.distribute(policy, accelerator)
    optimizer = Recorder(policy.parameters(), lr=0.1)
    rollout_model = distributed.make_rollout_model(policy, accelerator)
    samples = grpo.with_old_logprobs(model, samples, accelerator, config)
    num_tokens = sum(len(sample.response_ids) for sample in everything)
    metrics = [
        grpo.grpo_step(model, reference, samples, num_tokens, [optimizer], accelerator, config)
        for _ in range(2)
    ]
    distributed.sync_weights(rollout_model, policy)
    weights = [whole(p.detach()) for p in policy.parameters()]
    copied = [p.detach() for p in rollout_model.parameters()]
    assert all(torch.equal(*pair) for pair in zip(copied, weights, strict=True))
    gradients = [whole(gradient) for gradient in optimizer.gradients]
    accelerator.free_memory()
    return {"metrics": metrics, "weights": weights, "gradients": gradients}


def made_up_reward(episode) -> float:
    """An untrained policy scores 0 everywhere, and equal rewards train nothing."""
    return sum(turn.response.tokens for turn in episode.turns) % 5 / 4


def main_of(script, *arguments):
    """Run a script, but keep the process group for the next one. A DDP wrapper that is still alive
    when the group is destroyed can wait forever for one of the group's threads."""

    def end_training(accelerator):
        wrappers = [one for one in gc.get_objects() if type(one) is DistributedDataParallel]
        assert not wrappers, "a DDP wrapper outlives the process group"

    argv = [f"{script.__name__}.py", *map(str, arguments)]
    with patch("sys.argv", argv), patch.object(Accelerator, "end_training", end_training):
        script.main()


def sums_or_fail(*arguments, count=grpo.rollout_sums):
    """grpo.rollout_sums, but the second process finds a fault. The first one continues, to the next
    collective call."""
    if os.environ["RANK"] == "1":
        raise SystemExit("the second process has found a fault")
    return count(*arguments)


def ddp():
    """two_updates with DDP and with FSDP2, SFT, and GRPO where the second process has no task."""
    accelerator, results = Accelerator(cpu=True), {}
    for sharded in ("true", "false"):
        os.environ |= {"ACCELERATE_USE_FSDP": sharded, "FSDP_VERSION": "2"}
        for number in (9, 1):
            results[sharded, number] = two_updates(accelerator, number)
    if accelerator.is_main_process:
        torch.save(results, "results.pt")
    main_of(sft, *TINY)
    with patch.object(Episode, "reward", property(made_up_reward)):
        main_of(grpo, *TINY, "--tasks_per_step", 1)
    accelerator.end_training()


def fsdp():
    """SFT, its last step again by --resume, GRPO, and GRPO with a fault in the second process."""
    main_of(sft, *TINY)
    if PartialState().is_main_process:
        shutil.copytree("runs/town/sft", "runs/resumed/sft")
        shutil.rmtree("runs/resumed/sft/step-000004")  # as if it had been killed in step 4
    PartialState().wait_for_everyone()
    main_of(sft, "--resume", "runs/resumed/sft")
    with patch.object(Episode, "reward", property(made_up_reward)):
        main_of(grpo, *TINY, "--kl", 0.1, "--updates_per_rollout", 2)
    with patch("grpo.rollout_sums", sums_or_fail):
        main_of(grpo, *TINY, "--overwrite", "--name", "fault", "--from", "runs/town/sft")


if __name__ == "__main__":
    {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]]()
