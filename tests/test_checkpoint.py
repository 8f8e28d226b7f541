"""Runs that are stopped, killed, moved and resumed. Most tests call the scripts' main functions."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY
from transformers import AutoModelForCausalLM

import evaluate
import grpo
import sft
from agent import Episode
from config import BadInput
from training.checkpoint import Run, latest_checkpoint

TINY = [*TINY, *"--grpo_steps 4 --save_every 2 --eval_tasks 3 --eval_temperature 0.7".split()]
SCRIPTS = {"sft": sft, "grpo": grpo, "evaluate": evaluate}
SFT, GRPO = Path("runs/town/sft"), Path("runs/town/grpo")


def made_up_reward(episode):
    """An untrained policy scores 0 everywhere, and equal rewards train nothing.

    It is 1 for demonstrations, which have no tokens.
    """
    return 1 - sum(turn.response.tokens for turn in episode.turns) % 5 / 4


def run_main(folder, script, *arguments):
    """Run a script's main function in `folder`, with the made-up reward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Episode, "reward", property(made_up_reward))
        patch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
        SCRIPTS[script].main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished SFT run, runs/town/sft."""
    folder = tmp_path_factory.mktemp("trained")
    run_main(folder, "sft", *TINY)
    return folder


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """undisturbed(script, *flags): the folder of a run that is not interrupted, made once."""

    @cache
    def run(script, *flags):
        if script == "sft":
            return trained / SFT
        folder = tmp_path_factory.mktemp("undisturbed")
        shutil.copytree(trained / "runs", folder / "runs")
        run_main(folder, script, *TINY, *flags)
        return folder / GRPO

    return run


@pytest.fixture
def call(trained, tmp_path, monkeypatch):
    """call(script, *arguments) in an empty folder that has a copy of the SFT run."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    yield lambda script, *arguments: run_main(tmp_path, script, *arguments)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception in a run leaves its handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_each_step(monkeypatch, do):
    """Let each run call do(run) after it has logged a step."""
    log = Run.log

    def log_and_do(self, metrics):
        log(self, metrics)
        do(self)

    monkeypatch.setattr(Run, "log", log_and_do)


def send(number, step):
    """For in_each_step: send this process a signal in that step."""
    return lambda run: os.kill(os.getpid(), number) if run.step == step else None


def metrics(run):
    """The metrics of each complete line, without those that tell the time."""
    lines = (Path(run) / "metrics.jsonl").read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [{name: row[name] for name in row if "second" not in name} for row in rows]


def steps(run):
    return [row["step"] for row in metrics(run)]


def progress(checkpoint):
    """[step, best, id of the tracker's run] of a checkpoint."""
    return list(json.loads((checkpoint / "progress.json").read_text()).values())


def state(run):
    """Weights, optimisers' states and progress of the newest checkpoint, as one flat list."""
    flat, newest = [], latest_checkpoint(run)

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            flat.append(value.tolist() if hasattr(value, "tolist") else value)

    add((newest / "model.safetensors").read_bytes())
    add(torch.load(newest / "training.pt", weights_only=True))
    add(progress(newest)[:2])
    return flat


# --- stop and resume ------------------------------------------------------------------------------
KL = ("grpo", "--kl", "0.5", "--updates_per_rollout", "2")
# Step 2 has a checkpoint in any case.
STOPS = [(("sft",), 1), (("sft",), 2), (("sft",), 3), (("grpo",), 1), (("grpo",), 2), (KL, 3)]


@pytest.mark.parametrize("mode, stop", STOPS)
def test_a_resumed_run_equals_an_undisturbed_one(
    call, undisturbed, monkeypatch, capsys, mode, stop
):
    """Bug: a resume repeats or skips data, restarts the optimiser or the random numbers, measures
    the KL term against other weights, or loses a line of the metrics."""
    whole, parts, script = undisturbed(*mode), Path(f"runs/parts/{mode[0]}"), mode[0]
    start = ["--from", SFT] if script == "grpo" else []
    with monkeypatch.context() as patch:
        in_each_step(patch, send(signal.SIGTERM, stop))
        call(script, *TINY, *mode[1:], "--name", "parts", *start)
    assert f"to continue: python {script}.py --resume {parts}" in capsys.readouterr().out
    assert steps(parts) == list(range(1, stop + 1))
    call(script, "--resume", parts)
    assert metrics(parts) == metrics(whole) and steps(parts) == [1, 2, 3, 4]
    assert any("loss" in row for row in metrics(parts))
    assert state(parts) == state(whole)


