"""A run on disk: its folder, its metrics, its checkpoints, and how it is stopped and taken up again.

Whatever moment a run is killed at, its folder can be used: checkpoints are written aside, flushed to the disk, and only then
renamed. What follows the newest one, a torn last line of the metrics too, is dropped on --resume, and comes again the same.
"""

import json
import os
import random
import shutil
import signal
from collections import deque
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging

import parallel
from config import BadInput, load_settings

PATIENCE = timedelta(hours=2)  # how long a process waits for the rollouts of another


def trained_model(config, stage):
    """The model folder of config's run of that stage; None if there is none, or if --model names another base model."""
    folder = config.folder(stage)
    return folder / "model" if (folder / "model").is_dir() and load_settings(folder)["model"] == config.model else None


def unfinished(model):
    """What to say of a model folder whose run was stopped, such as "7 of 60 steps"; "" if it is finished, or no run's."""
    path = Path(model).resolve() / "progress.json"  # of the checkpoint that the link shows
    if not path.is_file():
        return ""
    run = path.parents[2]
    done, planned = json.loads(path.read_text())["step"], load_settings(run)[f"{run.name}_steps"]
    return f"{done} of {planned} steps" if done < planned else ""


class Run:
    """A run folder, runs/<name>/<stage>:

        config.json, metrics.jsonl    the settings; the metrics, one line a step
        checkpoints/000050/           a folder for AutoModelForCausalLM, with all else that --resume needs in progress.json and
                                      training.pt. The newest two are kept, and the best
        model, best                   links to the newest checkpoint, and to that with the highest held-out EM

    resume: the folder of the run to go on with; None starts a new one. `step` is the number of steps done, `metrics` those of
    the last one, `start` the model that it all began from, `checkpoint` the newest checkpoint. BadInput if the folder is taken,
    or holds no run of this stage.
    """

    def __init__(self, config, stage, resume=None):
        self.config, self.folder = config, Path(resume or config.folder(stage))
        self.step, self.metrics, self.best, self.start, self.checkpoint, self.stopping = 0, {}, None, None, None, False
        self.recent, self.held_out = deque(maxlen=20), ""  # to be shown: the main metric of the last steps, the last held-out evaluation
        if config.endpoint:
            raise BadInput("--endpoint: a model behind a server can be evaluated, or be a --teacher, but not trained")
        above = next(path for path in self.folder.absolute().parents if path.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise BadInput(f"{self.folder} cannot be made: {above} is not a folder that can be written to")
        if resume and self.folder.resolve().name != stage:
            raise BadInput(f"--resume {resume}: not the folder of a {stage} run, which ends in /{stage}")
        if resume and not self.checkpoints():
            raise BadInput(f"--resume {resume}: there is no checkpoint to go on from; start it again")
        if self.checkpoints() and not (config.overwrite or resume):
            raise BadInput(f"{self.folder} already holds a run: go on with it by --resume {self.folder}, choose another --name, or "
                           "replace it with --overwrite")
        try:
            # The trainers see to bf16 and to accumulation themselves, whatever accelerate's configuration says.
            self.accelerator = Accelerator(
                cpu=config.cpu or not torch.accelerator.is_available(), mixed_precision="no", log_with=config.log_with or None,
                project_dir=self.folder, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        except ValueError as error:
            raise BadInput(f"--log_with {config.log_with}: {error}") from error
        if config.log_with and not self.accelerator.log_with:
            raise BadInput(f"--log_with {config.log_with}: that tracker is not installed")
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every process loads the weights itself, not the first alone
        self.main = self.accelerator.is_main_process  # the one that writes
        set_seed(self.process_seed())
        if not self.main:
            logging.disable_progress_bar()
        if resume:
            self.take_up(parallel.gather(self.accelerator, self.checkpoints()[-1])[0])

    def begin_from(self, model):
        """Note the model that the run starts from. BadInput if --overwrite would delete it."""
        self.start = self.start or model
        if not self.checkpoint and self.start and Path(self.start).resolve().is_relative_to(self.folder.resolve()):
            raise BadInput(f"--overwrite would delete {self.start}, from which this run is to start: choose another --name")

    def take_up(self, checkpoint):
        """Be where `checkpoint` was written; the steps after it will come again."""
        path, self.checkpoint = self.folder / "metrics.jsonl", checkpoint
        progress = json.loads((checkpoint / "progress.json").read_text())
        self.step, self.best, self.start = progress["step"], progress["best"], progress["start"]
        lines = path.read_text().splitlines(keepends=True)[: self.step]
        if len(lines) < self.step:
            raise BadInput(f"{path} ends before step {self.step}, which {checkpoint} has: it has been changed")
        self.metrics = json.loads(lines[-1]) if lines else {}
        if self.main:
            replace_file(path, "".join(lines))

    def process_seed(self):
        """The seed of this process from this step on: --seed itself for the first process of a new run."""
        place = self.step, self.accelerator.process_index
        return random.Random(f"{self.config.seed} {place}").getrandbits(32) if any(place) else self.config.seed

    def checkpoint_of(self, step):
        """The folder of a step's checkpoint."""
        return self.folder / "checkpoints" / f"{step:06d}"

    def checkpoints(self):
        """The folders of the complete checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoints/[0-9]*[0-9]"))

    def begin(self, policy, optimizers):
        """Make the folder and checkpoint 0, or put the optimisers and random states where the checkpoint was written.

        Called when all that can fail on bad input is done, so that nothing half-made is left. `policy` has been opened from
        `checkpoint` if there is one. From here on Ctrl-C and SIGTERM end the run after the step.
        """
        logging.disable_progress_bar()  # transformers' own, one for every checkpoint
        self.policy, self.optimizers = policy, optimizers
        if self.checkpoint:
            state = torch.load(self.checkpoint / "training.pt", map_location="cpu", weights_only=True, mmap=parallel.sharding())
            for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
                parallel.load_optimizer(optimizer, values)
            if len(state["random"]) == self.accelerator.num_processes:
                set_random_state(state["random"][self.accelerator.process_index])
            else:  # the numbers to come cannot be had, but those that have been are not drawn again
                set_seed(self.process_seed())
            if self.main:
                replace_file(self.folder / "config.json", self.config.json())
                self.link()
        else:
            old = self.folder.with_name(self.folder.name + ".old")  # a run that --overwrite replaces, or without a checkpoint
            if self.main:
                shutil.rmtree(old, ignore_errors=True)
                if self.folder.exists():
                    self.folder.rename(old)
                with self.on_disk():
                    (self.folder / "checkpoints").mkdir(parents=True)
                    (self.folder / "metrics.jsonl").touch()
                    replace_file(self.folder / "config.json", self.config.json())
            self.save()
            if self.main:
                shutil.rmtree(old, ignore_errors=True)
        if self.config.log_with:
            self.accelerator.init_trackers("atommem")
        self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(self, number, frame):
        """Signal handler: let the step end. A second signal of the same kind has its usual effect.

        One of the other kind has not: a launcher makes of a Ctrl-C a SIGTERM, after the SIGINT that the terminal has sent.
        """
        self.stopping = True
        signal.signal(number, self.handlers[number])
        if self.main:
            tqdm.write("stopping after this step; a second time stops at once")

    def steps(self, total):
        """The numbers of the steps that are left of `total`, with a progress bar, until a signal comes.

        When the caller is through with a step, and has logged it, it is saved if it is due, or the last.
        """
        with tqdm(total=total, initial=self.step, desc=self.folder.name, disable=None if self.main else True, unit="step") as bar:
            self.bar = bar
            while self.step < total and not any(parallel.gather(self.accelerator, self.stopping)):
                self.step += 1
                yield self.step
                bar.update()
                if self.step % self.config.save_every == 0:
                    self.save()
        if self.checkpoint != self.checkpoint_of(self.step):
            self.save()

    def log(self, metrics):
        """Append the step's metrics to metrics.jsonl, pass them to the tracker, and show the main ones.

        On a terminal they stand beside the progress bar; elsewhere every twentieth part of the run, and each held-out evaluation, is a
        line.
        """
        self.metrics = {"step": self.step} | {name: float(f"{float(value):.6g}") for name, value in metrics.items()}
        if not self.main:
            return
        with self.on_disk(), open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.metrics) + "\n")
        self.accelerator.log(metrics, step=self.step)
        main = "reward" if "reward" in metrics else "loss"
        self.recent.append(metrics[main])
        now, before = list(self.recent)[-10:], list(self.recent)[:-10]
        line = f"{main} {sum(now) / len(now):.3f}" + (f" ({sum(now) / len(now) - sum(before) / len(before):+.3f})" if before else "")
        held_out = metrics.get("held_out_em")
        self.held_out = self.held_out if held_out is None else f"  held-out EM {held_out:.3f}"
        line += f"{self.held_out}  {metrics['seconds']:.2f} s/step"
        self.bar.set_postfix_str(line)
        if self.bar.disable and (self.step % max(1, self.bar.total // 20) == 0 or held_out is not None):
            print(f"{self.folder.name} {self.step}/{self.bar.total}  {line}", flush=True)

    def save(self):
        """Write the checkpoint of this step: whole, on the disk, and only then under its name. SystemExit if that fails.

        A meeting of all processes, of which the main one writes.
        """
        if (em := self.metrics.get("held_out_em")) is not None and (self.best is None or em > self.best[0]):
            self.best = [em, self.step]
        weights, states = parallel.training_state(self.policy, self.optimizers, keep=self.main)
        training = {"optimizers": states, "random": parallel.gather(self.accelerator, random_state())}
        if self.main:
            with self.on_disk():
                self.write(weights, training)
        self.accelerator.wait_for_everyone()
        self.checkpoint = self.checkpoint_of(self.step)

    def write(self, weights, training):
        """Save's part of the main process."""
        part = self.folder / "checkpoints" / "part"
        shutil.rmtree(part, ignore_errors=True)
        self.policy.save(part, weights)
        torch.save(training, part / "training.pt")
        (part / "progress.json").write_text(json.dumps({"step": self.step, "best": self.best, "start": self.start}))
        for path in [self.folder / "metrics.jsonl", *part.rglob("*"), part]:
            flush(path)
        self.checkpoint = part.rename(self.checkpoint_of(self.step))
        self.link()

    def link(self):
        """Let `model` and `best` show what they should; then delete the checkpoints that are no longer needed."""
        best = self.checkpoint_of(self.best[1]) if self.best else None
        replace_link(self.folder / "model", self.checkpoint)
        if best:
            replace_link(self.folder / "best", best)
        flush(self.checkpoint.parent), flush(self.folder)
        for old in self.checkpoints()[:-2]:
            if old != best:
                shutil.rmtree(old)

    @contextmanager
    def on_disk(self):
        """Turns what goes wrong in writing into one sentence."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
            then = f"{self.checkpoint} is whole: go on with --resume {self.folder}" if self.checkpoint else "Start again"
            raise SystemExit(f"{self.folder}: step {self.step} could not be saved: {error}\n{then}, when there is room") from error

    def finish(self, total, then):
        """Give the signals and the tracker back, and say how to go on: by `then` if all the steps are done."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.accelerator.end_training()  # lets the tracker write what it still holds
        done = self.step >= total
        launcher = "python" if self.accelerator.num_processes == 1 else "<the same launcher>"
        if self.main:
            print(f"{self.step} steps, saved in {self.folder}; " + (f"next: {then}" if done else
                  f"to go on: {launcher} {self.folder.name}.py --resume {self.folder}"))


def random_state():
    """The states of all global random number generators, in types that torch.load takes from a stranger."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []}  # of this process's GPU


def set_random_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():  # else it goes on elsewhere, where the same numbers cannot be had
        torch.cuda.set_rng_state(state["cuda"][0])


def replace_file(path, text):
    """Write a text file so that at any moment either the old or the new one is there."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    flush(part)
    os.replace(part, path)


def replace_link(link, target):
    """Let the symbolic link, relative to its folder, show `target`; at any moment it shows the old one or the new one."""
    part = link.with_name(link.name + ".part")
    part.unlink(missing_ok=True)
    part.symlink_to(target.relative_to(link.parent))
    os.replace(part, link)


def flush(path):
    """Make sure that a file, or the names in a folder, are on the disk, and would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
