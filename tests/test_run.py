"""Runs that are stopped, killed and resumed. The tests call the scripts' main functions in this process."""

import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM

import grpo
import sft
from agent import Episode
from config import BadInput, Config
from run import Run, random_state, set_random_state, unfinished

TINY = [*TINY, *"--grpo_steps 4 --save_every 2 --eval_tasks 3 --eval_temperature 0.7".split()]
STAGES = {"sft": sft, "grpo": grpo}


def made_up_reward(episode):
    """An untrained policy earns nothing, and without a difference in reward there would be no update to compare."""
    return 1 - sum(turn.response.tokens for turn in episode.turns) % 5 / 4  # 1 for demonstrations, which have no tokens


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs a script's main function in an empty folder, in which an SFT run stands already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Episode, "reward", property(made_up_reward))

    def call(stage, *arguments):
        monkeypatch.setattr("sys.argv", [f"{stage}.py", *arguments])
        STAGES[stage].main()

    call("sft", *TINY)
    return call


def stop_after(monkeypatch, step):
    """Lets every run stop after that step as if a signal had come in it."""
    log = Run.log

    def log_and_stop(self, metrics):
        log(self, metrics)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", log_and_stop)


def metrics(run):
    """The metrics of each step, without those that tell the time."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().split("\n")[:-1]]  # whole lines alone
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def state(run):
    """The weights, the optimisers' and the random states of the newest checkpoint, as one flat list."""
    flat = []

    def add(value):
        if isinstance(value, dict):
            [add(value[key]) for key in sorted(value, key=str)]
        elif isinstance(value, (list, tuple)):
            [add(one) for one in value]
        else:
            flat.append(value.tolist() if hasattr(value, "tolist") else value)

    add((Path(run) / "model/model.safetensors").read_bytes())
    add(torch.load(Path(run) / "model/training.pt", weights_only=True))
    return flat


@pytest.mark.parametrize("stage, settings", [("sft", []), ("grpo", []), ("grpo", ["--kl", "0.5"])])
@pytest.mark.parametrize("stop", [1, 2, 3])  # 2 is a checkpoint in any case
def test_a_resumed_run_equals_an_undisturbed_one(call, monkeypatch, capsys, stage, settings, stop):
    """Bug: a resume repeats or skips data, starts the optimiser or the random numbers anew, or loses a line of the metrics."""
    whole, parts = f"runs/town/{stage}", f"runs/parts/{stage}"
    if stage == "grpo":
        call("grpo", *TINY, *settings)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        call(stage, *TINY, *settings, "--name", "parts", *(["--from", "runs/town/sft"] if stage == "grpo" else []))
    assert f"to go on: python {stage}.py --resume {parts}" in capsys.readouterr().out
    assert len(metrics(parts)) == stop
    call(stage, "--resume", parts)
    assert metrics(parts) == metrics(whole) and [line["step"] for line in metrics(parts)] == [1, 2, 3, 4]
    assert any("loss" in line for line in metrics(parts))
    assert state(parts) == state(whole)


def test_what_came_after_the_checkpoint_is_done_again(call):
    """Bug: after a kill the metrics hold some steps twice, or a line that was cut in the middle breaks the resume."""
    call("grpo", *TINY, "--grpo_steps", "3")
    before, file = metrics("runs/town/grpo"), Path("runs/town/grpo/metrics.jsonl")
    call("grpo", "--resume", "runs/town/grpo", "--grpo_steps", "5")
    file.write_text(file.read_text() + '{"step": 6, "reward": 9}\n{"step": 7, "rew')
    call("grpo", "--resume", "runs/town/grpo", "--grpo_steps", "7")
    assert [line["step"] for line in metrics("runs/town/grpo")] == list(range(1, 8))
    assert metrics("runs/town/grpo")[:2] == before[:2]
    file.write_text("")
    with pytest.raises(BadInput, match="ends before step 7"):
        call("grpo", "--resume", "runs/town/grpo", "--grpo_steps", "8")


