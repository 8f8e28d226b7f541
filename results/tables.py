"""The tables of docs/results.md in markdown, from the rows of results/reproduce.sh.

python results/tables.py             from results/evaluations.jsonl and results/*-SEED.jsonl
python results/tables.py collect     first copy into these files what is new in runs/

A cell is "-" if its run is missing, and so is a mean over the seeds. The tables by GRPO step are
means of the seeds that there are.
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import mean

SEEDS = (42, 43, 44)
RATES = ("create", "read", "update", "delete", "scratchpad")
DISABLED = {
    "default": "all operations",
    "no-update": "all but Update",
    "no-delete": "all but Delete",
    "no-update-delete": "all but Update and Delete",
    "no-scratchpad": "all but the scratchpad",
    "scratchpad-alone": "the scratchpad alone (MemAgent's workflow)",
    "create-read": "Create and Read alone",
    "no-sft": "all operations, one SFT step",
}
CREDIT = {
    "credit-plain-8": "plain, 8 tasks per step",
    "credit-plain": "plain, 4 tasks per step",
    "credit-hide": "hide, 4 tasks per step",
    "credit-branch": "branch, 4 tasks per step",
}
IMITATION = {
    "sft-long": "2500 SFT steps, the mixture",
    "sft-full": "2000 SFT steps, the best workflow alone",
}
SETTINGS = ("default", "capacity=3", "capacity=4", "capacity=6", "top_k=1", "top_k=2", "top_k=8")
SETTINGS += ("disable=update", "disable=delete")
RATED = ("default", "capacity=3")  # their rates over the GRPO steps are shown
FILE = Path("results/evaluations.jsonl")  # {"run": "default-42", "label": "grpo 1x", "em": ...}


def load() -> dict[tuple, dict]:
    """{(run, label): row}"""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return {(row["run"], row["label"]): row for row in map(json.loads, lines)}


def collect():
    """Add the rows of runs/ to FILE, and copy the metrics that rates() and credit() need."""
    rows = load()
    for seed in SEEDS:
        for path in sorted(Path("runs").glob(f"*-{seed}/evaluation-*.json")):
            for row in json.loads(path.read_text()):
                rows[path.parent.name, row["label"]] = {"run": path.parent.name} | row
        for name in (*RATED, *CREDIT):
            run = Path(f"runs/{name}-{seed}/grpo")
            if run.with_suffix(".finished").exists():
                shutil.copy(run / "metrics.jsonl", f"results/{name}-{seed}.jsonl")
    FILE.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))


def average(found: list[dict | None], key: str, form: str) -> str:
    return "-" if None in found else format(mean(row[key] for row in found), form)


def line(rows: dict, title: str, name: str, label: str, more=(), form: str = ".3f") -> str:
    """A table's row: the EM of each seed with its interval, the mean, and the means of `more`."""
    found = [rows.get((f"{name}-{seed}", label)) for seed in SEEDS]
    cells = ["{em:.1f} [{low:.1f}, {high:.1f}]".format(**row) if row else "-" for row in found]
    cells.append(f"**{average(found, 'em', '.1f')}**")
    cells += [average(found, key, form) for key in more]
    return f"| {title} | " + " | ".join(cells) + " |"


def head(title: str, *more: str):
    columns = ["", *(f"seed {seed}" for seed in SEEDS), "mean", *more]
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def metrics_of(name: str, seed: int) -> list[dict]:
    """One dictionary per GRPO step. Empty if the run is missing."""
    path = Path(f"results/{name}-{seed}.jsonl")
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def credit(rows: dict):
    """Each way to give credit: the EM on test stories, then the held-out EM by GRPO step."""
    head("Credit")
    print(line(rows, "SFT", "credit", "sft 2x"))
    for name, title in CREDIT.items():
        print(line(rows, title, name, "grpo 2x"))
    marks = (15, 30, 45, 60, 75)
    columns = " | ".join(map(str, marks))
    print(f"\n| held-out EM after GRPO steps | {columns} | tokens per step | useless entries |")
    print("|---" * 8 + "|")
    for name, title in CREDIT.items():
        steps = [step for seed in SEEDS for step in metrics_of(name, seed)]
        if not steps:
            continue
        scores = [mean(one["held_out_em"] for one in steps if one["step"] == at) for at in marks]
        tokens = mean(one["sampled_tokens"] for one in steps)
        useless = mean(one["useless"] for one in steps if one["step"] > 65)
        cells = [*(f"{score:.3f}" for score in scores), f"{tokens:,.0f}", f"{useless:.1f}"]
        print(f"| {title} | " + " | ".join(cells) + " |")


def rates(name: str):
    """A run's rates in the first 5 and the last 20 GRPO steps."""
    print(f"\n### Rates in GRPO: {name}\n\n| | first 5 steps | last 20 steps |\n|---|---|---|")
    runs = [steps for seed in SEEDS if (steps := metrics_of(name, seed))]
    for key in ("reward", *RATES, "invalid", "entries", "turns") if runs else ():
        before = mean(step[key] for steps in runs for step in steps[:5])
        after = mean(step[key] for steps in runs for step in steps[-20:])
        print(f"| {key} | {before:.3f} | {after:.3f} |")


def main():
    if sys.argv[1:] == ["collect"]:
        collect()
    rows, stages = load(), ("sft", "grpo")
    head("Lengths")
    for label in (f"{stage} {length}x" for stage in stages for length in (1, 2, 4, 8)):
        print(line(rows, label, "default", label))
    head("Ablations at test time", "points lost")
    for name in ("all on", "- Update", "- Delete", "- Read", "- scratchpad", "- storage", "- both"):
        print(line(rows, name, "default", f"grpo 1x {name}", ["lost"], ".1f"))
    head("Random entries at test time")
    print(line(rows, "random", "default", "grpo 1x retrieval random"))
    head("Operations switched off from the start", *RATES)
    for name, title in DISABLED.items():
        print(line(rows, f"{title}: SFT", name, "sft 1x", RATES))
        print(line(rows, f"{title}: SFT + GRPO", name, "grpo 1x", RATES))
    head("GRPO under another setting, from the default SFT", *RATES)
    for name in SETTINGS:
        print(line(rows, name, name, "grpo 1x", RATES))
    head("Imitation alone")
    for name, title in IMITATION.items():
        print(line(rows, title, name, "sft 1x"))
    credit(rows)
    for name in RATED:
        rates(name)


if __name__ == "__main__":
    main()
