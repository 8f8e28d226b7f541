"""A run on disk: its settings, metrics and checkpoints, and how it is stopped and resumed.

A checkpoint is written under a temporary name and then renamed, so a run can be killed any time.
--resume drops the steps after the newest checkpoint and repeats them exactly. No generator state is
saved: what is random is seeded by the step, and SFT draws its samples again from the start.
"""

import json
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict
from tqdm import tqdm

from config import Config, load_settings, need
from training.distributed import all_reduce_max, is_sharded

PATIENCE = timedelta(hours=2)  # how long a process waits for the rollouts of another
# Full tensors on the CPU. The same call serves one process, DDP and FSDP2.
FULL = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first. All are complete: they were renamed last."""
    return sorted(Path(run).glob("step-" + 6 * "[0-9]"))


def latest_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run folder, for from_pretrained. Raises BadInput if none."""
    found = checkpoints(run)
    need(found, f"{run} has no checkpoint: there is no folder such as {run}/{step_name(25)}")
    return found[-1]


def starting_model(run: "Run", config: Config, start: str | Path | None) -> str | Path:
    """The model to load: the run's own checkpoint, else that of --from, else --model (or "")."""
    if run.checkpoint:
        return run.checkpoint
    model = latest_checkpoint(start) if start else config.model
    inside = model and Path(model).resolve().is_relative_to(run.folder.resolve())
    need(not inside, f"--overwrite would delete {model}, where this run starts: use another --name")
    if model:
        run.accelerator.print(f"{run.folder} starts from {model}")
    return model


