"""Evaluation: the table of checkpoints, with intervals; ablations, baselines, sweeps; traces; questions about your own file.

    python evaluate.py                             SFT and GRPO of runs/town at 1x, 2x, 4x the training length
    python evaluate.py --ablate                    the GRPO policy with operations switched off (the paper's Table 2)
    python evaluate.py --baselines                 beside it the same model with the full text, with RAG, with a scratchpad, with nothing
    python evaluate.py --sweep top_k=3,6,12 chunk_tokens=2048,4096 ...      every combination (Table 3)
    python evaluate.py --runs runs/a/grpo runs/b/grpo             any run folders side by side, under one name's settings
    python evaluate.py --trace 2                   two episodes, turn by turn
    python evaluate.py --html page.html            episodes to click through, SFT beside GRPO, as a page that needs nothing else
    python evaluate.py --curves runs/*/grpo/metrics.jsonl         the learning curves as curves.png
    python evaluate.py --task hotpotqa --data hotpot_dev.json --documents 200
    python evaluate.py --gold ...                  the demonstrator in the model's place: what a workflow can reach
    python evaluate.py --model Yupeng123/AtomMem-8B --dialect released --preset paper --data hotpot_dev.json
    python evaluate.py --ask "Who is it?" --file notes.txt --model runs/mine/grpo                     see ask.py

EM and F1 are means over questions, in per cent; "released" is what the released code calls exact match, "judge" the verdict of
the model that --judge names. The intervals are 95 % bootstrap intervals over tasks, since the questions of one task share a memory.
"""

import dataclasses
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from agent import Response, parse
from ask import answer_questions
from config import OPERATIONS, BadInput, Config, check_new_file, check_one_process, load_settings, parse_args
from demonstrations import Demonstrator, GoldDemonstrator, TownDemonstrator
from endpoint import Endpoint
from memory import load_embedder
from policy import evaluate, evaluating, open_player
from run import trained_model, unfinished
from scoring import Judge, exact_match, f1, released_match, summarize, tally
from show import draw_curves, table, trace, write_page
from tasks import held_out_tasks

# --- what is compared: the agent, ablations of it, and other workflows ------------------------------------------------


class RAG(Demonstrator):
    """Retrieval-augmented generation, with `policy` as the reader: a script stores every document and searches for each question."""

    def __init__(self, policy, config):
        super().__init__(config)
        self.policy = policy

    def respond(self, observations):
        scripted = [self.write("create", o.chunk) if o.question is None else
                    self.write("read", o.question) if o.query != o.question else None for o in observations]
        asked = [o for o, text in zip(observations, scripted) if text is None]
        reader = dataclasses.replace(self.config, disable=list(OPERATIONS))  # its instruction speaks of nothing but the answer
        with evaluating(self.policy, reader):
            answers = iter([self.answer_alone(response, reader) for response in (self.policy.respond(asked) if asked else [])])
        return [next(answers) if text is None else Response(text) for text in scripted]

    def answer_alone(self, response, reader):
        """The response without the operations that a policy may write all the same."""
        given = [operation.text for operation in parse(response.text, reader) if operation.kind == "answer" and not operation.error]
        text = self.write("answer", given[-1]) if given else ""
        return Response(text, response.tokens, truncated=response.truncated)


@dataclass
class Variant:
    """Another way to play: operations switched off, tasks changed, the policy put into a script."""

    disable: tuple = ()
    change: object = lambda task: task
    script: object = None


STORAGE = ("create", "read", "update", "delete")
# The rows of the paper's Table 2, and Read: without it no entry ever comes into view.
ABLATIONS = {
    "all on": Variant(), "- Update": Variant(("update",)), "- Delete": Variant(("delete",)), "- Read": Variant(("read",)),
    "- scratchpad": Variant(("scratchpad",)), "- storage": Variant(STORAGE), "- both": Variant(OPERATIONS),
}
# Of the paper's Table 1. "full context": each question beside as much of the text as --max_prompt_tokens holds; "RAG": each document
# is an entry, the question the query; "scratchpad": MemAgent's workflow; "no memory": the questions alone.
BASELINES = {
    "AtomMem": Variant(),
    "full context": Variant(OPERATIONS, lambda task: dataclasses.replace(task, chunks=(), beside="".join(task.chunks))),
    "RAG": Variant(("update", "delete", "scratchpad"), lambda task: dataclasses.replace(task, chunks=task.documents), RAG),
    "scratchpad": Variant(STORAGE),
    "no memory": Variant(OPERATIONS, lambda task: dataclasses.replace(task, chunks=())),
}
# What --sweep takes: not what belongs to training.
SWEPT = ("questions", "length", "documents", "order", "chunk_tokens", "top_k", "capacity", "embedder", "retrieval", "max_reads",
         "max_prompt_tokens", "max_response_tokens", "eval_temperature", "seed")


