"""One flat dataclass holds every setting, and each script's command line is made from it.

    python sft.py --seed 1 --questions 2         any field is a flag
    python sft.py --preset paper --data FILE     start from the paper's settings
    python grpo.py --from runs/town/sft          start from the settings and the model of a run
    python grpo.py --resume runs/town/grpo       continue a stopped run from its newest checkpoint

Flags win over what a preset or a run has set. Of --preset and --from, give one at most.
"""

import dataclasses
import json
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from transformers import HfArgumentParser

# BUILT: a task is built from several rows of a file. COMPLETE: each row is a task.
BUILT = ("hotpotqa", "2wikimultihopqa", "musique")
COMPLETE = ("saved", "memagent", "babilong", "locomo", "longmemeval", "memoryagentbench")
TASKS = ("town", *BUILT, *COMPLETE)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab", "comet_ml", "aim", "clearml")
OPERATIONS = ("create", "read", "update", "delete", "scratchpad")
# Settings that may change when a run is resumed: its length, logging, device and memory use.
MAY_CHANGE = ("sft_steps", "grpo_steps", "save_every", "log_with", "cpu", "bf16")
MAY_CHANGE += ("micro_batch_tokens", "sample_rows", "gradient_checkpointing")


class BadInput(SystemExit, ValueError):
    """The user's mistake in one sentence. Uncaught, it ends a script without a traceback."""


def setting(default: object, help: str):
    """A dataclass field. `help` documents it here and in --help."""
    return field(default=default, metadata={"help": help.replace("%", "%%")})  # argparse formats it


