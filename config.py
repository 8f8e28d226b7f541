"""One flat dataclass holds every setting; the command line of each script is made from it.

    python sft.py --seed 1 --questions 2        any field is a flag; an unknown flag is an error
    python sft.py --preset paper --data F ...   start from the paper's settings instead of the town's
    python grpo.py --from runs/town/sft         start from the settings saved in a run folder
    python grpo.py --resume runs/town/grpo      go on with a run that was stopped, from its newest checkpoint

Later wins: field defaults < preset < saved run < flags.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

TASKS = ("town", "hotpotqa", "2wikimultihopqa", "musique", "saved")
OPERATIONS = ("create", "read", "update", "delete", "scratchpad")
# What may differ when a run is resumed: its length (and with it the learning-rate schedule and the lessons' borders), its
# logging, its device.
MAY_CHANGE = ("sft_steps", "grpo_steps", "save_every", "log_with", "cpu")
# For parse_args' `extra` in the two trainers.
RESUME = ("--resume", dict(metavar="RUN", help="go on with this run, from its newest checkpoint"))


class BadInput(SystemExit, ValueError):
    """The user's mistake, told in one sentence. Uncaught, it ends a script with that sentence and no traceback."""


def setting(default, help):
    """A dataclass field whose `help` is its documentation here and in --help."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**make, metadata={"help": help.replace("%", "%%")})  # argparse formats it


@dataclass
class Config:
    # --- the task ------------------------------------------------------------------------------
    task: str = setting("town", "what is read and asked: town; hotpotqa, 2wikimultihopqa, musique; saved (a set of tasks as JSONL)")
    data: str = setting("", "data file in the set's original format (saved: as tasks.py writes; the town needs none)")
    questions: int = setting(2, "questions per task; 0: 1 to 10 at random, p(1) = 0.5 (paper: 1 to 10); town: at most 4")
    length: int = setting(1, "town: story length, in multiples of the training length")
    documents: int = setting(200, "QA: documents per task (paper: 200 in training; 200, 400, 800 in tests)")
    order: int = setting(0, "QA: 0: the documents in the order that the task was built in; N: in another one, the N-th")
    chunk_tokens: int = setting(384, "QA: most tokens of text shown at once (paper: 4096)")
    # --- the memory ----------------------------------------------------------------------------
    top_k: int = setting(4, "entries shown for the standing query (paper: 6)")
    capacity: int = setting(0, "most entries a store can hold; 0: no limit (paper: none; 20 in Appendix C)")
    embedder: str = setting("hashed", "'hashed' (bag of words, no download) or an encoder's hub name or folder")
    retrieval: str = setting("similarity", "'similarity', or 'random' for the ablation of the paper's Table 4")
    # --- the agent -----------------------------------------------------------------------------
    disable: list[str] = setting([], "operations switched off: any of create read update delete scratchpad")
    dialect: str = setting("paper", "names of the tags: 'paper', or 'released' for the released checkpoint")
    max_reads: int = setting(3, "times in a row that a Read may show the same chunk or question again")
    max_prompt_tokens: int = setting(256, "longest prompt; the least similar entries are left out to fit (paper: 16384)")
    max_response_tokens: int = setting(20, "longest response of one turn (paper: 4096)")
    # --- the policy ----------------------------------------------------------------------------
    model: str = setting("", "causal LM: hub name, folder, or run folder; empty: a tiny Qwen3 made from scratch (paper: Qwen3-8B)")
    endpoint: str = setting("", "URL of an OpenAI-compatible server that plays --model, in evaluate.py and for sft.py --teacher")
    in_flight: int = setting(32, "most questions that --endpoint is asked at the same time")
    hidden_size: int = setting(128, "tiny model: width")
    layers: int = setting(3, "tiny model: depth")
    heads: int = setting(4, "tiny model: attention heads of 64 dimensions each, which share their keys and values")
    vocab_size: int = setting(4096, "tiny model on QA text: size of the byte-level BPE vocabulary")
    temperature: float = setting(1.0, "sampling temperature in training (paper: 1)")
    sample_rows: int = setting(256, "prompts decoded together")
    # --- training, both stages -----------------------------------------------------------------
    optimizer: str = setting("muon", "'muon' (matrices; AdamW for the rest) or 'adamw'")
    micro_batch_tokens: int = setting(2048, "most tokens, padding included, in one forward and backward pass")
    recompute: bool = setting(False, "recompute the layers in the backward pass: a third more work, a fraction of the memory")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    seed: int = setting(42, "seed of everything random (paper: 42)")
    # --- sft.py --------------------------------------------------------------------------------
    sft_tasks: int = setting(10000, "tasks that are demonstrated, before the filter; a short run needs fewer")
    demonstrations: str = setting("", "JSONL file of demonstrations to train on (or, with --teacher, to write); empty: scripted ones")
    keep_score: float = setting(0.5, "demonstrations with a lower task score are dropped (paper: 0.5)")
    easy_share: float = setting(0.4, "town: share of the SFT steps, the first, on stories without two-hop questions")
    sft_steps: int = setting(2000, "optimiser steps (paper: 3 epochs)")
    sft_batch: int = setting(56, "turns per optimiser step")
    sft_lr: float = setting(5e-3, "peak learning rate: warm-up over a tenth of the steps, linear to 0 over the last 60 %")
    # --- grpo.py -------------------------------------------------------------------------------
    grpo_steps: int = setting(75, "rollout-and-update steps")
    tasks_per_step: int = setting(8, "different tasks in one step (paper: 16)")
    group_size: int = setting(8, "episodes of each task (paper: 16)")
    updates_per_rollout: int = setting(1, "optimiser steps on each step's rollouts (paper: 1, strictly on-policy)")
    grpo_lr: float = setting(1e-3, "peak learning rate (paper: 1e-6)")
    grpo_decay: float = setting(0.8, "share of the steps, the last, over which it falls to 0 (paper: 0, constant)")
    warmup_steps: int = setting(5, "steps of linear warm-up (paper's code: 20)")
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - this (paper: 0.2)")
    clip_high: float = setting(0.28, "and above 1 + this (paper: 0.28)")
    kl: float = setting(0.0, "weight of the KL penalty against the SFT policy; 0 loads no reference (paper: 0)")
    save_every: int = setting(25, "steps between checkpoints, and GRPO's held-out evaluations")
    # --- evaluation ----------------------------------------------------------------------------
    eval_tasks: int = setting(500, "held-out tasks in evaluate.py and, up to 100, behind held_out_em in training")
    eval_temperature: float = setting(0.0, "0: greedy (paper: 0.7)")
    scorer: str = setting("official", "'official' EM and F1, or 'released' (the released code's string equality)")
    # --- the run -------------------------------------------------------------------------------
    name: str = setting("", "run folder: runs/<name>/sft and runs/<name>/grpo; empty: the task's name")
    overwrite: bool = setting(False, "replace a finished run of the same name")
    cpu: bool = setting(False, "stay on the CPU even when there is a GPU")
    log_with: str = setting("", "also log to a tracker that accelerate knows: tensorboard, wandb, ...")

    def __post_init__(self):
        self.name = self.name or self.task

        def need(condition, message):
            if not condition:
                raise BadInput(message)

        def one_of(name, allowed):
            need(getattr(self, name) in allowed, f"--{name} {getattr(self, name)!r} is not one of: {', '.join(allowed)}")

        one_of("task", TASKS)
        one_of("retrieval", ("similarity", "random"))
        one_of("dialect", ("paper", "released"))
        one_of("optimizer", ("muon", "adamw"))
        one_of("scorer", ("official", "released"))
        for operation in self.disable:
            need(operation in OPERATIONS, f"--disable {operation!r} is not one of: {', '.join(OPERATIONS)}")
        need(self.task == "town" or self.data, f"--task {self.task} needs --data FILE in that set's format")
        need(self.task != "town" or not self.data, "--data is for the QA sets; the town writes its own stories")
        need(0 <= self.questions <= (10 if self.task != "town" else 4),
             f"--questions {self.questions} is out of range: 0 (random) or 1 to 10 (town: 1 to 4)")
        for name in ("length", "documents", "chunk_tokens", "top_k", "max_prompt_tokens", "max_response_tokens",
                     "hidden_size", "layers", "heads", "sample_rows", "micro_batch_tokens", "sft_tasks",
                     "in_flight", "sft_steps", "sft_batch", "grpo_steps", "tasks_per_step", "updates_per_rollout", "save_every",
                     "eval_tasks"):
            need(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        longest = self.chunk_tokens + 2 * self.max_response_tokens + 512  # a full scratchpad and query, and ten questions
        need(self.task == "town" or longest <= self.max_prompt_tokens,
             f"--max_prompt_tokens {self.max_prompt_tokens} cannot hold --chunk_tokens {self.chunk_tokens}, a scratchpad "
             f"and a query of --max_response_tokens {self.max_response_tokens} each, and the questions: it takes {longest}")
        need(self.group_size >= 2, "--group_size must be at least 2: an episode is compared with its group's mean")
        need(self.capacity >= 0 and self.max_reads >= 0, "--capacity and --max_reads cannot be negative")
        need(self.temperature > 0, "--temperature must be above 0: training samples (evaluation: --eval_temperature 0)")
        need(self.eval_temperature >= 0, "--eval_temperature cannot be negative (0: greedy)")
        need(0 <= self.clip_low < 1 and self.clip_high >= 0, "--clip_low must be in [0, 1) and --clip_high at least 0")
        need(self.kl >= 0, "--kl cannot be negative")
        need(0 <= self.grpo_decay <= 1, "--grpo_decay is a share of the steps, between 0 and 1")
        need(0 <= self.easy_share < 1, "--easy_share is a share of the steps, at least 0 and below 1")
        need(0 <= self.keep_score <= 1, "--keep_score is a task score, between 0 and 1")

    def enabled(self, operation):
        """Whether `operation`, one of OPERATIONS, is switched on."""
        return operation not in self.disable

    def folder(self, stage):
        """The run folder of `stage`, 'sft' or 'grpo'."""
        return Path("runs") / self.name / stage

    def json(self):
        """What config.json holds; not `overwrite`, which was meant for one run and must not carry over to the next stage."""
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if name != "overwrite"}, indent=1) + "\n"


# What differs from the defaults above. 'town' is those defaults; 'qa' is a tiny model on a QA file; 'pretrained' is any
# pretrained model; 'paper' holds the paper's settings, with the details it leaves open taken from its released code.
PRESETS = {
    "town": {},
    "qa": dict(questions=0, documents=50, chunk_tokens=384, top_k=6, max_prompt_tokens=1536, max_response_tokens=192,
               sft_tasks=100, sft_steps=400, sft_batch=32, grpo_steps=20, tasks_per_step=2, group_size=4,
               grpo_lr=3e-4, sample_rows=64, eval_tasks=50, micro_batch_tokens=4096),
    "pretrained": dict(questions=0, documents=50, chunk_tokens=2048, top_k=6, max_prompt_tokens=8192, max_response_tokens=1024,
                       optimizer="adamw", sft_tasks=400, sft_steps=100, sft_batch=16, sft_lr=1e-5, grpo_steps=100,
                       grpo_lr=1e-6, grpo_decay=0.0, warmup_steps=20, sample_rows=64, eval_tasks=50, eval_temperature=0.7,
                       micro_batch_tokens=16384),
    "paper": dict(task="hotpotqa", model="Qwen/Qwen3-8B", embedder="Qwen/Qwen3-Embedding-0.6B", questions=0, documents=200,
                  chunk_tokens=4096, top_k=6, max_prompt_tokens=16384, max_response_tokens=4096, optimizer="adamw",
                  sft_lr=1e-5, tasks_per_step=16, group_size=16, grpo_lr=1e-6, grpo_decay=0.0, warmup_steps=20,
                  eval_temperature=0.7, sample_rows=8, micro_batch_tokens=16384, recompute=True),
}


def parse_args(description, default_run=None, extra=()):
    """(config, {extra flag: value, "start": --from}) from the command line.

    Ends with exit status 2 and one sentence on a bad flag or value.

    default_run(name) is the run folder to start from, if it is there, when --from is not given. `extra` lists flags,
    (name, keywords of add_argument), that are the script's own and no part of the configuration.
    """
    parser = HfArgumentParser(Config, description=description, allow_abbrev=False, usage="%(prog)s [--flag value ...]")
    parser.add_argument("--preset", choices=sorted(PRESETS),
                        help="start from these settings (without it: 'pretrained' if there is a --model, else 'qa' for a QA set)")
    parser.add_argument("--from", dest="start", metavar="RUN",
                        help="start from this run folder: its settings and, in grpo.py, its model")
    for name, keywords in extra:
        parser.add_argument(name, **keywords)
    try:
        first = parser.parse_args()
        resume = getattr(first, "resume", None)
        start, preset = resume or first.start, first.preset
        teacher = getattr(first, "teacher", None)
        if first.model and (Path(first.model) / "model").is_dir() and not (start or preset):
            start = first.model  # --model RUN comes with its settings, but for the name
        if resume and (first.start or preset or first.overwrite):
            raise BadInput("--resume goes on as the run began: it goes with no --from, --preset or --overwrite")
        if default_run and not (start or preset) and ((run := default_run(first.name or first.task)) / "config.json").is_file():
            if first.model in ("", load_settings(run)["model"]):  # the settings of another base model do not fit
                start = run
        if not (start or preset) and (first.model or first.task != "town"):
            preset = "pretrained" if first.model or teacher else "qa"
        saved = load_settings(start) if start else {}
        if start and start == first.model:
            del saved["name"]
        parser.set_defaults(**{**PRESETS.get(preset, {}), **saved})
        values = vars(parser.parse_args())  # again, now that the defaults are known
        names = [field.name for field in dataclasses.fields(Config)]
        config = Config(**{name: values[name] for name in names})
        if resume and (changed := [name for name, value in load_settings(resume).items()
                                   if getattr(config, name) != value and name not in MAY_CHANGE]):
            raise BadInput(f"--resume {resume}: that run began with another --{', --'.join(changed)}; only --"
                           f"{', --'.join(MAY_CHANGE)} may change")
    except BadInput as error:
        parser.error(str(error))
    return config, {name: value for name, value in values.items() if name not in names}


def load_settings(run):
    """The settings saved in a run folder."""
    path = Path(run) / "config.json"
    try:
        values = json.loads(path.read_text())
        known = dataclasses.asdict(Config())
        unknown = {name for name, value in values.items() if not isinstance(value, type(known.get(name)))}
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{run} is no run folder, such as runs/town/sft: cannot read {path}: {error}") from error
    if unknown:
        raise BadInput(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    return values


def check_new_file(flag, path, overwrite):
    """BadInput if `path`, which `flag` names, cannot be made, or exists and is not to be overwritten."""
    if not Path(path).absolute().parent.is_dir():
        raise BadInput(f"{flag} {path}: there is no folder {Path(path).parent}")
    if Path(path).exists() and not overwrite:
        raise BadInput(f"{flag} {path} exists: choose another name, or replace it with --overwrite")


def check_one_process(script):
    """BadInput under a launcher, for a script that would do everything once in each process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput(f"{script} works in one process: start it with python, not with a launcher")
