"""The tables of docs/results.md in markdown, from the runs of results/reproduce.sh.

python results/tables.py > tables.md
"""

import json
from pathlib import Path
from statistics import mean

SEEDS = (42, 43, 44)
RATES = ("create", "read", "update", "delete", "scratchpad")


def rows(name: str, seed: int, file: str) -> dict[str, dict]:
    """{label: row} of one evaluation."""
    saved = json.loads(Path(f"runs/{name}-{seed}/evaluation-{file}.json").read_text())
    return {row["label"]: row for row in saved}


def line(title: str, name: str, file: str, label: str, rates: bool = False) -> str:
    """A table's row: the EM of each seed with its interval, their mean, and the mean rates."""
    found = [rows(name, seed, file)[label] for seed in SEEDS]
    cells = ["{em:.1f} [{low:.1f}, {high:.1f}]".format(**row) for row in found]
    cells.append(f"**{mean(row['em'] for row in found):.1f}**")
    if "lost" in found[0]:
        cells.append(f"{mean(row['lost'] for row in found):.1f}")
    if rates:
        cells += [f"{mean(row[rate] for row in found):.3f}" for rate in RATES]
    return f"| {title} | " + " | ".join(cells) + " |"


def head(*more: str) -> str:
    columns = ["", *(f"seed {seed}" for seed in SEEDS), "mean", *more]
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|"


def curves() -> str:
    """The default run's rates in the first 5 and the last 20 GRPO steps, over all seeds."""
    first, last = [], []
    for seed in SEEDS:
        text = Path(f"runs/default-{seed}/grpo/metrics.jsonl").read_text()
        steps = [json.loads(one) for one in text.splitlines()]
        first, last = first + steps[:5], last + steps[-20:]
    lines = []
    for name in ("reward", *RATES, "entries", "turns"):
        before, after = (mean(step[name] for step in part) for part in (first, last))
        lines.append(f"| {name} | {before:.3f} | {after:.3f} |")
    return "\n".join(lines)


def main():
    stages = ("sft", "grpo")
    print("### Lengths\n\n" + head())
    for stage in stages:
        for length in (1, 2, 4, 8):
            print(line(f"{stage} {length}x", "default", "length=1,2,4,8", f"{stage} {length}x"))
    print("\n### Ablations at test time\n\n" + head("points lost"))
    for label in rows("default", SEEDS[0], "ablate"):
        print(line(label.removeprefix("grpo 1x "), "default", "ablate", label))
    print("\n### Random retrieval at test time\n\n" + head())
    print(line("random entries", "default", "retrieval=random", "grpo 1x retrieval random"))
    print("\n### Operations switched off from the start\n\n" + head(*RATES))
    print(line("all on, sft", "default", "length=1,2,4,8", "sft 1x", rates=True))
    print(line("all on, grpo", "default", "length=1,2,4,8", "grpo 1x", rates=True))
    disabled = "no-update no-delete no-update-delete no-scratchpad scratchpad-alone create-read"
    for name in disabled.split() + ["no-sft"]:
        for stage in stages:
            print(line(f"{name}, {stage}", name, "length=1", f"{stage} 1x", rates=True))
    print("\n### GRPO under another setting, from the default SFT\n\n" + head(*RATES))
    for name in ("capacity=3", "capacity=4", "capacity=6", "top_k=1", "top_k=2", "top_k=8"):
        print(line(name, name, "length=1", "grpo 1x", rates=True))
    print("\n### Imitation alone\n\n" + head())
    for name in ("sft-long", "sft-full"):
        print(line(name, name, "length=1", "sft 1x"))
    print("\n### Rates in GRPO\n\n| | first 5 steps | last 20 steps |\n|---|---|---|\n" + curves())


if __name__ == "__main__":
    main()
