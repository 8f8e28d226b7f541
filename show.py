"""To look at: an episode turn by turn, and learning curves."""

import json
from pathlib import Path

import numpy as np

from agent import render
from config import BadInput


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
    return printable("\n".join(lines))


def printable(text):
    """`text` with control characters escaped: documents may hold anything, a command to the terminal too."""
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
