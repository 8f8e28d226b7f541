"""What both trainers do with a gradient: optimisers, the learning rate, clipping, micro-batches."""

import math

import torch
from torch.distributed.tensor import DTensor


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum whose matrix is replaced by the nearest one with equal singular values.

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and no weight decay, but all matrices of one shape go through the
    Newton-Schulz iteration together, in fp32: torch's does one at a time in bf16, for which most CPUs have no fast product.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # (rows, columns), the smaller one first -> [(parameter, update)]
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                average = self.state[parameter]["momentum_buffer"]
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                alike.setdefault(tuple(sorted(parameter.shape)), []).append((parameter, update))
            for (rows, columns), pairs in alike.items():
                wide = [update if update.shape[0] == rows else update.mT for _, update in pairs]
                for (parameter, _), update in zip(pairs, orthogonalize(torch.stack(wide))):  # (rows, columns)
                    update = update if parameter.shape[0] == rows else update.mT
                    parameter.add_(update, alpha=-0.2 * math.sqrt(columns) * group["lr"])  # as large as AdamW's updates


def orthogonalize(matrices, steps=5):
    """U V^T, nearly, of each matrix U S V^T: five steps of a quintic that drives singular values to about 1. (n, rows <= columns)"""
    x = matrices / matrices.square().sum((1, 2), keepdim=True).sqrt().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizers(policy, lr, kind):
    """Optimisers that together cover all parameters, on fp32 master weights.

    'muon': Muon for the matrices inside the blocks; AdamW for embeddings, head and norms, at 0.3 of the learning rate. 'adamw':
    AdamW alone. No weight decay.
    """
    embeddings = {id(module.weight) for module in policy.modules() if isinstance(module, torch.nn.Embedding)}
    embeddings.add(id(policy.model.get_output_embeddings().weight))
    matrices = [p for p in policy.parameters() if p.ndim == 2 and id(p) not in embeddings] if kind == "muon" else []
    chosen = {id(p) for p in matrices}
    others = [p for p in policy.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=0.3 * lr if matrices else lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon(matrices, lr))
    return optimizers


def scale_lr(optimizers, factor):
    """Set the learning rates to `factor` times those of make_optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


def schedule(step, steps, warmup, decay):
    """Factor on the learning rate at `step`, 1 to `steps`: linear warm-up, constant, linear to 0 over the last share `decay`.

    >>> [schedule(step, 10, warmup=2, decay=0.5) for step in (1, 2, 5, 6, 8, 10)]
    [0.5, 1.0, 1.0, 1.0, 0.6, 0.2]
    """
    falling = (steps + 1 - step) / (decay * steps) if decay else 1.0
    return min(1.0, step / max(1, warmup), falling)


def clip_and_step(policy, optimizers, max_norm):
    """Clip the gradient, step and zero it. Returns its norm before clipping; a step with a non-finite one is left out."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # sharded weights have a sharded norm
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm


def count_bad_steps(before, norms):
    """How many steps in a row had a gradient that was not finite, given the number `before` this one. SystemExit at 3."""
    bad = 0 if all(map(math.isfinite, norms)) else before + 1
    if bad == 3:
        raise SystemExit("the gradient was not finite in 3 steps running, so the run stops; such steps leave the weights "
                         "alone, and the checkpoints are sound. A lower learning rate may help")
    return bad


def micro_batches(rows, max_tokens):
    """Split `rows` of (prompt ids, response ids, ...) into lists of at most `max_tokens`, padding included.

    Rows of similar length go together; the longest come first, so that running out of memory shows at once. Equal rows stand side
    by side and count once, since the policy reads and scores them once.
    """
    batches, width, distinct = [], 0, 0
    for row in sorted(rows, key=lambda row: (-len(row[0]) - len(row[1]), row[0], row[1])):
        new = not batches or row[:2] != batches[-1][-1][:2]
        if not batches or new and width * (distinct + 1) > max_tokens:
            batches.append([])
            width, distinct = len(row[0]) + len(row[1]), 0  # the longest of this batch
        batches[-1].append(row)
        distinct += new
    return batches


def numbered(keys):
    """{key: its number}, equal keys counted once, in order of appearance."""
    return {key: number for number, key in enumerate(dict.fromkeys(keys))}
