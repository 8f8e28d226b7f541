"""Training in many processes: DDP, or FSDP2 where accelerate's configuration asks for it.

    accelerate launch --num_processes 8 grpo.py                                           DDP, on 8 GPUs
    accelerate launch --config_file fsdp.yaml --num_processes 8 grpo.py --preset paper    weights sharded over 8 GPUs
    torchrun --nproc_per_node 2 grpo.py                                                   DDP, on a CPU

Every process knows all the tasks of a step and takes its share of them; a group stays together, and its rollouts need nobody.
Then all meet in the same number of forward and backward passes: a process that has fewer micro-batches, or none, goes through
IDLE ones. DDP and FSDP2 average gradients over the processes; their losses are multiplied by the number of processes and divided
by the response tokens of all, so that loss and gradient are those of one process with all the rows.

FSDP2 shards the weights inside the policy, so a forward pass gathers them layer by layer. To sample so would gather all of them
for every token. Rollouts use a whole copy of the model in each process instead, in bf16 on a GPU, refreshed after each step.
On paper, for Qwen3-8B (8.2e9 parameters) on 8 GPUs of 80 GB, each holds: shards of the fp32 weights 4.1 GB, their gradients
4.1, AdamW's two moments 8.2; the copy 16.4; together 33 GB. A layer's gathered weights are 0.4 GB, embedding and head 2.5. The
rest is for activations and, in rollouts, the cache: 0.15 MB a token, 3 GB for a row of 20,480 tokens (`--sample_rows`).
"""

import os

import torch
from accelerate.utils import gather_object
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from agent import summarize, tally
from config import BadInput
from policy import LanguageModel, evaluate, micro_batches

# A row, as in grpo.training_rows, without response tokens: it adds nothing to any sum.
IDLE = ([0], [], [], 0.0, torch.empty(0))


def share(accelerator, items):
    """This process's part of a list that all processes have."""
    return items[accelerator.process_index :: accelerator.num_processes]


def gather(accelerator, value):
    """[the value that each process gives], in all of them. A meeting: every process must call it."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def total(accelerator, counts):
    """The sums over the processes of a dictionary of numbers."""
    every = gather(accelerator, counts)
    return {name: sum(one[name] for one in every) for name in counts}


def shared_batches(accelerator, rows, config):
    """micro_batches of this process's rows, with idle ones up to the largest number that any process has."""
    batches = micro_batches(rows, config.micro_batch_tokens)
    return batches + [[IDLE]] * (max(gather(accelerator, len(batches))) - len(batches))


def sharding():
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def rollout_dtype(accelerator):
    """Of whole models beside a sharded one: that in which its layers compute."""
    return torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32


def distribute(accelerator, policy):
    """Move `policy` to the device and return what is called in training: with one process itself, else DDP's wrapper or,
    with accelerate's configuration fsdp.yaml, itself, sharded in place. Make its optimisers after that.

    BadInput if the configuration asks for FSDP1.
    """
    if not sharding():
        policy.to(accelerator.device)
        return accelerator.prepare(policy)
    if os.environ.get("FSDP_VERSION") != "2":
        raise BadInput("accelerate's configuration asks for FSDP1; set fsdp_version: 2, as in fsdp.yaml")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    mixed = MixedPrecisionPolicy(param_dtype=rollout_dtype(accelerator), reduce_dtype=torch.float32)
    for layer in policy.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    return fully_shard(policy, mesh=mesh, mp_policy=mixed)  # embedding, last norm, head


def rollout_policy(accelerator, policy):
    """The policy to sample with: `policy` itself or, if that is sharded, a whole copy, for `refresh` to keep up to date."""
    if not sharding():
        return policy
    with accelerator.device:
        model = AutoModelForCausalLM.from_config(policy.model.config, dtype=rollout_dtype(accelerator))
    model.generation_config = policy.model.generation_config
    copy = LanguageModel(model.eval(), policy.tokenizer, policy.config).requires_grad_(False)
    refresh(copy, policy)
    return copy


def frozen(accelerator, policy):
    """A whole `policy` on the device that is only read: the KL term's reference. In bf16 on a GPU where training is sharded."""
    return policy.to(accelerator.device, rollout_dtype(accelerator) if sharding() else None).requires_grad_(False)


def held_out_em(accelerator, player, tasks, config, embed):
    """Exact match over the questions of `tasks`, of which each process plays its share."""
    return summarize(total(accelerator, tally(evaluate(player, share(accelerator, tasks), config, embed))))["em"]


@torch.no_grad()
def refresh(copy, policy):
    """Bring the weights of `policy` into rollout_policy's copy, one matrix at a time. A meeting."""
    if copy is not policy:
        for own, shard in zip(copy.parameters(), policy.parameters(), strict=True):
            own.copy_(shard.full_tensor())


def whole(tensor, keep):
    """A sharded tensor put together (a meeting), on the CPU, or None if not `keep`; any other value as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def training_state(policy, optimizers, keep):
    """(state dictionary of the model, [that of each optimiser]), put together where sharded. `keep`: whether this process
    wants them. A meeting."""
    weights = {name: whole(value, keep) for name, value in policy.model.state_dict().items()}
    states = [optimizer.state_dict() for optimizer in optimizers]
    for state in states:
        state["state"] = {number: {name: whole(value, keep) for name, value in values.items()}
                          for number, values in state["state"].items()}
    return weights, states


def load_optimizer(optimizer, state):
    """Take up one of training_state's, sharded as the weights are: the number of processes may be another one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        like = parameters[number]
        for name, value in values.items():
            if isinstance(like, DTensor) and value.shape == like.shape:
                values[name] = distribute_tensor(value, like.device_mesh, like.placements)
    optimizer.load_state_dict(state)
