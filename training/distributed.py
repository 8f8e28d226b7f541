"""Training in many processes: DDP, or FSDP2 if accelerate's configuration asks for it.

    accelerate launch --num_processes 8 grpo.py                              DDP on 8 GPUs
    accelerate launch --config_file fsdp.yaml --num_processes 8 grpo.py ...  sharded over 8 GPUs
    torchrun --nproc_per_node 2 grpo.py                                      DDP on a CPU

A process plays whole groups. All processes do the same number of passes: one with fewer
micro-batches adds IDLE ones. DDP and FSDP2 average gradients, so each loss is multiplied by the
number of processes and divided by all response tokens. This gives the gradient of one process.
FSDP2 would gather all weights for every sampled token, so each process samples from a full copy.
"""

import copy
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from agent import run_episodes
from config import Config, need
from memory import load_embedder
from policy import LanguageModel, Sample, auto_class, compute_dtype
from tasks import Task
from tasks.scoring import score_function, summarize, tally
from training.optim import micro_batches

IDLE = Sample([0], [])  # no response tokens, so it adds nothing to any sum


def shard(items: list | range, accelerator: Accelerator) -> list:
    """This process's part of `items`. `items` is the same in all processes."""
    return list(items[accelerator.process_index :: accelerator.num_processes])


def all_reduce_sum(values: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Collective: the sum of each value over all processes."""
    if accelerator.num_processes == 1:
        return values
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(numbers, "sum").tolist()))


def all_reduce_max(value: float, accelerator: Accelerator) -> float:
    """Collective: the largest value of all processes, NaN if one of them has NaN."""
    number = torch.tensor([value], dtype=torch.float32, device=accelerator.device)
    return accelerator.gather(number).max().item()


def shared_batches(
    model: torch.nn.Module, samples: list[Sample], max_tokens: int, accelerator: Accelerator
) -> Iterator[list[Sample]]:
    """Collective: yields this process's micro-batches, then idle ones until all have as many."""
    batches = micro_batches(samples, max_tokens)
    number = int(all_reduce_max(len(batches), accelerator))
    batches += [[IDLE]] * (number - len(batches))
    for index, batch in enumerate(batches, start=1):
        if isinstance(model, DistributedDataParallel):  # reduce the gradients once, at the end
            model.require_backward_grad_sync = index == number
        yield batch


def is_sharded() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def distribute(policy: LanguageModel, accelerator: Accelerator) -> torch.nn.Module:
    """Prepare `policy` for training on the device. Returns the module to call in training: the
    policy itself, or its DDP wrapper. FSDP2 shards the policy in place.

    Make the optimisers after this. Raises BadInput for FSDP1 or a model without a layer list.
    """
    if not is_sharded():
        policy.to(accelerator.device)
        return accelerator.prepare(policy)
    need(os.environ.get("FSDP_VERSION") == "2", "FSDP1 is not supported: set fsdp_version: 2")
    layers = getattr(policy.model.get_decoder(), "layers", None)
    need(layers is not None, f"{type(policy.model).__name__} has no list of layers to shard")
    policy.share_prefix = False  # all processes have to run the layers equally often
    # accelerate's own FSDP plugin runs on GPUs only; torch's function runs on a CPU as well.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    dtype = compute_dtype(policy.config, accelerator.device)
    precision = MixedPrecisionPolicy(dtype, torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)  # embedding, last norm, head


def make_rollout_model(policy: LanguageModel, accelerator: Accelerator) -> LanguageModel:
    """The model to sample from: `policy` itself, or a full copy that sync_weights refreshes.

    A copy is needed if the policy is sharded, and for a pretrained model that computes in bf16:
    autocast would convert all fp32 weights for every token.
    """
    dtype = compute_dtype(policy.config, accelerator.device)
    if not is_sharded() and not (policy.config.model and dtype == torch.bfloat16):
        return policy
    config = copy.deepcopy(policy.model.config)
    with accelerator.device:
        model = auto_class(config).from_config(config, dtype=dtype)
    model.generation_config = policy.model.generation_config
    rollout_model = LanguageModel(model, policy.tokenizer, policy.config)
    rollout_model.requires_grad_(False)
    for copied, loaded in zip(model.buffers(), policy.model.buffers(), strict=True):
        copied.copy_(loaded)  # some are learned, such as Gemma 4's layer_scalar
    sync_weights(rollout_model, policy)
    return rollout_model


@torch.no_grad()
def sync_weights(rollout_model: LanguageModel, policy: LanguageModel):
    """Collective: copy the weights of `policy` into the rollout copy, one tensor at a time."""
    if rollout_model is policy:
        return
    if is_sharded():
        policy.reshard()  # a forward pass may have left embedding and head gathered
    for copied, trained in zip(rollout_model.parameters(), policy.parameters(), strict=True):
        weight = trained.to(copied.dtype)
        copied.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)


def held_out_em(
    rollout_model: LanguageModel, tasks: list[Task], config: Config, accelerator: Accelerator
) -> float:
    """Collective: exact match over all questions of `tasks`, at the evaluation temperature."""
    policy = rollout_model.with_config(config, config.eval_temperature)
    embed, score = load_embedder(config.embedder, accelerator.device), score_function(config)
    episodes = run_episodes(shard(tasks, accelerator), policy, config, embed, score)
    return summarize(all_reduce_sum(tally(episodes), accelerator))["em"]