def test_what_came_after_the_checkpoint_is_made_again(call):
    """Bug: after a kill the metrics have some steps twice, or half a line breaks the resume."""
    call("grpo", *TINY, "--grpo_steps", 3)
    before, file = metrics(GRPO), GRPO / "metrics.jsonl"
    call("grpo", "--resume", GRPO, "--grpo_steps", 5)
    file.write_text(file.read_text() + '{"step": 6, "reward": 9}\n{"step": 7, "rew')
    call("grpo", "--resume", GRPO, "--grpo_steps", 7)
    assert steps(GRPO) == list(range(1, 8)) and metrics(GRPO)[:2] == before[:2]
    file.write_text("")
    with pytest.raises(BadInput, match="ends before step 7"):
        call("grpo", "--resume", GRPO, "--grpo_steps", 8)


def test_the_next_command_is_that_of_the_resumed_run(call, capsys):
    """Bug: a resumed run tells its user to continue with a run of another name."""
    SFT.parent.rename("runs/mine")
    call("sft", "--resume", "runs/mine/sft", "--sft_steps", 5)
    next_command = capsys.readouterr().out.partition("next: ")[2]
    assert "--from runs/mine/sft" in next_command


def test_a_second_signal_stops_at_once(call, monkeypatch):
    """Bug: a step that takes an hour cannot be stopped by Ctrl-C, however often it is pressed."""
    in_each_step(monkeypatch, send(signal.SIGINT, 1))
    in_each_step(monkeypatch, send(signal.SIGINT, 1))
    with pytest.raises(KeyboardInterrupt):
        call("sft", *TINY, "--name", "other")


@pytest.mark.parametrize("way", ["renamed", "copied", "zipped"])
def test_a_run_folder_can_be_moved(call, capsys, way):
    """Bug: a run works only where it was made, because it has links, absolute paths, or takes its
    stage from its folder's name."""
    assert not any(path.is_symlink() for path in SFT.rglob("*"))
    moved = Path("elsewhere") / way
    moved.parent.mkdir()
    if way == "renamed":
        SFT.rename(moved)
    elif way == "copied":
        shutil.copytree(SFT, moved)
    else:
        shutil.unpack_archive(shutil.make_archive("packed", "zip", SFT), moved)
    shutil.rmtree("runs", ignore_errors=True)
    call("sft", "--resume", moved, "--sft_steps", 5)
    assert steps(moved) == [1, 2, 3, 4, 5]
    call("grpo", "--from", moved, "--name", "b", "--grpo_steps", 1)
    assert steps("runs/b/grpo") == [1]
    call("evaluate", "--from", moved, "--sweep", "length=1", "--eval_tasks", 1)
    assert "sft 1x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--resume", SFT, "--sft_lr", "1e-4", "--seed", "1"], "another --s.*, --s"),
        (["--resume", SFT, "--name", "other"], "no --from, --name, --overwrite"),
        (["--resume", SFT, "--overwrite"], "no --from, --name, --overwrite"),
        (["--resume", SFT, "--model", "other"], "--model is for a new run"),
        (["--resume", "runs/none/sft"], "runs/none/sft is not a run folder"),
        (["--resume", "runs/town"], "runs/town is not a run folder"),
        (["--resume", "empty"], "empty has no checkpoint"),
        (TINY, f"--resume {SFT}"),
    ],
)
def test_what_cannot_be_resumed(call, capsys, arguments, complaint):
    """Bug: a run continues with other settings than it began with, or a finished run is begun
    again over itself."""
    Path("empty").mkdir()
    shutil.copy(SFT / "config.json", "empty")
    before = state(SFT), metrics(SFT)
    with pytest.raises(SystemExit) as raised:
        call("sft", *arguments)
    assert re.search(complaint, f"{raised.value} {capsys.readouterr().err}")
    assert (state(SFT), metrics(SFT)) == before


def test_a_run_of_the_other_stage_is_refused(call):
    """Bug: grpo.py resumes an SFT run, whose optimiser and steps mean something else."""
    with pytest.raises(BadInput, match="that is a run of sft.py"):
        call("grpo", "--resume", SFT)


def test_grpo_says_where_it_starts(call, monkeypatch, capsys):
    """Bug: GRPO starts from an unfinished SFT run without saying so."""
    with monkeypatch.context() as patch:
        in_each_step(patch, send(signal.SIGTERM, 1))
        call("sft", *TINY, "--name", "short")
    call("grpo", *TINY, "--name", "short", "--grpo_steps", 1)
    assert "runs/short/grpo starts from runs/short/sft/step-000001" in capsys.readouterr().out


