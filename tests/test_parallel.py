"""Training in two processes: DDP and FSDP2 over gloo, on a CPU. See parallel_worker.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sft
from config import BadInput
from policy import load_policy
from training import distributed

TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2".split()
FSDP = "accelerate.commands.launch --num_processes 2 --main_process_port 0".split()
FSDP += ["--config_file", str(ROOT / "fsdp.yaml")]


def launch(launcher, kind, folder, seconds=120):
    """(exit status, output) of two parallel_workers in `folder`. Fails if they wait forever."""
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, parallel_worker.__file__, kind],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its two processes
        raise
    return process.returncode, out


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The folder and the output of a launch with torchrun."""
    folder = tmp_path_factory.mktemp("ddp")
    status, out = launch(TORCHRUN, "ddp", folder)
    assert status == 0, out[-8000:]
    return folder, out


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """The folder and the output of a launch with accelerate and fsdp.yaml. It ends with a fault."""
    folder = tmp_path_factory.mktemp("fsdp")
    status, out = launch(FSDP, "fsdp", folder)
    assert status != 0 and (folder / "runs/fault/grpo/config.json").exists(), out[-8000:]
    return folder, out


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sft_main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sft.py", *map(str, arguments)])
        sft.main()


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The losses of sft.py in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("one"))
        sft_main(*TINY)
        return [line["loss"] for line in metrics(Path("runs/town/sft"))]


def resume_in_one(run: Path, tmp_path: Path) -> list[float]:
    """The losses of a copy of `run` whose last step one process makes again."""
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/step-000004")  # as if it had been killed in step 4
    sft_main("--resume", tmp_path / "copy")
    return [line["loss"] for line in metrics(tmp_path / "copy")]


@pytest.mark.parametrize("sharded", ["false", "true"])
@pytest.mark.parametrize("number", [9, 1])
def test_two_processes_equal_one(ddp, sharded, number):
    """Bug: the processes' losses are averaged instead of summed over one denominator. Or the
    gradient forward bypasses the wrapper. Or a process with fewer micro-batches, or with none,
    leaves the other waiting."""
    two = torch.load(ddp[0] / "results.pt", weights_only=True)[sharded, number]
    one = parallel_worker.two_updates(Accelerator(cpu=True), number)
    for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-7)
    for name in ("gradients", "weights"):
        for mine, theirs in zip(one[name], two[name], strict=True):
            assert (mine - theirs).norm() <= 1e-5 * mine.norm()


def test_ddp_trains_as_one_process_does(ddp, losses):
    """Bug: two processes train on other batches, report other metrics, or write each line twice."""
    lines = metrics(ddp[0] / "runs/town/sft")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)


def test_a_process_without_a_task(ddp):
    """Bug: with fewer tasks than processes a step of GRPO fails, or one process waits forever. Or
    every process says that the run is finished."""
    folder, out = ddp
    lines = metrics(folder / "runs/town/grpo")
    assert [line["step"] for line in lines] == [1, 2] and any("loss" in line for line in lines)
    assert out.count("2 steps, saved in") == 1 and out.count("4 steps, saved in") == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_opens_and_resumes_what_two_have_saved(request, tmp_path, losses, kind):
    """Bug: a checkpoint of several processes holds shards of the weights, or serves only the same
    number of processes."""
    run = request.getfixturevalue(kind)[0] / "runs/town/sft"
    weights = load_file(run / "step-000004/model.safetensors")
    opened = dict(AutoModelForCausalLM.from_pretrained(run / "step-000004").named_parameters())
    assert opened.keys() == weights.keys()
    assert all(torch.equal(opened[name], weights[name]) for name in opened)
    assert resume_in_one(run, tmp_path) == pytest.approx(losses, rel=1e-4)


def test_a_sharded_run_is_resumed(fsdp, losses):
    """Bug: a sharded run does not train like one process, or loses the optimisers' shards."""
    run, resumed = fsdp[0] / "runs/town/sft", fsdp[0] / "runs/resumed/sft"
    assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-4)
    assert metrics(resumed)[3]["loss"] == metrics(run)[3]["loss"]
    again, weights = (load_file(one / "step-000004/model.safetensors") for one in (resumed, run))
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    lines = metrics(fsdp[0] / "runs/town/grpo")
    assert [line["step"] for line in lines] == [1, 2] and any("kl" in line for line in lines)


def test_a_fault_in_one_process(fsdp):
    """Bug: after a fault in one process the others wait for it, and nobody learns why."""
    assert "the second process has found a fault" in fsdp[1]


def test_a_reference_in_bf16_keeps_its_positions(tmp_path, tiny):
    """Bug: the KL reference is rounded to bf16 with its rotary frequencies, which makes it another
    model at far positions."""
    tiny.save(tmp_path)
    reference = load_policy(tmp_path, tiny.config, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in reference.parameters())
    before = list(tiny.buffers())
    assert before and all(torch.equal(*pair) for pair in zip(reference.buffers(), before))


def test_fsdp1_is_refused(monkeypatch, tiny):
    """Bug: accelerate's configuration for FSDP1 is taken for one of FSDP2."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(BadInput, match="fsdp_version: 2"):
        distributed.distribute(tiny, accelerator)
