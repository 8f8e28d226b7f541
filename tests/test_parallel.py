"""Training in two processes: DDP and FSDP2 over gloo, on a CPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import parallel
from config import BadInput

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "fsdp.yaml"), "--num_processes", "2", "--main_process_port", "0"]
WORKER = str(Path(parallel_worker.__file__))


def run(*arguments, folder, status=0, seconds=150):
    """A python command's output; a failure too if it waits for ever."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher passes it on
        raise
    assert (process.returncode == 0) == (status == 0), out[-4000:]
    return out


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """Results of parallel_worker in two processes, by (sharded, number of rows)."""
    folder = tmp_path_factory.mktemp("two")
    run(*TORCHRUN, WORKER, "updates", folder / "results.pt", folder=folder)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("sharded", ["false", "true"])
@pytest.mark.parametrize("rows", [9, 1])
def test_two_processes_equal_one(in_two, sharded, rows):
    """Bug: the processes' losses are averaged and not summed over one denominator; the gradient forward goes around the wrapper;
    a process with fewer micro-batches, or (of one row) none, leaves the other waiting."""
    one, two = parallel_worker.two_updates(Accelerator(cpu=True), rows), in_two[sharded, rows]
    for mine, theirs in zip(one["metrics"], two["metrics"]):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-7)
    for name in ("gradients", "weights"):
        for mine, theirs in zip(one[name], two[name], strict=True):
            assert (mine - theirs).norm() <= 1e-5 * mine.norm()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def in_one(tmp_path_factory):
    """The metrics of sft.py in one process."""
    folder = tmp_path_factory.mktemp("one")
    run(ROOT / "sft.py", *TINY, folder=folder)
    return metrics(folder / "runs/town/sft")


def test_ddp_trains_as_one_process_does(in_one, tmp_path):
    """Bug: with several processes the batches, the tasks or the metrics are others; each writes its own line; a checkpoint is of
    use to the same number of processes alone; after a fault in one process the others wait for it, and nobody learns why."""
    sft = tmp_path / "runs/town/sft"
    run(*TORCHRUN, ROOT / "sft.py", *TINY, folder=tmp_path)
    in_two = metrics(sft)
    assert [line["loss"] for line in in_two] == pytest.approx([line["loss"] for line in in_one], rel=1e-4)
    assert in_two[-1].keys() == in_one[-1].keys() and [line["step"] for line in in_two] == [1, 2, 3, 4]
    shutil.rmtree(sft / "checkpoints/000004")  # as if it had been stopped after step 3
    run(ROOT / "sft.py", "--resume", sft, folder=tmp_path)
    assert metrics(sft)[3]["loss"] == pytest.approx(in_one[3]["loss"], rel=1e-4)
    out = run(*TORCHRUN, ROOT / "grpo.py", *TINY, "--tasks_per_step", 1, folder=tmp_path)  # one process has no task
    assert [line["step"] for line in metrics(tmp_path / "runs/town/grpo")] == [1, 2] and out.count("2 steps, saved in") == 1
    out = run(*TORCHRUN, WORKER, *TINY, "--overwrite", folder=tmp_path, status=1)
    assert "the second process has found a fault" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/town/grpo/model")


def test_sharded_runs_are_saved_whole(in_one, tmp_path):
    """Bug: checkpoints of a sharded run hold shards of the weights, or lose those of the optimisers on the way back."""
    sft = tmp_path / "runs/town/sft"
    run(*FSDP, ROOT / "sft.py", *TINY, folder=tmp_path)
    before, weights = metrics(sft), load_file(sft / "model/model.safetensors")
    assert [line["loss"] for line in before] == pytest.approx([line["loss"] for line in in_one], rel=1e-4)
    opened = dict(AutoModelForCausalLM.from_pretrained(sft / "model").named_parameters())
    assert opened.keys() == weights.keys() and all(torch.equal(opened[name], weights[name]) for name in opened)
    shutil.rmtree(sft / "checkpoints/000004")  # as if it had been stopped after step 3
    run(*FSDP, ROOT / "sft.py", "--resume", sft, folder=tmp_path)
    assert metrics(sft)[3]["loss"] == before[3]["loss"]
    again = load_file(sft / "model/model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    run(*FSDP, ROOT / "grpo.py", *TINY, folder=tmp_path)
    assert len(metrics(tmp_path / "runs/town/grpo")) == 2


def test_the_reference_keeps_its_positions(monkeypatch, tiny):
    """Bug: beside a sharded model the KL reference is rounded to bf16, its rotary frequencies too: another model at far positions."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(parallel, "rollout_dtype", lambda accelerator: torch.bfloat16)
    before = [buffer.clone() for buffer in tiny.buffers()]
    parallel.frozen(Accelerator(cpu=True), tiny)
    assert all(p.dtype == torch.bfloat16 for p in tiny.parameters()) and before
    assert all(torch.equal(buffer, b) for buffer, b in zip(tiny.buffers(), before))


def test_fsdp1_is_refused(monkeypatch, tiny):
    """Bug: a configuration of accelerate for FSDP1 is taken for one of FSDP2."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(BadInput, match="fsdp_version: 2"):
        parallel.distribute(Accelerator(cpu=True), tiny)