# --- figures -------------------------------------------------------------------------------------------------------


def bootstrap(sums, counts, samples=2000, seed=0):
    """95 % interval (low, high) of sum(sums) / sum(counts) when tasks are resampled. sums, counts: (tasks,)."""
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (samples, len(sums)))
    return np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])


def right_answers(episode):
    """How many of an episode's questions were answered right, by exact match."""
    return sum(exact_match(*pair) for pair in episode.answered)


def measure(label, episodes, seconds, judge=None):
    """One row of the table, as a dictionary: scores in per cent, rates per response, costs per task."""
    counts = [len(episode.task.questions) for episode in episodes]
    em = list(map(right_answers, episodes))
    # MuSiQue has no yes-no rule; in a saved set the ids tell where a question is from.
    overlap = sum(f1(*pair, yes_no=not episode.task.id.startswith("musique")) for episode in episodes for pair in episode.answered)
    low, high = bootstrap(em, counts)
    summary = summarize(tally(episodes))
    shown = [len(turn.observation.chunk) / len(episode.task.beside) for episode in episodes for turn in episode.turns if episode.task.beside]
    return summary | {
        "label": label + (f" ({np.mean(shown):.0%} of it)" if shown else ""), "em": 100 * sum(em) / sum(counts), "low": 100 * low, "high": 100 * high,
        "f1": 100 * overlap / sum(counts), "released": 100 * sum(released_match(*pair) for episode in episodes for pair in episode.answered) / sum(counts),
        "judge": 100 * sum(map(sum, judge(episodes))) / sum(counts) if judge else None, "questions": sum(counts), "tasks": len(episodes),
        "calls": sum(turn.response.tokens > 0 for episode in episodes for turn in episode.turns) / len(episodes),
        "seconds": seconds / len(episodes)}


def compare(before, after):
    """What `after` loses in EM against `before`, episodes of the same tasks, in points, with the paired bootstrap's interval."""
    counts = [len(episode.task.questions) for episode in before]
    lost = [right_answers(one) - right_answers(other) for one, other in zip(before, after, strict=True)]
    low, high = bootstrap(lost, counts)
    return {"lost": 100 * sum(lost) / sum(counts), "lost_low": 100 * low, "lost_high": 100 * high}


# --- the script ----------------------------------------------------------------------------------------------------


def latest_run(name):
    """The GRPO run of that name, or its SFT run while there is none."""
    grpo = Config(name=name).folder("grpo")
    return grpo if grpo.is_dir() else Config(name=name).folder("sft")


def policies(config, extra, single, device):
    """(token counter, [(label, function from tasks and settings to the policy that plays them)]) of all that is to be compared.

    single: of the last one alone.
    """
    gold, runs = extra["gold"], extra["runs"]
    folders = {str(run): Path(run) / "model" for run in runs}
    for stage in ("sft", "grpo"):
        if not (runs or config.endpoint) and (found := trained_model(config, stage)):
            folders[stage] = found
    if not (folders or config.model or gold):
        raise BadInput(f"nothing to evaluate: there is no model in runs/{config.name}/sft or runs/{config.name}/grpo; "
                       "run sft.py first, or give --runs, or a pretrained --model")
    trained = [folder.parent for folder in folders.values()] or [Path(config.model)]  # --model may name a run, too
    for run in trained if not (gold or extra["ask"]) else ():
        taught = load_settings(run)["data"] if (run / "model").is_dir() else ""
        if taught and config.data and Path(taught).resolve() == Path(config.data).resolve():
            raise BadInput(f"--data {taught} is the file that {run} was trained on: give the set's dev file")
    if single or gold:
        folders = dict(list(folders.items())[-1:])
    opened = {label + (f" ({steps})" if (steps := unfinished(folder)) else ""): open_player(str(folder), config, device)
              for label, folder in folders.items()}
    if not opened:  # for --gold without a model, a new one's tokenizer counts
        opened = {config.model or "new": open_player(config.model, config, device)}
    count = list(opened.values())[-1].count
    if gold and config.task == "town":
        return count, [("demonstrator", lambda tasks, now: TownDemonstrator("notes" if "create" in now.disable else "full", now, noise=0.0))]
    if gold:
        return count, [("gold-facts demonstrator", lambda tasks, now: GoldDemonstrator(tasks, now, count))]
    return count, [(label, lambda tasks, now, policy=policy: policy) for label, policy in opened.items()]


