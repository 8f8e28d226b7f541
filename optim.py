"""What both trainers do with a gradient: optimisers, the learning rate, clipping, micro-batches."""

import math

import torch
from torch.distributed.tensor import DTensor


def make_optimizers(policy, lr, kind):
    """Optimisers that together cover all parameters, on fp32 master weights.

    'muon': torch's Muon for the matrices inside the blocks, with updates scaled to AdamW's size; AdamW for embeddings, head and
    norms, at 0.3 of the learning rate. 'adamw': AdamW alone. No weight decay.
    """
    embeddings = {id(module.weight) for module in policy.modules() if isinstance(module, torch.nn.Embedding)}
    embeddings.add(id(policy.model.get_output_embeddings().weight))
    matrices = [p for p in policy.parameters() if p.ndim == 2 and id(p) not in embeddings] if kind == "muon" else []
    chosen = {id(p) for p in matrices}
    others = [p for p in policy.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=0.3 * lr if matrices else lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
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

    Rows of similar length go together; the longest come first, so that running out of memory shows at once.
    """
    batches, width = [], 0
    for row in sorted(rows, key=lambda row: -len(row[0]) - len(row[1])):
        if not batches or width * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            width = len(row[0]) + len(row[1])  # the longest of this batch
        batches[-1].append(row)
    return batches