# --- what a run folder holds ----------------------------------------------------------------------
def test_checkpoints_kept(call, monkeypatch):
    """Bug: the disk fills up with checkpoints, or the best one is deleted, or `best` and `latest`
    name something else."""
    ems, log = iter([0.1, 0.5, 0.5, 0.2, 0.3, 0.4]), Run.log
    monkeypatch.setattr(Run, "log", lambda run, row: log(run, row | {"held_out_em": next(ems)}))
    call("grpo", *TINY, "--grpo_steps", 3, "--save_every", 1)
    call("grpo", "--resume", GRPO, "--grpo_steps", 6)
    kept = ["step-000002", "step-000005", "step-000006"]
    files = ["best", "config.json", "latest", "metrics.jsonl"]
    assert sorted(path.name for path in GRPO.iterdir()) == files + kept
    for name, step in (("best", "step-000002"), ("latest", "step-000006")):
        assert (GRPO / name).read_text() == step + "\n"
        AutoModelForCausalLM.from_pretrained(GRPO / step)


def test_a_kill_before_the_pointers_are_written(call, monkeypatch):
    """Bug: the last checkpoint is written, but `latest` names the one before it forever."""

    def killed(run):
        if run.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "point_and_prune", killed)
        call("sft", "--resume", SFT, "--sft_steps", 6)
    assert (SFT / "latest").read_text() == "step-000004\n" and (SFT / "step-000006").is_dir()
    call("sft", "--resume", SFT, "--sft_steps", 6)
    assert (SFT / "latest").read_text() == "step-000006\n"


def test_what_a_killed_save_left_behind(call):
    """Bug: files of a save that was killed become part of the next checkpoint."""
    (SFT / ".part").mkdir()
    (SFT / ".part/vocab.json").write_text("{}")
    call("sft", *TINY, "--overwrite", "--sft_steps", 1)
    assert not (SFT / ".part").exists() and not list(SFT.rglob("vocab.json"))


def test_overwriting(call, monkeypatch):
    """Bug: a run is deleted before it is sure that another can take its place, or together with
    the model that the new run starts from."""
    before = state(SFT)
    with pytest.raises(BadInput, match="--max_prompt_tokens 20"):
        call("sft", *TINY, "--overwrite", "--max_prompt_tokens", 20)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="no demonstration"):
        patch.setattr("sft.demonstrated_samples", lambda *_: iter(()))
        call("sft", *TINY, "--overwrite")
    assert state(SFT) == before
    call("sft", *TINY, "--overwrite", "--seed", 1)
    assert state(SFT) != before
    call("grpo", *TINY, "--grpo_steps", 1)
    for start in (["--from", GRPO], ["--model", GRPO / "step-000001"]):
        with pytest.raises(BadInput, match="--overwrite would delete runs/town/grpo"):
            call("grpo", *TINY, *start, "--overwrite")


def test_an_old_run_survives_until_the_new_one_is_saved(call, monkeypatch):
    """Bug: --overwrite deletes the old run, and then the disk is too full for the new one."""
    before = state(SFT), metrics(SFT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="start again"):
        patch.setattr("torch.save", Mock(side_effect=OSError("no space left")))
        call("sft", *TINY, "--overwrite", "--seed", 1)
    assert (state(SFT), metrics(SFT)) == before
    call("sft", "--resume", SFT, "--sft_steps", 5)


def test_a_tracker_gets_settings_and_metrics(call, monkeypatch):
    """Bug: --log_with ends in a traceback, because trackers take no lists among the settings."""
    monkeypatch.setattr("training.checkpoint.Accelerator.log", lambda run, values, step: None)
    started = Mock()
    monkeypatch.setattr("training.checkpoint.Accelerator.init_trackers", started)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: ["tensorboard"])
    call("sft", *TINY, "--overwrite", "--log_with", "tensorboard", "--sft_steps", 1)
    settings = started.call_args.kwargs["config"]
    assert settings["sft_steps"] == "1"
    assert all(isinstance(value, (int, float, str, bool)) for value in settings.values())


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_resumed_run_continues_in_the_tracker(call, monkeypatch, tracker):
    """Bug: --resume opens a second run in the tracker, and its curves begin in the middle."""
    monkeypatch.setattr("training.checkpoint.Accelerator.log", lambda run, values, step: None)
    started = Mock()
    monkeypatch.setattr("training.checkpoint.Accelerator.init_trackers", started)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [tracker])
    call("sft", *TINY, "--overwrite", "--log_with", tracker, "--sft_steps", 2)
    id = progress(latest_checkpoint(SFT))[2]
    call("sft", "--resume", SFT, "--sft_steps", 3)
    call("sft", *TINY, "--overwrite", "--log_with", tracker, "--sft_steps", 1)
    first, resumed, other = (one.kwargs["init_kwargs"][tracker] for one in started.call_args_list)
    if tracker == "wandb":
        assert first == resumed == {"id": id, "resume": "allow"} and other["id"] != id
        assert started.call_args_list[1].kwargs["config"]["sft_steps"] == "3"
    else:
        assert [one["purge_step"] for one in (first, resumed, other)] == [1, 3, 1]
        assert started.call_args_list[1].kwargs["config"] is None


