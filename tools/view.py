"""Show episodes turn by turn: as text, or as a page to click through.

    python -m tools.view                       one test episode of runs/town, printed as text
    python -m tools.view --trace 3             three of them
    python -m tools.view --html page.html      20 episodes, SFT beside GRPO, as a page that needs
                                               nothing else and works without a network
    python -m tools.view --html page.html --runs runs/a/grpo runs/b/grpo

The flags that choose what plays (--name, --from, --runs, --gold, --model ...) are those of
evaluate.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

import evaluate
from agent import TAGS, Episode, Turn, render
from config import check_new_file, need, parse_args
from memory import load_embedder
from tasks import held_out_tasks

MARKS = {"create": "created", "update": "updated", "delete": "deleted"}
SEEN = ("chunk", "question", "scratchpad", "query")


def replay(episode: Episode) -> Iterator[tuple[Turn, list[dict]]]:
    """Yields (turn, entries after it). The store is rebuilt from the operations.

    An entry is {"id", "text"}. If the turn changed it, it has a "mark": "created", "updated" (then
    "old" is the text before) or "deleted".
    """
    store = {}  # id -> text
    for turn in episode.turns:
        marks, before = {}, dict(store)
        for operation in turn.operations:
            if operation.id is not None and not operation.error:
                marks[operation.id] = MARKS[operation.kind]
                store[operation.id] = operation.text or store[operation.id]
        entries = []
        for id, text in list(store.items()):
            entry = {"id": id, "text": text}
            if id in marks:
                entry["mark"] = marks[id]
            if marks.get(id) == "updated":
                entry["old"] = before[id]
            if marks.get(id) == "deleted":
                del store[id]
            entries.append(entry)
        yield turn, entries


def trace(episode: Episode) -> str:
    """An episode as readable text, control characters escaped."""
    lines = [f"=== {episode.task.id}: reward {episode.reward:.2f}"]
    for number, (turn, entries) in enumerate(replay(episode), start=1):
        lines += ["", f"--- turn {number}", render(turn.observation), f">>> {turn.response.text}"]
        for one in turn.operations:
            if one.error:
                lines.append(f"    not executed, {one.kind} {one.text!r}: {one.error}")
        kept = [entry for entry in entries if entry.get("mark") != "deleted"]
        memory = " | ".join(f"[{entry['id']}] {entry['text']}" for entry in kept)
        lines.append(f"    memory: {memory or '(empty)'}")
    lines.append("")
    for question, answer, score in zip(episode.task.questions, episode.answers, episode.scores):
        gold = " / ".join(question.answers)
        lines.append(f"{question.text}  answer: {answer}  gold: {gold}  score: {score:.0f}")
    return printable("\n".join(lines))


def printable(text: str) -> str:
    """`text` with control characters escaped: a document may hold terminal escape sequences."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def write_page(played: list[tuple[str, list[Episode]]], dialect: str, out: str):
    """Write one page that replays episodes. played: (label, episodes), the same tasks in each."""
    rows = [[describe(episode) for episode in episodes] for _, episodes in played]
    tags = {tag: kind for kind, tag in TAGS[dialect].items()}
    labels, tasks = [label for label, _ in played], list(zip(*rows, strict=True))
    data = {"tags": tags, "labels": labels, "tasks": tasks}
    text = json.dumps(data).replace("<", "\\u003c")  # no text can end the script that holds it
    page = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    Path(out).write_text(page.replace("DATA", text, 1), encoding="utf-8")


def describe(episode: Episode) -> dict:
    """What the page shows of an episode."""
    turns = []
    for turn, entries in replay(episode):
        seen = {name: getattr(turn.observation, name) for name in SEEN}
        seen |= {"shown": [vars(entry) for entry in turn.observation.entries]}
        seen |= {"response": turn.response.text, "cut": turn.response.truncated}
        operations = [vars(operation) for operation in turn.operations]
        seen |= {"operations": operations, "entries": entries, "position": turn.position}
        turns.append(seen)
    questions = [
        {"text": question.text, "gold": question.answers, "answer": answer, "score": score}
        for question, answer, score in zip(episode.task.questions, episode.answers, episode.scores)
    ]
    row = {"id": episode.task.id, "reward": episode.reward, "chunks": len(episode.task.chunks)}
    return row | {"questions": questions, "turns": turns, "scratchpad": episode.memory.scratchpad}


FLAGS = evaluate.RUN_FLAGS + [
    ("--trace", dict(type=int, metavar="N", help="play N tasks (default: 1; with --html 20)")),
    ("--html", dict(metavar="FILE", help="write a page with all policies, not text")),
]


def main():
    config, args = parse_args("Episodes, turn by turn.", FLAGS, default_runs=("grpo", "sft"))
    need(args.trace is None or args.trace > 0, f"--trace {args.trace}: give 1 or more")
    if args.html:
        check_new_file("--html", args.html, config.overwrite)
    device = Accelerator(cpu=config.cpu).device
    runs = evaluate.chosen_runs(config, args.start, args.runs)
    runs = runs if args.html and not args.gold else runs[-1:]
    evaluate.check_unseen(config, [] if args.gold else runs)
    contestants = evaluate.open_contestants(config, runs, device, args.gold)
    embed = load_embedder(config.embedder, device)
    number = args.trace or (20 if args.html else 1)
    tasks = held_out_tasks(config, "test", number, contestants[-1].model.count)
    how, played = evaluate.Variant(), []
    for contestant in contestants:
        label = evaluate.row_label(contestant.label, config, {})
        played.append((label, evaluate.play(label, contestant, how, config, tasks, embed)))
    if args.html:
        write_page(played, config.dialect, args.html)
        print(f"saved as {args.html}")
    else:
        print("\n\n".join(trace(episode) for episode in played[0][1]))


if __name__ == "__main__":
    main()
