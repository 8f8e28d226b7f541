"""A pretended GPU: tests on a CPU notice a tensor that was not moved.

Its tensors keep their data on the CPU but say that they are on another device. As on a GPU, an
operation on tensors of two devices raises RuntimeError. The kernels, bf16 and memory of a real GPU
are not tested here.
"""

from dataclasses import replace

import numpy as np
import parallel_worker
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_policy
from test_encoder import TEXTS, encoder
from test_policy import observations, to_samples
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from memory import load_embedder
from policy import LanguageModel
from training import distributed
from training.optim import clip_and_step, make_optimizers, set_lr

DEVICE = torch.device("meta")  # the only one besides the CPU that every build of PyTorch has
aten = torch.ops.aten


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device."""

    def __new__(cls, data: torch.Tensor):
        layout = data.shape, data.stride(), data.storage_offset()
        return torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=data.dtype, device=DEVICE)

    def __init__(self, data: torch.Tensor):
        self.content = data

    def tolist(self):
        return self.content.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Sees the functions that create or copy tensors as well."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Constructor(TorchFunctionMode):
    """torch.tensor does not pass through a TorchDispatchMode, so make it on the CPU and move it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is not torch.tensor:
            return function(*args, **kwargs)
        device = kwargs.pop("device", None)
        return torch.tensor(*args, **kwargs).to(device or "cpu")


def run(function, args, kwargs):
    """Call one of PyTorch's functions on the content of the tensors."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    moved = [one for one in tensors if isinstance(one, Elsewhere)]
    left = [one for one in tensors if not isinstance(one, Elsewhere) and one.dim()]
    if moved and left and function not in (aten._to_copy.default, aten.copy_.default):
        raise RuntimeError(f"{function} of tensors on two devices")
    target = args[0].device if function is aten.copy_.default else kwargs.get("device")
    is_moved = bool(moved) if target is None else torch.device(target) == DEVICE
    owners = {id(one.content): one for one in moved}  # an in-place function returns its argument

    def enter(one):
        if isinstance(one, torch.device):
            return torch.device("cpu")
        return one.content if isinstance(one, Elsewhere) else one

    def leave(one):
        wrap = is_moved and isinstance(one, torch.Tensor) and id(one) not in owners
        return Elsewhere(one) if wrap else owners.get(id(one), one)

    return tree_map(leave, function(*tree_map(enter, args), **tree_map(enter, kwargs)))


@pytest.fixture
def device(monkeypatch):
    """The pretended device, on which the test runs."""
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    no_cast = torch.autocast("cpu", enabled=False)  # there is no autocast for this device
    monkeypatch.setattr(LanguageModel, "autocast", lambda self: no_cast)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to() makes new ones
    with Constructor(), Pretend():
        yield DEVICE
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_two_devices_are_noticed(device):
    """Bug: the pretended device lets everything pass."""
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2).to(device) + torch.ones(2)
    assert (torch.ones(2, device=device) * 2).sum().item() == 4
    assert type(torch.ones(2).to(device).cpu()) is torch.Tensor


def one_step(device) -> list[torch.Tensor]:
    """The weights after a step of both optimisers."""
    policy = tiny_policy().to(device)
    optimizers = make_optimizers(policy, "muon")
    set_lr(optimizers, 1e-3)
    policy(to_samples(policy.respond(observations(2))))[0].sum().backward()
    clip_and_step(policy, optimizers, 1.0)
    return [p.detach() for p in policy.parameters()]


@pytest.fixture
def expected():
    """What a CPU computes: responses, the results of two GRPO updates, and one_step's weights."""
    responses = tiny_policy().respond(observations(6))
    return responses, parallel_worker.two_updates(Accelerator(cpu=True), 9), one_step("cpu")


def test_sampling_and_training_stay_on_the_device(expected, device):
    """Bug: a tensor is made on the CPU and not moved, which fails on a GPU only."""
    responses, updates, weights = expected
    moved = tiny_policy().to(device).respond(observations(6))
    assert [one.ids for one in moved] == [one.ids for one in responses]
    again = parallel_worker.two_updates(Accelerator(cpu=True), 9)
    for mine, theirs in zip(again["metrics"], updates["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    found = [*again["gradients"], *again["weights"], *one_step(device)]
    theirs = [*updates["gradients"], *updates["weights"], *weights]
    for one, other in zip(found, theirs, strict=True):
        assert one.device == device and torch.allclose(one.cpu(), other, atol=1e-6)


def test_a_bf16_copy_is_on_the_device(device):
    """Bug: the copy that a pretrained model is sampled from, or one of its buffers, is left on the
    CPU."""
    policy = tiny_policy().to(device)
    policy.config = replace(policy.config, model="a pretrained one", bf16=True)
    rollout_model = distributed.make_rollout_model(policy, Accelerator(cpu=True))
    pairs = zip(rollout_model.parameters(), policy.parameters(), strict=True)
    assert all(torch.equal(copied, weight.to(torch.bfloat16)) for copied, weight in pairs)
    assert all(one.device == device for one in rollout_model.buffers())


@pytest.fixture
def embedder(tmp_path):
    """An encoder on the CPU, and its vectors of TEXTS."""
    one = load_embedder(encoder(tmp_path, causal=True))
    return one, one(TEXTS)


def test_the_encoder_stays_on_the_device(embedder, device):
    """Bug: a batch of texts, or an index into the states, is left on the CPU."""
    moved, vectors = embedder
    moved.model, moved.device = moved.model.to(device), device
    np.testing.assert_allclose(moved(TEXTS), vectors, atol=1e-6)