class Run:
    """A run folder, runs/NAME/STAGE. docs/guide.md (Runs) lists its files.

    resume: the run folder to continue. Raises BadInput if the folder cannot be used.
    """

    def __init__(self, config: Config, stage: str, resume: str | Path | None = None):
        self.config, self.stage = config, stage
        self.folder = Path(resume or config.folder(stage))
        self.step, self.metrics, self.best = 0, {}, None  # best: [held-out EM, step]
        self.tracker_id = uuid.uuid4().hex[:12]  # of the run that --log_with shows
        self.stopping = False
        self.checkpoint = latest_checkpoint(resume) if resume else None
        need(not config.endpoint, "--endpoint: a model behind a server cannot be trained")
        found = load_settings(resume)[0] if resume else stage
        need(found == stage, f"--resume {resume}: that is a run of {found}.py")
        need(
            resume or config.overwrite or not checkpoints(self.folder),
            f"{self.folder} already holds a run: continue it with --resume {self.folder}, "
            "choose another --name, or replace it with --overwrite",
        )
        self.accelerator = make_accelerator(config, self.folder)
        self.main = self.accelerator.is_main_process  # the process that writes
        self.accelerator.print(f"{self.folder}: on {device_name(self.accelerator.device)}")
        set_seed(config.seed)
        if resume:
            self.rewind()

    def rewind(self):
        """Go back to the newest checkpoint: drop the metrics of later steps."""
        progress = json.loads((self.checkpoint / "progress.json").read_text())
        self.step, self.best = progress["step"], progress["best"]
        self.tracker_id = progress.get("tracker_id", self.tracker_id)
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)[: self.step]
        need(len(lines) == self.step, f"{path} was changed: it ends before step {self.step}")
        self.metrics = json.loads(lines[-1]) if lines else {}
        if self.main:
            with self.on_disk():
                replace_file(path, "".join(lines))

    def begin(self, policy, optimizers: list[torch.optim.Optimizer]):
        """Load the optimisers' state, or make the folder and its first checkpoint.

        Call it after everything that can fail on bad input. If there is a `checkpoint`, `policy`
        was loaded from it. From here on, Ctrl-C and SIGTERM end the run after the current step.
        """
        self.policy, self.optimizers = policy, optimizers
        if self.checkpoint:
            # A sharded process needs only a part of the file: mmap leaves the rest on disk.
            path = self.checkpoint / "training.pt"
            states = torch.load(path, weights_only=True, mmap=is_sharded())
            if states["state"]:
                state_dict.set_optimizer_state_dict(policy.model, optimizers, states, options=FULL)
        if self.config.log_with:
            self.start_tracker(self.config.log_with)
        if not self.checkpoint:
            self.save()
        elif self.main:
            with self.on_disk():
                self.write_settings()
                self.point_and_prune()
        signals = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self.stop) for number in signals}

    def start_tracker(self, name: str):
        """Start the tracker of --log_with. A resumed run continues there, by its id or folder."""
        settings = {key: str(value) for key, value in self.config.saved().items()}  # no lists
        if name == "tensorboard" and self.checkpoint:
            settings = None  # it would show them as another run
        by_id = {"id": self.tracker_id, "resume": "allow"}
        options = {"wandb": by_id, "swanlab": by_id, "tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers("atommem", config=settings, init_kwargs=options)

    def write_settings(self):
        settings = {"stage": self.stage} | self.config.saved()
        replace_file(self.folder / "config.json", json.dumps(settings, indent=1) + "\n")

    def replace_old_run(self):
        """Delete the files of the run that --overwrite replaces, and no others.

        config.json is deleted first and written last, so a kill cannot mix the two runs.
        """
        for name in ("config.json", "latest", "best"):
            (self.folder / name).unlink(missing_ok=True)
        for old in checkpoints(self.folder):
            shutil.rmtree(old)
        (self.folder / "metrics.jsonl").write_text("")
        self.write_settings()

    def stop(self, number, frame):
        """Signal handler: let the step finish. The same signal again has its usual effect."""
        self.stopping = True
        signal.signal(number, self.handlers[number])
        if self.main:
            tqdm.write("stopping after this step; the same signal again stops at once")

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the remaining steps, up to `total`, until a signal comes.

        The caller logs each step. A checkpoint is written after the step if it is due.
        """
        hide = None if self.main else True  # None: shown on a terminal only
        self.bar = tqdm(range(total), self.stage, initial=self.step, disable=hide, unit="step")
        while self.step < total and not all_reduce_max(self.stopping, self.accelerator):
            self.step += 1
            set_seed(self.config.seed + self.step)  # a resumed run draws the same numbers
            yield self.step
            self.bar.update()
            if self.step % self.config.save_every == 0:
                self.save()
        self.bar.close()
        if self.checkpoint.name != step_name(self.step):
            self.save()

    def log(self, metrics: dict[str, float]):
        """Append the step's metrics to metrics.jsonl, send them to the tracker, show the main one.

        Without a terminal, it prints about 20 lines per run and one for each evaluation.
        """
        self.metrics = {"step": self.step}
        self.metrics |= {name: float(f"{value:.6g}") for name, value in metrics.items()}
        if not self.main:
            return
        with self.on_disk(), open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.metrics) + "\n")
        self.accelerator.log(metrics, step=self.step)
        name = "reward" if "reward" in metrics else "loss"
        line = f"{name} {metrics[name]:.3f}  {metrics['seconds']:.2f} s/step"
        if "held_out_em" in metrics:
            line += f"  held-out EM {metrics['held_out_em']:.3f}"
        self.bar.set_postfix_str(line)
        due = self.step % max(1, self.bar.total // 20) == 0 or "held_out_em" in metrics
        if self.bar.disable and due:
            print(f"{self.stage} {self.step}/{self.bar.total}  {line}", flush=True)

    def save(self):
        """Collective: write a checkpoint of this step. Every process calls it; the main one writes.

        Raises SystemExit if it cannot be written.
        """
        em = self.metrics.get("held_out_em")
        if em is not None and (self.best is None or em > self.best[0]):
            self.best = [em, self.step]
        # get_state_dict would step an optimiser that has no state yet.
        stepped = [optimizer for optimizer in self.optimizers if optimizer.state]
        weights, states = state_dict.get_state_dict(self.policy.model, stepped, options=FULL)
        if self.main:
            with self.on_disk():
                self.write(weights, states)
        self.accelerator.wait_for_everyone()
        self.checkpoint = self.folder / step_name(self.step)

    def write(self, weights: dict, states: dict):
        """The main process's part of `save`."""
        part = self.folder / ".part"
        shutil.rmtree(part, ignore_errors=True)  # a killed save may have left it
        self.policy.save(part, weights)
        torch.save(states, part / "training.pt")
        progress = {"step": self.step, "best": self.best, "tracker_id": self.tracker_id}
        (part / "progress.json").write_text(json.dumps(progress))
        if not self.checkpoint:  # delete an old run only now that its replacement exists
            self.replace_old_run()
        part.rename(self.folder / step_name(self.step))
        self.point_and_prune()

    def point_and_prune(self):
        """Write `latest` and `best`, and delete the checkpoints that are no longer needed."""
        found = [path.name for path in checkpoints(self.folder)]
        keep = {*found[-2:], *([step_name(0)] if self.config.kl else [])}
        replace_file(self.folder / "latest", found[-1] + "\n")
        if self.best:
            keep.add(step_name(self.best[1]))
            replace_file(self.folder / "best", step_name(self.best[1]) + "\n")
        for name in set(found) - keep:
            shutil.rmtree(self.folder / name)

    @contextmanager
    def on_disk(self):
        """Turns a failed write into a SystemExit with one sentence."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two: a full disk
            kept = f"{self.checkpoint} is intact: continue with --resume {self.folder}"
            then = kept if self.checkpoint else "start again"
            what = f"{self.folder}: step {self.step} could not be saved: {error}"
            raise SystemExit(f"{what}\n{then} once it can be written") from error

    def finish(self, total: int, next_command: str):
        """Restore the signal handlers, close tracker and process group, print the next command.

        Call it after the caller has dropped its DDP wrapper. If the process group is closed before
        that, the wrapper's destructor can wait forever for a thread of the group.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.accelerator.free_memory()  # accelerate's own reference to the wrapper
        self.accelerator.end_training()
        then = f"next: {next_command}"
        if self.step < total:
            then = f"to continue: python {self.stage}.py --resume {self.folder}"
        self.accelerator.print(f"{self.step} steps, saved in {self.checkpoint}; {then}")


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """The Accelerator of a run. Raises BadInput if the tracker of --log_with is missing."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every process loads the weights itself
    accelerator = Accelerator(
        cpu=config.cpu or not torch.accelerator.is_available(),
        mixed_precision="no",  # the policy does its own autocast
        log_with=config.log_with or None,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    installed = not config.log_with or accelerator.log_with
    need(installed, f"--log_with {config.log_with}: that tracker is not installed")
    return accelerator


def device_name(device: torch.device) -> str:
    """The device and, for a CPU, the instructions that its rounding depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device) + f", {torch.backends.cpu.get_cpu_capability()}" * (device.type == "cpu")


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def replace_file(path: Path, text: str):
    """Write a text file atomically: at any moment there is either the old or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
