"""Evaluation: the table of checkpoints with intervals, ablations, baselines and sweeps.

    python evaluate.py                         SFT and GRPO of runs/town at 1x, 2x, 4x: two minutes
    python evaluate.py --ablate                the GRPO policy without some operations (Table 2)
    python evaluate.py --baselines             full context, RAG, scratchpad, no memory (Table 1)
    python evaluate.py --sweep length=1,4 top_k=2,4,8      all combinations (as in Table 3)
    python evaluate.py --runs runs/a/grpo runs/b/grpo      these runs and no others
    python evaluate.py --name hotpotqa --data hotpot_dev.json --documents 200

The table is saved as runs/NAME/evaluation*.json and never replaces an older one. Scores are percent
of the questions. "released" is what the released code calls exact match. "low" and "high" are the
95 % bootstrap interval of EM over tasks, whose questions share a memory. It is too narrow if a
small file's questions occur in several tasks. Operations are per response, "turns" to "seconds" per
task. "calls" counts the model's responses, "lost" is the EM lost against "all on".
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from agent import Episode, Observation, Policy, Response, observe, parse, run_episodes
from config import BUILT, OPERATIONS, BadInput, Config, load_settings, need, parse_args
from memory import load_embedder
from policy import compute_dtype, load_policy
from tasks import Task, held_out_tasks, scoring
from tasks.demonstrators import Demonstrator, GoldDemonstrator, TownDemonstrator, workflow_shares
from tasks.formats import alias_file
from training.checkpoint import device_name, latest_checkpoint, step_name
from training.tiny import create_policy


# --- what is compared -----------------------------------------------------------------------------
@dataclass
class Contestant:
    """A model in the table. gold: the scripted demonstrator plays in its place."""

    label: str
    model: Policy  # a LanguageModel or a ServerPolicy: it also counts tokens
    gold: bool = False

    def policy(self, tasks: list[Task], config: Config) -> Policy:
        """The policy that plays `tasks` under `config`."""
        model = self.model.with_config(config, config.eval_temperature)
        if not self.gold:
            return model
        if config.task == "town":
            return TownDemonstrator(next(iter(workflow_shares(config))), config, noise=0.0)
        return GoldDemonstrator(tasks, config, model)


def chosen_runs(config: Config, start: str | None, runs=()) -> list[tuple[str, Path]]:
    """[(label, run folder)]: --runs, else `start` (--from). runs/NAME/grpo comes with its sft."""
    if runs:
        return [(run, Path(run)) for run in runs]
    if config.endpoint or not start:
        return []
    sft, grpo = config.folder("sft"), config.folder("grpo")
    if Path(start) == grpo and (sft / "latest").exists():
        return [("sft", sft), ("grpo", grpo)]
    return [(load_settings(start)[0], Path(start))]


def open_contestants(config: Config, runs: list, device, gold: bool = False) -> list[Contestant]:
    """The models of `runs` or, without runs, --model. All play under `config`. BadInput if none."""
    # Autocast would convert a pretrained model's weights for each token.
    dtype = compute_dtype(config, device) if config.model else torch.float32
    found, first = [], load_settings(runs[0][1])[1] if runs else {}
    for label, run in runs:
        checkpoint, (stage, settings) = latest_checkpoint(run), load_settings(run)
        for name in ("disable", "dialect", "instruction"):
            same = settings.get(name) == first.get(name)
            need(same, f"{run} was trained with another --{name} than {runs[0][1]}: test it alone")
        if checkpoint.name != step_name(settings[f"{stage}_steps"]):
            label += f" {checkpoint.name}"  # the run was stopped before its end
        found.append((label, load_policy(checkpoint, config, dtype).to(device)))
    if config.endpoint:
        from tools.server import ServerPolicy  # imported here: only this option needs tools/

        found = [(config.model, ServerPolicy(config, config.eval_temperature))]
    elif config.model and not runs:
        found = [(config.model, load_policy(config.model, config, dtype).to(device))]
    elif gold and not runs:
        found = [("", create_policy(config))]  # for its tokenizer
    need(found, "there is no model to evaluate: run sft.py first, or give --from RUN or --model")
    return [Contestant("demonstrator" if gold else label, model, gold) for label, model in found]


def check_unseen(config: Config, runs: list[tuple[str, Path]]):
    """Raises BadInput if one of `runs` was trained on --data."""
    for _, run in runs:
        seen = load_settings(run)[1]["data"]
        same = seen and config.data and Path(seen).resolve() == Path(config.data).resolve()
        need(not same, f"--data {seen} is the file that {run} was trained on: give the dev file")


class RAG(Demonstrator):
    """A script stores all documents and searches with each question. The contestant answers."""

    def __init__(self, contestant: Contestant, tasks: list[Task], config: Config):
        super().__init__(config)
        self.reader = contestant.policy(tasks, replace(config, disable=list(OPERATIONS)))

    def respond(self, observations: list[Observation]) -> list[Response]:
        asked = [one for one in observations if one.query == one.question]
        answers = iter(self.reader.respond(asked))
        responses = []
        for one in observations:
            if one.question is None:
                responses.append(Response(self.write("create", one.chunk)))
            elif one.query != one.question:
                responses.append(Response(self.write("read", one.question)))
            else:
                responses.append(self.answer_alone(next(answers)))
        return responses

    def answer_alone(self, response: Response) -> Response:
        """The response without the memory operations that a trained policy may still write."""
        operations = parse(response.text, self.config)
        given = [one.text for one in operations if one.kind == "answer" and not one.error]
        return replace(response, text=self.write("answer", given[-1]) if given else "")


@dataclass(frozen=True)
class Variant:
    """A way to play: operations to switch off, and a change to each task. rag: RAG plays."""

    disable: tuple[str, ...] = ()
    change: Callable[[Task], Task] = lambda task: task
    rag: bool = False

    def settings(self, config: Config) -> Config:
        """The config to play with. RAG ignores --disable, and a --max_reads of 0."""
        if self.rag:
            return replace(config, disable=list(self.disable), max_reads=max(1, config.max_reads))
        return replace(config, disable=sorted({*config.disable, *self.disable}))


STORAGE = ("create", "read", "update", "delete")
# The rows of the paper's Table 2, and one more: without Read, no entry is ever shown.
ABLATIONS = {"all on": Variant()}
for name in ("Update", "Delete", "Read", "scratchpad"):
    ABLATIONS[f"- {name}"] = Variant((name.lower(),))
ABLATIONS |= {"- storage": Variant(STORAGE), "- both": Variant(OPERATIONS)}


def full_context(task: Task) -> Task:
    """All text beside each question; `fit` cuts it to --max_prompt_tokens."""
    space = " " if task.chunks == task.documents else ""  # the town's chunks end without one
    return replace(task, chunks=(), context=space.join(task.chunks))


BASELINES = {  # from the paper's Table 1
    "AtomMem": Variant(),
    "full context": Variant(OPERATIONS, full_context),
    "RAG": Variant(
        ("update", "delete", "scratchpad"), lambda one: replace(one, chunks=one.documents), rag=True
    ),
    "scratchpad": Variant(STORAGE),  # MemAgent's workflow
    "no memory": Variant(OPERATIONS, lambda task: replace(task, chunks=())),
}


def play(name, contestant: Contestant, how: Variant, config: Config, tasks, embed) -> list[Episode]:
    """One episode per task. A bar shows the time left, if it takes longer than ten seconds."""
    tasks, config = [how.change(task) for task in tasks], how.settings(config)
    policy = RAG(contestant, tasks, config) if how.rag else contestant.policy(tasks, config)
    turns = sum(len(task.questions) + len(task.chunks) for task in tasks)
    score = scoring.score_function(config)
    with tqdm(total=turns, desc=name, unit="turn", leave=False, delay=10, mininterval=10) as bar:

        def progress(episodes):
            bar.update(sum(episode.position for episode in episodes) - bar.n)

        return run_episodes(tasks, policy, config, embed, score, progress=progress)


# --- figures --------------------------------------------------------------------------------------
def bootstrap(sums: list, counts: list, samples: int = 2000, seed: int = 0) -> np.ndarray:
    """95 % interval (low, high) of sum(sums) / sum(counts) over resampled tasks. Both: (tasks,)."""
    drawn = np.random.default_rng(seed).integers(0, len(sums), (samples, len(sums)))
    return np.percentile(np.take(sums, drawn).sum(1) / np.take(counts, drawn).sum(1), [2.5, 97.5])


def right_answers(episode: Episode) -> float:
    """The number of questions of an episode that were answered right, by exact match."""
    return sum(scoring.exact_match(*pair) for pair in scoring.answered(episode))


def measure(label: str, episodes: list[Episode], seconds: float, judge=None) -> dict:
    """One row of the table: scores in percent, rates per response, costs per task."""
    counts = [len(episode.task.questions) for episode in episodes]
    right = [right_answers(episode) for episode in episodes]
    turns = [(episode, turn) for episode in episodes for turn in episode.turns]
    row = scoring.summarize(scoring.tally(episodes)) | {
        "questions": sum(counts),
        "tasks": len(episodes),
        "calls": sum(turn.response.tokens > 0 for _, turn in turns) / len(episodes),
        "seconds": seconds / len(episodes),
    }
    scores = {"em": sum(right), "f1": 0.0, "released": 0.0}
    for episode in episodes:
        yes_no = not episode.task.id.startswith("musique")  # MuSiQue has no yes-no rule
        for pair in scoring.answered(episode):
            scores["f1"] += scoring.f1(*pair, yes_no=yes_no)
            scores["released"] += scoring.released_match(*pair)
    if judge:
        scores["judge"] = judge(episodes)
    row |= {name: 100 * float(total) / sum(counts) for name, total in scores.items()}
    row["low"], row["high"] = (100 * bootstrap(right, counts)).tolist()
    shown = [len(t.observation.chunk) / len(e.task.context) for e, t in turns if e.task.context]
    return row | {"label": label + (f" ({np.mean(shown):.0%} of it)" if shown else "")}


def compare(before: list[Episode], after: list[Episode]) -> dict[str, float]:
    """The EM that `after` loses against `before` on the same tasks, with the paired interval."""
    counts = [len(episode.task.questions) for episode in before]
    lost = [right_answers(one) - right_answers(other) for one, other in zip(before, after)]
    low, high = bootstrap(lost, counts)
    return {"lost": 100 * sum(lost) / sum(counts), "lost_low": 100 * low, "lost_high": 100 * high}


# The columns of the table: (title and key, format). The judge and the losses are optional.
COLUMNS = [(name, ".1f") for name in ("em", "low", "high", "f1", "released", "judge")]
COLUMNS += [("questions", "d")] + [(name, ".3f") for name in (*OPERATIONS, "invalid", "truncated")]
COLUMNS += [(name, ".2f") for name in ("turns", "calls", "tokens", "seconds")]
COLUMNS += [(name, ".1f") for name in ("lost", "lost_low", "lost_high")]


def table(rows: list[dict]) -> str:
    """The rows as text, one line each."""
    columns = [(name, form, max(7, len(name) + 2)) for name, form in COLUMNS if name in rows[0]]
    labels = max(len(row["label"]) for row in rows)
    lines = [" " * labels + "".join(name.rjust(width) for name, _, width in columns)]
    for row in rows:
        cells = [format(row[name], form).rjust(width) for name, form, width in columns]
        lines.append(row["label"].ljust(labels) + "".join(cells))
    return "\n".join(lines)


SWEPT = "top_k capacity embedder retrieval max_reads max_prompt_tokens".split()
SWEPT += ["max_response_tokens", "eval_temperature", "seed"]  # and others, see parse_sweep


def parse_sweep(texts: list[str], config: Config) -> list[dict]:
    """[{setting: value}]: all combinations of the values in texts such as "top_k=3,6"."""
    own = ["length"] if config.task == "town" else ["order", "chunk_tokens"]
    own += ["documents"] if config.task in BUILT else []
    own += ["questions"] if config.task != "saved" else []
    axes, names = {}, own + SWEPT
    for text in texts:
        name, _, values = text.partition("=")
        need(values and name in names, f"--sweep {text}: write {'|'.join(names)}=value,value")
        need(name not in axes, f"--sweep names {name} twice: write {name}=value,value")
        kind = type(getattr(config, name))
        try:
            axes[name] = [kind(value) for value in values.split(",")]
        except ValueError as error:
            raise BadInput(f"--sweep {text}: {error}") from error
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def row_label(label: str, config: Config, change: dict, variant: str = "") -> str:
    """The name of a row, such as "grpo 2x top_k 6 - Update". change: the sweep's settings."""
    size = f"{config.documents} documents" if config.task in BUILT else Path(config.data).name
    size = f"{config.length}x" if config.task == "town" else size
    swept = [f"{key} {change[key]}" for key in change if key not in ("length", "documents")]
    return " ".join(filter(None, [label, size, *swept, variant]))


