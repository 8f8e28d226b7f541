"""What both trainers do with a gradient: optimisers, learning rate, clipping, micro-batches."""

import math

import torch
from torch.distributed.tensor import DTensor

from policy import LanguageModel, Sample


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum, orthogonalized before it is applied.

    The same as torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and no weight decay, but in
    fp32. torch's version computes in bf16, which is slow on most CPUs.
    """

    def __init__(self, params, momentum: float = 0.95):
        super().__init__(params, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                average = self.state[parameter]["momentum_buffer"]
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]))
                scale = 0.2 * math.sqrt(max(parameter.shape))  # as large as AdamW's updates
                parameter.add_(update, alpha=-scale * group["lr"])


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T, by Newton-Schulz iteration. Same shape."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT.contiguous() if tall else matrix  # wide, so that the products below are small
    x = x / x.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(5):  # a quintic that drives the singular values towards 1
        gram = x @ x.mT  # (rows, rows)
        update = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, update, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(policy: LanguageModel, kind: str) -> list[torch.optim.Optimizer]:
    """Optimisers that cover all parameters, without weight decay. set_lr sets their rates.

    'muon': Muon for the matrices inside the blocks, AdamW at 0.3 of the learning rate for
    embeddings, head and norms. 'adamw': AdamW for everything.
    """
    tables = {id(one.weight) for one in policy.modules() if isinstance(one, torch.nn.Embedding)}
    tables.add(id(policy.model.get_output_embeddings().weight))
    matrices, others = [], []
    for parameter in filter(lambda one: one.requires_grad, policy.parameters()):
        inner = kind == "muon" and parameter.ndim == 2 and id(parameter) not in tables
        (matrices if inner else others).append(parameter)
    group = {"params": others, "lr_scale": 0.3 if matrices else 1.0}
    optimizers = [torch.optim.AdamW([group], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon([{"params": matrices, "lr_scale": 1.0}]))
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float):
    """Set the learning rate of every parameter group, times its lr_scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor on the peak learning rate at `step`, 1 to `steps`: linear warm-up, constant, then
    linear to 0 over the last share `decay` of the steps.

    >>> [lr_factor(step, 10, warmup=2, decay=0.5) for step in (1, 2, 5, 6, 8, 10)]
    [0.5, 1.0, 1.0, 1.0, 0.6, 0.2]
    """
    falling = (steps + 1 - step) / (decay * steps) if decay else 1.0
    return min(1.0, step / max(1, warmup), falling)


def clip_and_step(policy, optimizers: list[torch.optim.Optimizer], max_norm: float) -> float:
    """Clip the gradient, step if it is finite, then zero it. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm


def count_bad_steps(before: dict[str, float], now: dict[str, float]) -> int:
    """The number of steps in a row, up to now, whose gradient was not finite. before, now: the
    metrics of the last step and of this one. Raises SystemExit at 3."""
    finite = math.isfinite(now.get("grad_norm", 0.0))  # a step without an update has no norm
    bad = 0 if finite else int(before.get("bad_steps", 0)) + 1
    if bad == 3:
        raise SystemExit(
            "the gradient was not finite in 3 steps in a row, so the run stops. Such updates are "
            "skipped, and the checkpoints are intact. A lower learning rate may help"
        )
    return bad


def micro_batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Split into batches of at most `max_tokens` tokens each, padding included.

    Samples of similar length go together. The longest come first, so that running out of memory
    shows at once. Equal samples are neighbours and count once, because they are read once.
    """
    batches, width, unique, last = [], 0, 0, None
    for sample in sorted(samples, key=lambda s: (-len(s.prompt_ids) - len(s.response_ids), s.key)):
        new = sample.key != last
        if not batches or (new and width * (unique + 1) > max_tokens):
            batches.append([])
            width, unique, new = len(sample.prompt_ids) + len(sample.response_ids), 0, True
        batches[-1].append(sample)
        unique, last = unique + new, sample.key
    return batches
