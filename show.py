"""To look at: tables; episodes turn by turn, as text or as a page to click through; learning curves."""

import json
from pathlib import Path

import numpy as np

from agent import TAGS, render
from config import BadInput


def table(rows):
    """The rows as text, one line each."""
    rates, width = [kind for kind in TAGS["paper"] if kind != "answer"], max(24, *(len(row["label"]) for row in rows))
    lost, judged = "lost" in rows[0], rows[0]["judge"] is not None
    lines = [f"{'':{width}}{'EM':>6}  {'95 % interval':^14}{'F1':>6}{'released':>10}" + f"{'judge':>7}" * judged + f"{'questions':>11}   "
             + " ".join(f"{kind:>10}" for kind in rates) + f"{'invalid':>9}{'cut':>6}{'turns':>8}{'calls':>7}{'tokens':>8}{'seconds':>9}"
             + f"{'EM lost':>9}  {'paired 95 %':^14}" * lost,
             f"{'':{width + 52 + 7 * judged}}{'operations per response':^54}{'':15}{'per task':^32}"]
    for row in rows:
        lines.append(f"{row['label']:{width}}{row['em']:6.1f}  [{row['low']:5.1f},{row['high']:6.1f}]{row['f1']:6.1f}{row['released']:10.1f}"
                     + (f"{row['judge']:7.1f}" if judged else "") + f"{row['questions']:11d}   " + " ".join(f"{row[kind]:10.3f}" for kind in rates)
                     + f"{row['invalid']:9.3f}{row['truncated']:6.3f}{row['turns']:8.1f}{row['calls']:7.1f}{row['tokens']:8.1f}{row['seconds']:9.2f}"
                     + (f"{row['lost']:9.1f}  [{row['lost_low']:5.1f},{row['lost_high']:6.1f}]" if lost else ""))
    return "\n".join(lines)


# --- episodes ------------------------------------------------------------------------------------------------------


def replay(episode):
    """Yields (turn, entries after it) of an episode; the store is rebuilt from the operations.

    Each entry is {"id", "text"}, with "mark": "created", "updated" (then "old" is the text before) or "deleted" if the turn did that.
    """
    store = {}  # id -> text
    for turn in episode.turns:
        marks, before = {}, dict(store)
        for operation in turn.operations:
            if operation.error or operation.id is None:
                continue
            marks[operation.id] = {"create": "created", "update": "updated", "delete": "deleted"}[operation.kind]
            store[operation.id] = operation.text or store[operation.id]
        entries = [{"id": id, "text": text} | ({"mark": marks[id]} if id in marks else {}) for id, text in store.items()]
        for entry in entries:
            if entry.get("mark") == "updated":
                entry["old"] = before[entry["id"]]
            elif entry.get("mark") == "deleted":
                del store[entry["id"]]
        yield turn, entries


def trace(episode):
    """An episode as readable text, control characters escaped."""
    lines = [f"=== {episode.task.id}: reward {episode.reward:.2f}"]
    for number, (turn, entries) in enumerate(replay(episode), start=1):
        lines += ["", f"--- turn {number}", render(turn.observation), f">>> {turn.response.text}"]
        lines += [f"    not executed, {o.kind} {o.text!r}: {o.error}" for o in turn.operations if o.error]
        kept = [f"[{entry['id']}] {entry['text']}" for entry in entries if entry.get("mark") != "deleted"]
        lines.append("    memory: " + (" | ".join(kept) or "(empty)"))
    lines.append("")
    for question, answer, score in zip(episode.task.questions, episode.answers, episode.scores):
        lines.append(f"{question.text}  answer: {answer}  gold: {' / '.join(question.answers)}  score: {score:.0f}")
    return printable("\n".join(lines))


def printable(text):
    """`text` with control characters escaped: documents may hold anything, a command to the terminal too."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def write_page(played, dialect, out):
    """Write one page, which needs nothing else, that replays episodes. played: {label: episodes}, of the same tasks under each label."""
    data = {"tags": {tag: kind for kind, tag in TAGS[dialect].items()}, "labels": list(played),
            "tasks": [[describe(episode) for episode in episodes] for episodes in zip(*played.values(), strict=True)]}
    text = json.dumps(data).replace("<", "\\u003c")  # so that no text can end the script that holds it
    page = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    Path(out).write_text(page.replace("DATA", text, 1), encoding="utf-8")


def describe(episode):
    """What the page shows of an episode."""
    turns = []
    for turn, entries in replay(episode):
        seen = turn.observation
        turns.append({
            "chunk": seen.chunk, "question": seen.question, "scratchpad": seen.scratchpad, "query": seen.query, "position": turn.position,
            "shown": [{"id": entry.id, "text": entry.text} for entry in seen.entries], "entries": entries, "response": turn.response.text,
            "cut": turn.response.truncated,
            "operations": [{"kind": o.kind, "text": o.text, "number": o.number, "id": o.id, "error": o.error} for o in turn.operations]})
    questions = [{"text": question.text, "gold": question.answers, "answer": answer, "score": score}
                 for question, answer, score in zip(episode.task.questions, episode.answers, episode.scores)]
    return {"id": episode.task.id, "reward": episode.reward, "chunks": len(episode.task.chunks), "questions": questions, "turns": turns,
            "scratchpad": episode.memory.scratchpad}


# --- curves --------------------------------------------------------------------------------------------------------

PANELS = {
    "score": ["reward", "held_out_em"], "operations per response": ["create", "read", "scratchpad"], "rarer operations": ["update", "delete"],
    "per episode": ["turns", "tokens"], "shares": ["dead_groups", "truncated", "invalid"], "sampler against trainer": ["gap"],
}


def draw_curves(files, out):
    """The panels above against GRPO steps: the mean over `files` (metrics.jsonl), such as one a seed, and their range."""
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
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for axis, (title, names) in zip(axes.flat, PANELS.items()):
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