def new_file(config: Config, parts: list[str]) -> Path:
    """The file to save the rows in: a new name in runs/NAME."""
    stem = "-".join(["evaluation", *parts]).replace("/", "_")[:200]  # names have at most 255 bytes
    number = itertools.count(2)
    path = Path("runs") / config.name / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    while path.exists():
        path = path.with_name(f"{stem}-{next(number)}.json")
    return path


RUN_FLAGS = [
    ("--runs", dict(nargs="+", default=[], metavar="RUN", help="run folders to compare")),
    ("--gold", dict(action="store_true", help="the scripted demonstrator instead of the model")),
]
FLAGS = RUN_FLAGS + [
    ("--sweep", dict(nargs="+", metavar="SETTING=A,B", help="all combinations of these settings")),
    ("--ablate", dict(action="store_true", help="switch operations off one by one, at test time")),
    ("--baselines", dict(action="store_true", help="full context, RAG, scratchpad, no memory")),
    ("--judge", dict(metavar="MODEL", help="also let this model judge the answers")),
    ("--judge_endpoint", dict(metavar="URL", help="the judge's server (default: --endpoint)")),
]


def main():
    config, args = parse_args("Evaluation.", FLAGS, default_runs=("grpo", "sft"))
    parts = [name for name in ("ablate", "baselines", "gold") if getattr(args, name)]
    need(not (args.ablate and args.baselines), "--ablate or --baselines: give one of them")
    need(not (parts and args.runs[1:]), "--ablate, --baselines, --gold: give only one run")
    unplayable = args.gold and args.baselines and config.task == "town"
    need(not unplayable, "the town's demonstrator cannot play the baselines: leave out --gold")
    device = Accelerator(cpu=config.cpu).device
    print(f"on {device_name(device)}")
    judge = None
    if args.judge:
        from tools.server import Judge  # as in open_contestants

        judge = Judge(config, args.judge, args.judge_endpoint or "")
    variants = ABLATIONS if args.ablate else BASELINES if args.baselines else {"": Variant()}
    default = config.task == "town" and config.length == 1 and len(variants) == 1
    changes = parse_sweep(args.sweep or (["length=1,2,4"] if default else []), config)
    settings = [replace(config, **change) for change in changes]
    need(not (args.runs and config.endpoint), "--runs or --endpoint: give one of them")
    runs = chosen_runs(config, args.start, args.runs)
    runs = runs[-1:] if parts else runs
    check_unseen(config, [] if args.gold else runs)
    contestants = open_contestants(config, runs, device, args.gold)
    count = contestants[-1].model.count
    for contestant, now in itertools.product(contestants, settings):  # bad input fails now
        load_embedder(now.embedder, device)
        tasks = held_out_tasks(now, "test", 1, count)
        contestant.policy(tasks, now)
        contestant.model.with_config(now, 0).shorten(observe(Episode(tasks[0]), now))
    rows, out = [], new_file(config, parts + (args.sweep or []))
    for (change, now), contestant in itertools.product(zip(changes, settings), contestants):
        embed = load_embedder(now.embedder, device)
        tasks, complete = held_out_tasks(now, "test", config.eval_tasks, count), None
        for variant, how in variants.items():
            started, label = time.perf_counter(), row_label(contestant.label, now, change, variant)
            episodes = play(label, contestant, how, now, tasks, embed)
            rows.append(measure(label, episodes, time.perf_counter() - started, judge))
            complete = complete or episodes  # "all on" comes first
            if args.ablate:
                rows[-1] |= compare(complete, episodes)
            out.write_text(json.dumps(rows, indent=1) + "\n")  # the next row may take hours
    print(table(rows))
    if config.task == "2wikimultihopqa" and not Path(alias_file(config.data)).exists():
        print(f"without {alias_file(config.data)} no aliases count; the official scorer uses them")
    print(f"saved as {out}")


if __name__ == "__main__":
    main()