def turns_of(tasks, variant):
    """How many turns a model takes at the least in `tasks`, which `variant` has changed; those that a script takes cost nothing."""
    return sum((0 if variant.script else len(task.chunks)) + len(task.questions) for task in tasks)


def announce(settings, contestants, variants, number, count):
    """Print what all rows together will take, judged by the first tasks of each."""
    turns, tokens = 0, 0
    for now in settings:
        tasks = held_out_tasks(now, "test", min(number, 5), count)
        here = sum(turns_of(map(variant.change, tasks), variant) for variant in variants.values()) * contestants * number // len(tasks)
        turns, tokens = turns + here, tokens + here * (now.max_prompt_tokens + now.max_response_tokens)
    print(f"{len(settings) * contestants * len(variants)} rows of {number} tasks: about {turns} turns or more, and up to {tokens / 1e6:.3g} million "
          "tokens; a row that takes more than a minute says so after its first turns")


def play(name, make_policy, variant, config, tasks, embed):
    """The episodes of `tasks`, as `variant` has them. What takes more than a minute is announced, by the time of the first turns."""
    tasks = list(map(variant.change, tasks))
    config = dataclasses.replace(config, disable=sorted({*config.disable, *variant.disable}))
    turns, taken = turns_of(tasks, variant) * (variant.script is None), 0  # a script's first turns tell nothing
    started = time.perf_counter()

    with tqdm(total=len(tasks), desc=name, disable=None, unit="episode", leave=False) as bar:
        def progress(more, done):
            bar.update(done - bar.n)
            nonlocal turns, taken
            taken += more
            if turns and taken >= len(tasks):
                if (seconds := time.perf_counter() - started) * turns > 60 * taken:
                    tqdm.write(f"{name}: {turns} turns or more, by the first {taken} of them about {seconds * turns / taken / 60:.0f} minutes")
                turns = 0  # told once

        policy = make_policy(tasks, config)
        return evaluate(variant.script(policy, config) if variant.script else policy, tasks, config, embed, progress)


def parse_sweep(texts, config):
    """[{field: value}], every combination of the values in texts like "top_k=3,6"."""
    axes = []
    for text in texts:
        name, _, values = text.partition("=")
        kind = type(getattr(config, name, None))
        if not values:
            raise BadInput(f"--sweep {text}: not of the form setting=value,value")
        if name not in SWEPT:
            raise BadInput(f"--sweep {text}: {name} cannot be swept; these can: {', '.join(SWEPT)}")
        try:
            axes.append([(name, kind(value)) for value in values.split(",")])
        except ValueError as error:
            raise BadInput(f"--sweep {text}: {error}") from error
    return [dict(combination) for combination in itertools.product(*axes)]


def describe(label, config, change, variant):
    """The name of a row."""
    size = {"town": f"{config.length}x", "saved": Path(config.data).name}.get(config.task, f"{config.documents} documents")
    swept = [f"{name} {value}" for name, value in change.items() if name != "length" and (name != "documents" or config.task == "saved")]
    return " ".join(filter(None, [label, size, *swept, variant]))


def new_file(config, kind):
    """Where to save the rows: in the run's folder, under a name that is not taken yet."""
    size = [] if config.task in ("town", "saved") or any(one.startswith("documents=") for one in kind) else [f"documents={config.documents}"]
    stem = "-".join(["evaluation", *kind, *size])
    out = Path("runs") / config.name / f"{stem.replace('/', '_')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        if not out.exists():
            break
        out = out.with_name(f"{stem.replace('/', '_')}-{number}.json")
    return out


def make_judge(config, model, url):
    """The judge that --judge and --judge_endpoint name."""
    if not (url or config.endpoint):
        raise BadInput("--judge needs the URL of a server that has that model: --judge_endpoint, or --endpoint")
    return Judge(Endpoint(url or config.endpoint, model, Path("runs") / config.name / "verdicts.jsonl", config.in_flight, fresh=config.overwrite))