def test_a_kill_while_an_old_run_is_overwritten(call, monkeypatch):
    """Bug: a checkpoint of the old run is resumed with the settings of the new one."""

    def remove(path, ignore_errors=False):
        if path.name.startswith("step-"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", remove)
        call("sft", *TINY, "--overwrite", "--seed", 1)
    with pytest.raises(SystemExit):
        call("sft", "--resume", SFT, "--sft_steps", 6)
    call("sft", *TINY, "--overwrite", "--seed", 1)
    assert steps(SFT) == [1, 2, 3, 4]


def test_a_users_files_survive(call):
    """Bug: --overwrite deletes what a user has put into the run folder or beside it."""
    own = [
        SFT / "notes.txt",
        SFT / "step-000002.bak/a",
        SFT / "plots/a",
        Path("runs/town/sft.old/a"),
    ]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    call("sft", *TINY, "--overwrite")
    call("grpo", *TINY, "--grpo_steps", 1)
    assert [path.read_text() for path in own] == ["mine"] * 4


def test_a_full_disk_is_one_sentence(call):
    """Bug: an incomplete checkpoint takes the place of a good one, or the run continues without."""
    before, limits = state(SFT), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # large files fail
    try:
        sentence = f"step 6 could not be saved.*\n.*continue with --resume {SFT}"
        with pytest.raises(SystemExit, match=sentence):
            call("sft", "--resume", SFT, "--sft_steps", 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state(SFT) == before
    call("sft", "--resume", SFT, "--sft_steps", 6)
    assert steps(SFT) == [1, 2, 3, 4, 5, 6]


def test_a_run_folder_cannot_run_code(call):
    """Bug: a stranger's checkpoint executes what is pickled in it."""

    class Malice:
        def __reduce__(self):
            return Path("runs/malice").touch, ()

    (SFT / "step-000004/training.pt").write_bytes(pickle.dumps(Malice(), protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        call("sft", "--resume", SFT, "--sft_steps", 5)
    assert not Path("runs/malice").exists()


def test_a_place_that_cannot_be_written_to(tmp_path):
    """Bug: a run that has no place on disk ends with a traceback, or only after its first steps."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SystemExit, match="step 0 could not be saved"):
        run_main(tmp_path, "sft", *TINY)


# --- kills ----------------------------------------------------------------------------------------
KILLS = 50
SHORT = "--grpo_steps 300 --save_every 1 --tasks_per_step 1 --max_response_tokens 4 --eval_tasks 1"


def check_folder(run: Path):
    """Check after a kill that the newest checkpoint and those of `latest` and `best` open."""
    for name in ("latest", "best"):
        if (run / name).exists():
            AutoModelForCausalLM.from_pretrained(run / (run / name).read_text().strip())
    if any(run.glob("step-*")):
        AutoModelForCausalLM.from_pretrained(latest_checkpoint(run))


def wait_and_kill(process, when, rng):
    """Kill the process a moment after when() has become true."""
    while process.poll() is None and not when():
        time.sleep(0.0005)
    time.sleep(rng.choice([0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)]))
    assert process.poll() is None, process.stderr.read()[-2000:]
    process.kill()
    process.communicate()


def moments(run, rng):
    """The moments to kill a process that starts now: while it starts, trains or saves."""
    until, file = rng.uniform(0, 3), run / "metrics.jsonl"
    end, lines = time.monotonic() + until, until + (len(metrics(run)) if file.exists() else 0)
    return [
        lambda: time.monotonic() > end,
        lambda: file.exists() and len(metrics(run)) > lines,
        (run / ".part").exists,
    ]


@pytest.mark.slow
def test_killed_anywhere(call):
    """Bug: some kill leaves a run that cannot be resumed, or that ends with other weights."""
    flags = [*TINY, *SHORT.split()]
    call("grpo", *flags)
    run, rng, in_a_save = Path("runs/killed/grpo"), random.Random(0), 0

    def start():
        new = [*flags, "--name", "killed", "--from", SFT]
        return subprocess.Popen(
            [sys.executable, __file__, *(["--resume", run] if any(run.glob("step-*")) else new)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    for kill in range(KILLS):
        when = moments(run, rng)[kill % 3]
        wait_and_kill(start(), when, rng)
        in_a_save += (run / ".part").exists()
        check_folder(run)
    last = start()
    _, errors = last.communicate()
    assert last.returncode == 0, errors[-2000:]
    print(f"{in_a_save} of {KILLS} kills came in a save")
    assert metrics(run) == metrics(GRPO) and state(run) == state(GRPO)
    assert in_a_save > KILLS / 10


if __name__ == "__main__":  # grpo.py with the made-up reward, for test_killed_anywhere
    Episode.reward = property(made_up_reward)
    grpo.main()
