"""Evaluation: the table of checkpoints, with intervals; ablations at test time; traces.

    python evaluate.py                             SFT and GRPO of runs/town at 1x, 2x, 4x the training length
    python evaluate.py --ablate                    the GRPO policy with operations switched off (the paper's Table 2)
    python evaluate.py --runs runs/a/grpo runs/b/grpo             any run folders side by side, under one name's settings
    python evaluate.py --trace 2                   two episodes, turn by turn
    python evaluate.py --curves runs/*/grpo/metrics.jsonl         the learning curves as curves.png
    python evaluate.py --data hotpot_dev.json --task hotpotqa --documents 200
    python evaluate.py --gold ...                  the demonstrator in the model's place: what the workflow can reach

EM and F1 are means over questions, in per cent. The intervals are 95 % bootstrap intervals over tasks, since the questions
of one task share a memory.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from agent import TAGS, render, summarize, tally
from config import BadInput, Config, load_settings, parse_args
from memory import load_embedder
from policy import evaluate, open_policy
from run import trained_model
from sft import GoldDemonstrator, TownDemonstrator
from tasks import f1, load_tasks

# The rows of the paper's Table 2, and Read: without it no entry ever comes into view.
ABLATIONS = {"all on": [], "- Update": ["update"], "- Delete": ["delete"], "- Read": ["read"], "- scratchpad": ["scratchpad"],
             "- storage": ["create", "read", "update", "delete"], "- both": ["create", "read", "update", "delete", "scratchpad"]}


def bootstrap(sums, counts, samples=2000, seed=0):
    """95 % interval (low, high) of sum(sums) / sum(counts) when tasks are resampled. sums, counts: (tasks,)."""
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (samples, len(sums)))
    return np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])


def measure(label, episodes, config, seconds):
    """One row of the table, as a dictionary: scores in per cent, rates per response, costs per question."""
    counts = [len(episode.task.questions) for episode in episodes]
    em = [sum(episode.scores) for episode in episodes]
    yes_no = config.task != "musique"
    overlap = [sum(f1(answer, question, yes_no) for answer, question in zip(episode.answers, episode.task.questions)
                   if answer is not None) for episode in episodes]
    low, high = bootstrap(em, counts)
    row = {"label": label, "em": 100 * sum(em) / sum(counts), "low": 100 * low, "high": 100 * high,
           "f1": 100 * sum(overlap) / sum(counts), "questions": sum(counts), "tasks": len(episodes)}
    per_question = len(episodes) / sum(counts)
    summary = summarize(tally(episodes))
    return summary | row | {name: summary[name] * per_question for name in ("turns", "tokens")} | {"seconds": seconds}


def compare(before, after):
    """What `after` loses in EM against `before`, episodes of the same tasks, in points, with the paired bootstrap's interval."""
    counts = [len(episode.task.questions) for episode in before]
    lost = [sum(one.scores) - sum(other.scores) for one, other in zip(before, after, strict=True)]
    low, high = bootstrap(lost, counts)
    return {"lost": 100 * sum(lost) / sum(counts), "lost_low": 100 * low, "lost_high": 100 * high}


def table(rows):
    """The rows as text, one line each."""
    rates = [kind for kind in TAGS["paper"] if kind != "answer"]
    lost = "lost" in rows[0]
    head = f"{'':28}{'EM':>6}  {'95 % interval':^15}{'F1':>6}{'questions':>11}{'turns':>7}{'tokens':>8}   " + " ".join(
        f"{kind:>10}" for kind in rates) + f"{'invalid':>9}{'cut':>6}" + f"{'EM lost':>9}  {'paired 95 %':^15}" * lost
    lines = [head, f"{'':73}{'per question':>15}   operations per response"]
    for row in rows:
        lines.append(f"{row['label']:28}{row['em']:6.1f}  [{row['low']:5.1f}, {row['high']:5.1f}]{row['f1']:6.1f}"
                     f"{row['questions']:11d}{row['turns']:7.1f}{row['tokens']:8.1f}   "
                     + " ".join(f"{row[kind]:10.3f}" for kind in rates)
                     + f"{row['invalid']:9.3f}{row['truncated']:6.3f}"
                     + (f"{row['lost']:9.1f}  [{row['lost_low']:5.1f}, {row['lost_high']:5.1f}]" if lost else ""))
    return "\n".join(lines)