FLAGS = [
    ("--runs", dict(nargs="+", default=[], metavar="RUN", help="run folders to compare (default: SFT and GRPO of --name)")),
    ("--sweep", dict(nargs="+", metavar="SETTING=A,B", help="all combinations of these settings (default: length=1,2,4 in the town)")),
    ("--ablate", dict(action="store_true", help="switch operations off one by one, at test time")),
    ("--baselines", dict(action="store_true", help="the same model with the full text, RAG, a scratchpad alone, and no memory")),
    ("--judge", dict(metavar="MODEL", help="also let this model judge the answers; it is asked at --judge_endpoint")),
    ("--judge_endpoint", dict(metavar="URL", help="the judge's OpenAI-compatible server (default: --endpoint)")),
    ("--ask", dict(action="append", metavar="QUESTION", help="answer this question, and others, about --file, and do nothing else")),
    ("--file", dict(help="the text to read for --ask: .txt, .md, .jsonl")),
    ("--memory", dict(metavar="FILE", help="with --file: save the memory here; without: ask the memory saved here")),
    ("--trace", dict(type=int, default=0, metavar="N", help="print N episodes turn by turn")),
    ("--html", dict(metavar="FILE", help="write a page that replays the episodes of all policies (20 tasks, or --trace N)")),
    ("--curves", dict(nargs="+", metavar="METRICS", help="draw curves.png from GRPO runs' metrics.jsonl, and do nothing else")),
    ("--gold", dict(action="store_true", help="the scripted demonstrator in place of the model")),
]


def check_flags(config, extra):
    """BadInput for flags that do not go together."""
    for wrong, complaint in (
            (extra["trace"] < 0, f"--trace {extra['trace']}: a number of episodes, 1 or more"),
            (extra["html"] and (extra["ablate"] or extra["baselines"] or extra["ask"] or extra["sweep"]),
             "--html compares policies on the same tasks: it goes with no --ablate, --baselines, --sweep or --ask"),
            (extra["ablate"] and extra["baselines"], "--ablate and --baselines are two tables: give one of them"),
            ((extra["file"] or extra["memory"]) and not extra["ask"], "--file and --memory are for --ask: there is no question"),
            (extra["gold"] and extra["ask"], "--gold knows nothing of your own text: --ask needs a model"),
            (extra["gold"] and extra["baselines"] and config.task == "town", "the town's script does not play the baselines"),
            (extra["runs"] and config.endpoint, "--runs are models here, --endpoint is a server: give one of them")):
        if wrong:
            raise BadInput(complaint)


def main():
    config, extra = parse_args("Evaluation.", default_run=latest_run, extra=FLAGS)
    if extra["curves"]:
        return draw_curves(extra["curves"], "curves.png")
    check_one_process("evaluate.py")
    check_flags(config, extra)
    if extra["html"]:
        check_new_file("--html", extra["html"], config.overwrite)
    device = Accelerator(cpu=config.cpu).device
    set_seed(config.seed)
    judge = make_judge(config, extra["judge"], extra["judge_endpoint"]) if extra["judge"] else None
    variants = ABLATIONS if extra["ablate"] else BASELINES if extra["baselines"] else {"": Variant()}
    shown = extra["trace"] or bool(extra["html"])
    single = bool(len(variants) > 1 or extra["trace"] and not extra["html"] or extra["ask"])  # the last contestant alone
    sweep = extra["sweep"] or (["length=1,2,4"] if config.task == "town" and not (single or shown) else [])
    changes = parse_sweep(sweep, config)
    settings = [dataclasses.replace(config, **change) for change in changes]
    count, contestants = policies(config, extra, single, device)
    if extra["ask"]:
        [(_, make_policy)] = contestants
        return answer_questions(extra["ask"], extra["file"], extra["memory"], make_policy([], config), load_embedder(config.embedder, device), config)
    rows = []
    for now in settings:  # what cannot be done shows before anything is played
        load_embedder(now.embedder, device)
    out = None if shown else new_file(config, [name for name in ("ablate", "baselines", "gold") if extra[name]] + (extra["sweep"] or []))
    number, played = extra["trace"] or (20 if extra["html"] else config.eval_tasks), {}
    announce(settings, len(contestants), variants, number, count)
    for change, now in zip(changes, settings):
        embed, tasks = load_embedder(now.embedder, device), held_out_tasks(now, "test", number, count)
        for label, make_policy in contestants:
            unabridged = None
            for variant, how in variants.items():
                started, name = time.perf_counter(), describe(label, now, change, variant)
                episodes = play(name, make_policy, how, now, tasks, embed)
                rows.append(measure(name, episodes, time.perf_counter() - started, judge))
                unabridged = unabridged or episodes  # "all on" comes first
                if extra["ablate"]:
                    rows[-1] |= compare(unabridged, episodes)
                if extra["html"]:
                    played[name] = episodes
                elif extra["trace"]:
                    print("\n\n".join(trace(episode) for episode in episodes))
                else:
                    out.write_text(json.dumps(rows, indent=1) + "\n")  # after each row, since the next may take hours
    print(table(rows))
    if judge and judge.unclear:
        print(f"{judge.unclear} verdicts of the judge were neither yes nor no, and count as no")
    if extra["html"]:
        write_page(played, config.dialect, extra["html"])
    if out or extra["html"]:
        print(f"saved as {out or extra['html']}")


if __name__ == "__main__":
    main()