def test_checkpoints_kept(call):
    """Bug: the disk fills up with checkpoints, or the best one is thrown away, or a link shows nothing."""
    ems = iter([0.1, 0.5, 0.5, 0.2, 0.3, 0.4])
    log = Run.log
    run = Path("runs/town/grpo")

    def scored(self, found):
        log(self, found | {"held_out_em": next(ems)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", scored)
        call("grpo", *TINY, "--grpo_steps", "3", "--save_every", "1")
        call("grpo", "--resume", str(run), "--grpo_steps", "6")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000002", "000005", "000006"]
    assert (run / "best").resolve().name == "000002" and (run / "model").resolve().name == "000006"
    for name in ("best", "model"):
        AutoModelForCausalLM.from_pretrained(run / name)


def test_a_kill_before_the_links_are_set(call, monkeypatch):
    """Bug: the last checkpoint is written, but `model` shows the one before it for ever."""
    def killed(run):
        if run.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("run.Run.link", killed)
        call("sft", "--resume", "runs/town/sft", "--sft_steps", "6")
    run = Path("runs/town/sft")
    assert (run / "model").resolve().name == "000004" and (run / "checkpoints/000006").is_dir()
    call("sft", "--resume", str(run), "--sft_steps", "6")
    assert (run / "model").resolve().name == "000006"


def test_overwriting(call, monkeypatch):
    """Bug: a run is deleted before there is anything to take its place, or together with the model that it starts from."""
    before = state("runs/town/sft")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("run.Run.save", Mock(side_effect=KeyboardInterrupt))
        call("sft", *TINY, "--overwrite", "--seed", "1")
    assert Path("runs/town/sft.old/model/model.safetensors").exists()  # till the new run has its checkpoint 0
    call("sft", *TINY, "--seed", "1")  # there is no run to overwrite
    assert state("runs/town/sft") != before and not Path("runs/town/sft.old").exists()
    call("grpo", *TINY, "--grpo_steps", "1")
    with pytest.raises(BadInput, match="--overwrite would delete"):
        call("grpo", *TINY, "--from", "runs/town/grpo", "--overwrite")


def test_all_random_states_come_back():
    """Bug: one of the global generators is forgotten, or restored in another state."""
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    state = random_state()
    first, other = draw(), draw()
    set_random_state(state)
    assert draw() == first != other


@pytest.mark.parametrize("arguments, complaint", [
    (["--resume", "runs/town/sft", "--sft_lr", "1e-4", "--seed", "1"], "another --sft_lr, --seed|another --seed, --sft_lr"),
    (["--resume", "runs/town/sft", "--name", "other"], "another --name"),
    (["--resume", "runs/town/sft", "--overwrite"], "goes with no --from"),
    (["--resume", "runs/none/sft"], "is no run folder"),
    (["--resume", "runs/town"], "is no run folder"),
    (TINY, "--resume runs/town/sft"),
])
def test_what_cannot_be_resumed(call, capsys, arguments, complaint):
    """Bug: a run goes on with other settings than it began with, or a finished run is begun again over itself."""
    before = state("runs/town/sft"), metrics("runs/town/sft")
    with pytest.raises(SystemExit) as raised:
        call("sft", *arguments)
    assert re.search(complaint, f"{raised.value} {capsys.readouterr().err}")
    assert (state("runs/town/sft"), metrics("runs/town/sft")) == before


def test_a_run_of_the_other_stage_is_refused(call):
    """Bug: grpo.py goes on with an SFT run, whose optimiser and steps mean something else."""
    with pytest.raises(BadInput, match="not the folder of a grpo run"):
        call("grpo", "--resume", "runs/town/sft")


def test_a_full_disk_is_one_sentence(call):
    """Bug: a checkpoint that could not be written whole takes the place of a good one, or the run goes on without any."""
    before = state("runs/town/sft")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # what a full disk does to a large file
    try:
        with pytest.raises(SystemExit, match="step 6 could not be saved.*\n.*000004 is whole: go on with --resume runs/town/sft"):
            call("sft", "--resume", "runs/town/sft", "--sft_steps", "6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state("runs/town/sft") == before
    call("sft", "--resume", "runs/town/sft", "--sft_steps", "6")
    assert [line["step"] for line in metrics("runs/town/sft")] == [1, 2, 3, 4, 5, 6]


def test_a_run_folder_cannot_run_code(call):
    """Bug: a checkpoint from a stranger executes what is pickled in it."""
    class Malice:
        def __reduce__(self):
            return Path("runs/malice").touch, ()

    file = Path("runs/town/sft/model/training.pt")
    file.write_bytes(pickle.dumps(Malice(), protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        call("sft", "--resume", "runs/town/sft", "--sft_steps", "5")
    assert not Path("runs/malice").exists()


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    """Bug: an hour of demonstrations, and then no place to put the policy."""
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    monkeypatch.setattr("sys.argv", ["sft.py", *TINY])
    with pytest.raises(BadInput, match="is not a folder that can be written to"):
        sft.main()


KILLS = 50


@pytest.mark.slow
def test_killed_anywhere(call):
    """Bug: there is a moment at which a kill leaves a run that cannot go on, or that ends with other weights."""
    flags = [*TINY, *"--grpo_steps 300 --save_every 1 --tasks_per_step 1 --max_response_tokens 4 --eval_tasks 1".split()]
    call("grpo", *flags)
    run, rng, in_a_save = Path("runs/killed/grpo"), random.Random(0), 0
    part, file = run / "checkpoints/part", run / "metrics.jsonl"
    for kill in range(KILLS + 1):
        begun = any(run.glob("checkpoints/0*"))
        arguments = ["--resume", str(run)] if begun else [*flags, "--name", "killed", "--from", "runs/town/sft"]
        process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kill == KILLS:
            break
        begin, until, before = time.monotonic(), rng.uniform(0, 3), len(metrics(run)) if begun else 0
        reached = [lambda: time.monotonic() > begin + until,  # while it starts
                   lambda: file.exists() and file.read_text().count("\n") > before + until,  # while it trains
                   part.exists][kill % 3]  # while it saves
        while process.poll() is None and not reached():
            time.sleep(0.0005)
        time.sleep(rng.choice([0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)]))
        assert process.poll() is None, process.stderr.read()[-2000:]
        process.kill()
        process.communicate()
        in_a_save += part.exists()
        if (run / "model").exists():
            AutoModelForCausalLM.from_pretrained(run / "model")
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    print(f"{in_a_save} of {KILLS} kills came in a save")
    assert metrics(run) == metrics("runs/town/grpo") and state(run) == state("runs/town/grpo")
    assert in_a_save > KILLS / 10


if __name__ == "__main__":  # grpo.py with the made-up reward, for test_killed_anywhere
    Episode.reward = property(made_up_reward)
    grpo.main()


def test_a_stopped_run_is_called_so(tmp_path):
    """Bug: GRPO starts from an SFT run of seven steps, or a table shows a run of none, as if they were done."""
    run = tmp_path / "runs/town/sft"
    (run / "checkpoints/000007").mkdir(parents=True)
    (run / "checkpoints/000007/progress.json").write_text('{"step": 7}')
    (run / "model").symlink_to("checkpoints/000007")
    for steps, words in ((60, "7 of 60 steps"), (7, "")):
        (run / "config.json").write_text(Config(sft_steps=steps).json())
        assert unfinished(run / "model") == words
    assert unfinished(tmp_path) == unfinished("Qwen/Qwen3-0.6B") == ""