def trace(episode):
    """An episode as readable text, control characters escaped; the memory after each turn is rebuilt from the operations."""
    store, lines = {}, [f"=== {episode.task.id}: reward {episode.reward:.2f}"]
    for number, turn in enumerate(episode.turns, start=1):
        lines += ["", f"--- turn {number}", render(turn.observation), f">>> {turn.response.text}"]
        for operation in turn.operations:
            if operation.error:
                lines.append(f"    not executed, {operation.kind} {operation.text!r}: {operation.error}")
            elif operation.kind in ("create", "update"):
                store[operation.id] = operation.text
            elif operation.kind == "delete":
                del store[operation.id]
        lines.append("    memory: " + (" | ".join(f"[{id}] {text}" for id, text in store.items()) or "(empty)"))
    lines.append("")
    for question, answer, score in zip(episode.task.questions, episode.answers, episode.scores):
        lines.append(f"{question.text}  answer: {answer}  gold: {' / '.join(question.answers)}  score: {score:.0f}")
    text = "\n".join(lines)  # of documents that may hold anything, a command to the terminal too
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def draw_curves(files, out):
    """Reward, held-out EM and operation rates against GRPO steps: the mean over `files` (metrics.jsonl), and their range."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise BadInput("--curves needs matplotlib: pip install matplotlib") from error
    try:
        runs = [[json.loads(line) for line in Path(file).read_text().split("\n")[:-1]] for file in files]  # a torn last line is no step
        if any("reward" not in line for run in runs for line in run):
            raise ValueError("a step without a reward")
    except (OSError, ValueError) as error:
        raise BadInput(f"--curves needs metrics.jsonl of GRPO runs: {error}") from error
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    panels = [("score", ["reward", "held_out_em"]), ("operations per response", ["create", "read", "scratchpad"]),
              ("operations per response", ["update", "delete"])]
    for axis, (title, names) in zip(axes, panels):
        for name in names:
            points = {}  # step -> the value in each run
            for line in (line for run in runs for line in run if name in line):
                points.setdefault(line["step"], []).append(line[name])
            steps = sorted(points)
            [line] = axis.plot(steps, [np.mean(points[step]) for step in steps], label=name)
            axis.fill_between(steps, [min(points[step]) for step in steps], [max(points[step]) for step in steps],
                              alpha=0.2, color=line.get_color(), linewidth=0)
        axis.set(title=title, xlabel="GRPO step", ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"drawn from {len(files)} run(s) as {out}")


def latest_run(name):
    """The GRPO run of that name, or its SFT run while there is none."""
    grpo = Config(name=name).folder("grpo")
    return grpo if grpo.is_dir() else Config(name=name).folder("sft")


def policies(config, gold, runs, device):
    """(token counter, [(label, function from tasks to the policy that plays them)]) of all that is to be compared."""
    folders = {str(run): Path(run) / "model" for run in runs}
    for stage in ("sft", "grpo"):
        if not runs and (found := trained_model(config, stage)):
            folders[stage] = found
    if not (folders or config.model or gold):
        raise BadInput(f"nothing to evaluate: there is no model in runs/{config.name}/sft or runs/{config.name}/grpo; "
                       "run sft.py first, or give --runs, or a pretrained --model")
    for folder in folders.values() if not gold else ():
        taught = load_settings(folder.parent)["data"]
        if taught and config.data and Path(taught).resolve() == Path(config.data).resolve():
            raise BadInput(f"--data {taught} is the file that {folder.parent} was trained on: give the set's dev file")
    opened = {label: open_policy(str(folder), config).to(device) for label, folder in folders.items()}
    if not opened:  # for --gold without a model, a new one's tokenizer counts
        opened = {config.model or "new": open_policy(config.model, config).to(device)}
    count = list(opened.values())[-1].count
    if gold and config.task == "town":
        return count, [("demonstrator", lambda tasks: TownDemonstrator("full", config, noise=0.0))]
    if gold:
        return count, [("gold-facts demonstrator", lambda tasks: GoldDemonstrator(tasks, config, count))]
    return count, [(label, lambda tasks, policy=policy: policy) for label, policy in opened.items()]


def play(name, make_policy, config, number, count, embed):
    """The episodes of the first `number` test tasks."""
    stream = load_tasks(config, "test", count)
    tasks = [stream(index) for index in range(number)]
    with tqdm(total=number, desc=name, disable=None, unit="episode", leave=False) as bar:
        return evaluate(make_policy(tasks), tasks, config, embed, lambda turns, done: bar.update(done - bar.n))


def main():
    config, extra = parse_args("Evaluation.", default_run=latest_run, extra=[
        ("--runs", dict(nargs="+", default=[], metavar="RUN", help="run folders to compare (default: SFT and GRPO of --name)")),
        ("--lengths", dict(type=int, nargs="+", metavar="L",
                           help="town: story lengths (default: 1 2 4; --length with --ablate and --trace)")),
        ("--ablate", dict(action="store_true", help="switch operations off one by one, at test time")),
        ("--trace", dict(type=int, default=0, metavar="N", help="print N episodes turn by turn")),
        ("--curves", dict(nargs="+", metavar="METRICS",
                          help="draw curves.png from GRPO runs' metrics.jsonl, and do nothing else")),
        ("--gold", dict(action="store_true", help="the scripted demonstrator in place of the model"))])
    if extra["curves"]:
        return draw_curves(extra["curves"], "curves.png")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("evaluate.py works in one process: start it with python, not with a launcher")
    device = Accelerator(cpu=config.cpu).device
    set_seed(config.seed)
    count, contestants = policies(config, extra["gold"], extra["runs"], device)
    embed = load_embedder(config.embedder, device)
    if extra["trace"] < 0:
        raise BadInput(f"--trace {extra['trace']}: a number of episodes, 1 or more")
    single = extra["ablate"] or extra["trace"]
    lengths = extra["lengths"] or ([config.length] if single else [1, 2, 4])
    rows, unabridged = [], None
    for length in lengths if config.task == "town" else [config.length]:
        for label, make_policy in contestants[-1:] if single else contestants:
            size = f"{length}x" if config.task == "town" else f"{config.documents} documents"
            for variant, disabled in (ABLATIONS if extra["ablate"] else {"": []}).items():
                now = dataclasses.replace(config, length=length, disable=sorted({*config.disable, *disabled}))
                started, name = time.perf_counter(), f"{label} {size} {variant}".strip()
                episodes = play(name, make_policy, now, extra["trace"] or now.eval_tasks, count, embed)
                rows.append(measure(name, episodes, now, time.perf_counter() - started))
                if extra["ablate"]:
                    unabridged = unabridged if disabled else episodes  # "all on" comes first
                    rows[-1] |= compare(unabridged, episodes)
                if extra["trace"]:
                    print("\n\n".join(trace(episode) for episode in episodes))
    print(table(rows))
    if not (extra["trace"] or extra["gold"] or extra["runs"]):
        kind = ("-ablate" if extra["ablate"] else "") + "".join(f"-{length}x" for length in extra["lengths"] or ())
        kind += f"-{config.documents}" if config.task != "town" else ""
        out = Path("runs") / config.name / f"evaluation{kind}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"saved as {out}")


if __name__ == "__main__":
    main()
