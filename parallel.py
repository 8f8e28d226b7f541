"""Training in many processes: DDP, or FSDP2 where accelerate's configuration asks for it.

    accelerate launch --num_processes 8 grpo.py                                 DDP, on 8 GPUs
    accelerate launch --config_file fsdp.yaml --num_processes 8 grpo.py --preset paper --data FILE    weights sharded over 8
    torchrun --nproc_per_node 2 grpo.py                                         DDP, on a CPU

Every process knows all the tasks of a step and takes its share of them; a group stays together, and its rollouts need nobody.
Then all meet in the same number of forward and backward passes: a process that has fewer micro-batches, or none, goes through
IDLE ones. DDP and FSDP2 average gradients over the processes; their losses are multiplied by the number of processes and divided
by the response tokens of all, so that loss and gradient are those of one process with all the rows.

FSDP2 shards the weights inside the policy, so a forward pass gathers them layer by layer. To sample so would gather all of them
for every token. Rollouts use a whole copy of the model in each process instead, in bf16 on a GPU, refreshed after each step. So do
those of any pretrained model on a GPU, sharded or not: 2 bytes a parameter.
On paper, with the settings of --preset paper and Qwen3-8B (8.2e9 parameters), each of 8 GPUs holds

    always          shards of the fp32 weights 4.1 GB, of their gradients 4.1, of AdamW's two moments 8.2; the copy 16.4;
                    the embedder 2.4
    in rollouts     the cache, 0.15 MB a token: 24 GB for 8 rows (--sample_rows) of 20,480 tokens; with flash-attention
                    20 GB of pages (sampling.CACHE_SHARE), which stay in training
    in training     embedding and head gathered 2.5, their gradients before they are sharded 7.5; a row's layer inputs 6, one
                    recomputed layer 4.4 (--recompute; without it 7.8 MB a token, 159 GB for the longest row)

of its 80 GB (with --kl, the reference's 16.4 on top, pages no longer fit); and the machine, while the models load, 33 GB of main memory for each process, and 98 when the first one saves.
"""

import copy
import os

import torch
from accelerate.utils import gather_object
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from config import BadInput
from optim import micro_batches
from policy import LanguageModel, evaluate
from scoring import summarize, tally

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


def shared_batches(accelerator, wrapped, rows, config):
    """Yields micro_batches of this process's rows, and idle ones up to the largest number that any process has."""
    batches = micro_batches(rows, config.micro_batch_tokens)
    batches += [[IDLE]] * (max(gather(accelerator, len(batches))) - len(batches))
    for number, batch in enumerate(batches, start=1):
        if isinstance(wrapped, DistributedDataParallel):  # gradients add up in each process, and meet in the last backward pass
            wrapped.require_backward_grad_sync = number == len(batches)
        yield batch


def sharding():
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def rollout_dtype(accelerator):
    """Of whole models beside a sharded one: that in which its layers compute."""
    return torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32


def distribute(accelerator, policy):
    """Move `policy` to the device and return what is called in training: with one process itself, else DDP's wrapper or,
    with accelerate's configuration fsdp.yaml, itself, sharded in place. Make its optimisers after that.

    BadInput if the configuration asks for FSDP1, or the model is built in another way than most.
    """
    if not sharding():
        policy.to(accelerator.device)
        return accelerator.prepare(policy)
    if os.environ.get("FSDP_VERSION") != "2":
        raise BadInput("accelerate's configuration asks for FSDP1; set fsdp_version: 2, as in fsdp.yaml")
    layers = getattr(policy.model.get_decoder(), "layers", None)
    if layers is None:
        raise BadInput(f"{type(policy.model).__name__} keeps its layers where they are not found, and cannot be sharded")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    mixed = MixedPrecisionPolicy(param_dtype=rollout_dtype(accelerator), reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    return fully_shard(policy, mesh=mesh, mp_policy=mixed)  # embedding, last norm, head


def rollout_policy(accelerator, policy):
    """The policy to sample with: `policy` itself or, if that is sharded or a pretrained one on a GPU, a whole copy in bf16, for
    `refresh` to keep up to date: autocast would convert all weights of an fp32 one for every token.
    """
    if not (sharding() or policy.config.model and accelerator.device.type == "cuda"):
        return policy
    with accelerator.device:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(policy.model.config), dtype=rollout_dtype(accelerator))
    model.generation_config = policy.model.generation_config
    player = LanguageModel(model.eval(), policy.tokenizer, policy.config).requires_grad_(False)
    refresh(player, policy)
    return player


def frozen(accelerator, policy):
    """A whole `policy` on the device that is only read: the KL term's reference. In bf16 on a GPU where training is sharded."""
    if sharding():
        for parameter in policy.parameters():  # and not the buffers: rotary embeddings need fp32
            parameter.data = parameter.data.to(rollout_dtype(accelerator))
    return policy.to(accelerator.device).requires_grad_(False)


def held_out_em(accelerator, player, tasks, config, embed):
    """Exact match over the questions of `tasks`, of which each process plays its share."""
    return summarize(total(accelerator, tally(evaluate(player, share(accelerator, tasks), config, embed))))["em"]


@torch.no_grad()
def refresh(player, policy):
    """Bring the weights of `policy` into rollout_policy's copy, one matrix at a time. A meeting."""
    if player is policy:
        return
    if sharding():
        policy.reshard()  # a forward pass may have left embedding and head gathered
    for own, trained in zip(player.parameters(), policy.parameters(), strict=True):
        part = trained.to(own.dtype)
        own.copy_(part.full_tensor() if isinstance(part, DTensor) else part)


def whole(tensor, keep):
    """A sharded tensor put together (a meeting), on the CPU, or None if not `keep`; any other value as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def training_state(policy, optimizers, keep):
    """(state dictionary of the model, [that of each optimiser]), put together where sharded, if this process is to `keep` them.

    A meeting.
    """
    seen = {}  # tied weights stay one tensor
    weights = {name: seen.setdefault(id(value), whole(value.detach(), keep))
               for name, value in policy.model.state_dict(keep_vars=True).items()}
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