@dataclass
class Config:
    # --- the task -----------------------------------------------------------------------------
    task: str = setting("town", f"one of: {', '.join(TASKS)}; saved: your own questions")
    data: str = setting("", "data file in that format, or a hub's NAME:CONFIG:SPLIT; town: none")
    questions: int = setting(2, "questions per task; 0: 1 to 10 at random (paper); town: at most 4")
    length: int = setting(1, "town: story length, in multiples of the training length")
    documents: int = setting(200, "QA: documents per task (paper: 200; in tests 200, 400, 800)")
    order: int = setting(0, "QA: N > 0 shuffles the documents of each task with seed N")
    chunk_tokens: int = setting(384, "QA: maximum tokens of a chunk (paper: 4096)")
    # --- the memory ---------------------------------------------------------------------------
    top_k: int = setting(4, "entries shown for the standing query (paper: 6)")
    capacity: int = setting(0, "maximum entries in a store; 0: no limit (paper: 20 in Appendix C)")
    embedder: str = setting("hashed", "'hashed' (bag of words), or an encoder's hub name or folder")
    retrieval: str = setting("similarity", "'similarity', or 'random' (the paper's Table 4)")
    # --- the agent ----------------------------------------------------------------------------
    disable: list[str] = field(
        default_factory=list, metadata={"help": "operations to switch off: create read update ..."}
    )
    dialect: str = setting("paper", "tag names: 'paper', or 'released' (the released checkpoint)")
    instruction: str = setting("", "FILE with your own system message for chat models")
    max_reads: int = setting(3, "how often in a row a Read may show a chunk or question again")
    max_prompt_tokens: int = setting(256, "longest prompt; drops entries to fit (paper: 16384)")
    max_response_tokens: int = setting(20, "longest response of one turn (paper: 4096)")
    # --- the policy ---------------------------------------------------------------------------
    model: str = setting("", "causal LM: hub name or folder; empty: a new tiny Qwen3 (paper: 8B)")
    endpoint: str = setting("", "URL of an OpenAI-compatible server that serves --model")
    in_flight: int = setting(32, "maximum concurrent requests to --endpoint")
    hidden_size: int = setting(128, "tiny model: width")
    layers: int = setting(3, "tiny model: depth")
    heads: int = setting(4, "tiny model: attention heads of 64 dimensions")
    bf16: Optional[bool] = setting(None, "passes in bf16 (default: on a GPU alone)")  # noqa: UP045
    temperature: float = setting(1.0, "sampling temperature in training (paper: 1)")
    sample_rows: int = setting(256, "prompts sampled in one batch")
    # --- training, both stages ----------------------------------------------------------------
    optimizer: str = setting("muon", "'muon' (for matrices; AdamW for the rest) or 'adamw'")
    micro_batch_tokens: int = setting(2048, "most tokens in a training pass, padding included")
    gradient_checkpointing: bool = setting(False, "recompute layers: less memory, slower")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    save_every: int = setting(25, "steps between checkpoints, and GRPO's held-out evaluations")
    seed: int = setting(42, "seed of everything random (paper: 42)")
    # --- sft.py -------------------------------------------------------------------------------
    sft_tasks: int = setting(10000, "number of tasks to demonstrate; GRPO starts after them")
    demonstrations: str = setting("", "JSONL file from tools/teach.py; empty: scripted ones")
    keep_score: float = setting(0.5, "drop demonstrations with a lower score (paper: 0.5)")
    easy_share: float = setting(0.4, "town: this first share of the steps has no two-hop questions")
    sft_steps: int = setting(2000, "optimiser steps (paper: 3 epochs)")
    sft_batch: int = setting(56, "turns per optimiser step")
    sft_lr: float = setting(5e-3, "peak learning rate; rises over 10 %, falls over the last 60 %")
    # --- grpo.py ------------------------------------------------------------------------------
    grpo_steps: int = setting(75, "rollout-and-update steps")
    tasks_per_step: int = setting(8, "different tasks in one step (paper: 16)")
    group_size: int = setting(8, "episodes of each task (paper: 16)")
    updates_per_rollout: int = setting(1, "optimiser steps per rollout (paper: 1, on-policy)")
    grpo_lr: float = setting(1e-3, "peak learning rate (paper: 1e-6)")
    grpo_decay: float = setting(0.8, "rate falls to 0 over this last share of the steps (paper: 0)")
    warmup_steps: int = setting(5, "steps of linear warm-up (paper's code: 20)")
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low (paper: 0.2)")
    clip_high: float = setting(0.28, "the ratio is clipped above 1 + clip_high (paper: 0.28)")
    kl: float = setting(0.0, "weight of the KL penalty; 0 loads no reference model (paper: 0)")
    # --- evaluation ---------------------------------------------------------------------------
    eval_tasks: int = setting(500, "test tasks in evaluate.py; up to 100 held-out ones in training")
    eval_temperature: float = setting(0.0, "0: greedy (paper: 0.7)")
    scorer: str = setting("official", "'official' EM, or 'released' (the released code's equality)")
    # --- the run ------------------------------------------------------------------------------
    name: str = setting("", "the run's folder is runs/NAME/sft or runs/NAME/grpo; empty: the task")
    overwrite: bool = setting(False, "replace the run, or the output file, of that name")
    cpu: bool = setting(False, "use the CPU even if there is a GPU")
    log_with: str = setting("", "also log to this tracker: tensorboard, wandb, ...")

    def __post_init__(self):
        self.name = self.name or self.task
        choices = {
            "task": TASKS,
            "retrieval": ("similarity", "random"),
            "dialect": ("paper", "released"),
            "optimizer": ("muon", "adamw"),
            "scorer": ("official", "released"),
            "log_with": ("", *TRACKERS),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            need(value in allowed, f"--{name} {value!r} is not one of: {', '.join(allowed)}")
        for operation in self.disable:
            allowed = ", ".join(OPERATIONS)
            need(operation in OPERATIONS, f"--disable {operation!r} is not one of: {allowed}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            bounds = f"at least {low}" + f", at most {high}" * (high < INF)
            need(low <= value <= high, f"--{name} must be {bounds}, not {value}")
        town = self.task == "town"
        need(town or self.data, f"--task {self.task} needs --data FILE in that set's format")
        need(not (town and self.data), "--data is for the QA sets: the town writes its own stories")
        need(not town or self.questions <= 4, "--questions: a story of the town has at most 4")
        need(self.temperature > 0, "--temperature must be above 0: training has to sample")
        need(self.max_grad_norm > 0, "--max_grad_norm must be above 0: 0 would stop all learning")
        for name in ("clip_low", "easy_share"):
            need(getattr(self, name) < 1, f"--{name} must be below 1")
        need("/" not in self.name, f"--name {self.name}: it names one folder, so it has no slash")

    def enabled(self, operation: str) -> bool:
        """Whether `operation`, one of OPERATIONS, is switched on."""
        return operation not in self.disable

    def folder(self, stage: str) -> Path:
        """The run folder of a stage, 'sft' or 'grpo'."""
        return Path("runs") / self.name / stage

    def saved(self) -> dict:
        """The settings that a run folder stores: all but `name` and `overwrite`."""
        return {key: one for key, one in vars(self).items() if key not in ("name", "overwrite")}


INF = float("inf")
POSITIVE = (
    "length documents chunk_tokens top_k max_prompt_tokens max_response_tokens "
    "hidden_size layers heads sample_rows micro_batch_tokens save_every sft_tasks sft_steps "
    "sft_batch grpo_steps tasks_per_step updates_per_rollout eval_tasks"
)
NOT_NEGATIVE = "order capacity max_reads eval_temperature kl clip_high sft_lr grpo_lr warmup_steps"
RANGES = {name: (1, INF) for name in POSITIVE.split()} | {
    "group_size": (2, INF),  # an episode is compared with its group's mean
    "questions": (0, 10),
    "in_flight": (1, 100),  # the HTTP client opens no more connections
    **{name: (0, INF) for name in NOT_NEGATIVE.split()},
    **{name: (0, 1) for name in ("clip_low", "easy_share", "keep_score", "grpo_decay")},
}


def need(condition: object, message: str):
    """Raises BadInput with `message` unless the condition holds."""
    if not condition:
        raise BadInput(message)


LARGE = dict(
    questions=0, top_k=6, optimizer="adamw", grpo_lr=1e-6, grpo_decay=0.0, warmup_steps=20,
    sft_lr=1e-5, eval_temperature=0.7, sample_rows=8, micro_batch_tokens=16384,
)  # fmt: skip
# Changes to the defaults. 'smollm2': a chat model of 135M. 'qwen3': larger ones. 'paper': its own
# settings; where it is silent, those of its code. The last two have not been run.
PRESETS = {
    "town": {},
    "smollm2": dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", max_prompt_tokens=1024,
        max_response_tokens=128, optimizer="adamw", sft_steps=400, sft_batch=32, sft_lr=2e-4,
        easy_share=0.0, grpo_steps=20, tasks_per_step=4, grpo_lr=3e-5, sample_rows=64,
        micro_batch_tokens=4096, eval_tasks=100, documents=8,
    ),
    "qwen3": LARGE | dict(
        model="Qwen/Qwen3-0.6B", documents=50, chunk_tokens=2048, max_prompt_tokens=8192,
        max_response_tokens=1024, sft_tasks=400, sft_steps=100, sft_batch=16, eval_tasks=50,
    ),
    "paper": LARGE | dict(
        task="hotpotqa", model="Qwen/Qwen3-8B", embedder="Qwen/Qwen3-Embedding-0.6B",
        chunk_tokens=4096, max_prompt_tokens=16384, max_response_tokens=4096, tasks_per_step=16,
        group_size=16, gradient_checkpointing=True,
    ),
}  # fmt: skip


def parse_args(
    description: str, extra=(), resume: bool = False, default_runs: tuple[str, ...] = ()
) -> tuple[Config, Namespace]:
    """Parse the command line: (config, other arguments). Bad flags exit with one sentence.

    extra: the script's own flags, as (name, keywords of add_argument). resume: for the trainers.
    default_runs: stages to try in runs/NAME, in this order, if --preset, --from, --resume and
    --model are not given. `args.start` is the run folder to start from, or None.
    """
    parser = HfArgumentParser(Config, description=description, allow_abbrev=False)
    parser.usage = "%(prog)s [--flag value ...]"
    alone = resume or int(os.environ.get("WORLD_SIZE", 1)) == 1  # only trainers use several
    need(alone, f"{parser.prog} runs in one process: start it with python, not with a launcher")
    first = ArgumentParser(add_help=False, allow_abbrev=False)  # flags that set defaults
    for one in (parser, first):
        one.add_argument("--preset", choices=list(PRESETS), help="start from these settings")
        one.add_argument("--from", dest="start", help="start from this run's settings and model")
        if resume:
            one.add_argument("--resume", help="continue this run from its newest checkpoint")
    first.add_argument("--runs", nargs="*", default=[])  # evaluate.py's: several runs to start from
    for name in ("--name", "--task", "--model", "--instruction"):
        first.add_argument(name, default="")
    for name, keywords in extra:
        parser.add_argument(name, **keywords)
    try:
        early, _ = first.parse_known_args()
        need(not (early.runs and early.start), "--runs or --from: give one of them")
        start = getattr(early, "resume", None) or early.start or next(iter(early.runs), None)
        need(not (start and early.preset), "--preset is for a new run: a run has its own settings")
        need(not (start and early.model), "--model is for a new run: a run has its own model")
        start = start or default_run(early, default_runs)
        saved = load_settings(start)[1] if start else {}
        parser.set_defaults(**PRESETS[early.preset or "town"] | saved)
        if start and Path(start).parent.parent.name == "runs":  # runs/NAME/STAGE
            parser.set_defaults(name=Path(start).parent.name)
        values = vars(parser.parse_args())
        values["start"] = start
        if early.instruction:
            values["instruction"] = read_instruction(early.instruction)
        config = Config(**{one.name: values.pop(one.name) for one in dataclasses.fields(Config)})
        if resume and early.resume:
            check_resume(early, config, saved)
    except BadInput as error:
        parser.error(str(error))
    return config, Namespace(**values)


def read_instruction(path: str) -> str:
    """The text of a file. Raises BadInput if it is not UTF-8 text, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--instruction {path}: it cannot be read as UTF-8 text: {error}") from error
    need(text, f"--instruction {path} is empty")
    return text


def check_resume(args: Namespace, config: Config, saved: dict):
    """Raises BadInput if --resume comes with flags that would change the run."""
    mixed = args.start or config.overwrite or args.name
    need(not mixed, "--resume continues a run as it is: no --from, --name, --overwrite")
    now = config.saved()
    changed = [name for name in saved if now[name] != saved[name] and name not in MAY_CHANGE]
    may = f"only --{', --'.join(MAY_CHANGE)} may change"
    need(not changed, f"--resume: that run has another --{', --'.join(changed)}; {may}")


def load_settings(run: str | Path) -> tuple[str, dict]:
    """(stage, settings) of a run folder. Raises BadInput if `run` is not one."""
    path = Path(run) / "config.json"
    try:
        values = json.loads(path.read_text())
        stage = values.pop("stage")
        wrong = sorted(set(values) - {one.name for one in dataclasses.fields(Config)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{run} is not a run folder such as runs/town/sft: {error!r}") from error
    need(not wrong, f"{path} has settings that this version does not know: {', '.join(wrong)}")
    return stage, values


def default_run(early: Namespace, stages: tuple[str, ...]) -> str | None:
    """runs/NAME/STAGE of the first stage that exists, unless --preset or --model is given."""
    folders = [Path("runs") / (early.name or early.task or "town") / stage for stage in stages]
    found = next((one for one in folders if (one / "config.json").exists()), None)
    new = early.preset or early.model
    if found:
        unused = f"{found} is not used, because --preset and --model are for new runs"
        print(unused if new else f"starting from {found}")
    return str(found) if found and not new else None


def check_new_file(flag: str, path: str | Path, overwrite: bool):
    """Raises BadInput if the file given by `flag` has no folder, or may not be overwritten."""
    path = Path(path)
    need(path.absolute().parent.is_dir(), f"{flag} {path}: there is no folder {path.parent}")
    need(overwrite or not path.exists(), f"{flag} {path} exists: replace it with --overwrite")
