"""The learning curves of GRPO runs as a picture.

    python -m tools.plot curves.png results/default-4?.jsonl       the mean and range of three runs
It needs matplotlib.
"""

import json
import sys
from pathlib import Path
from statistics import mean

from config import BadInput, need

PANELS = {
    "score": ["reward", "held_out_em"],
    "operations per response": ["create", "read", "scratchpad"],
    "rarer operations": ["update", "delete"],
    "per episode": ["turns", "tokens"],
    "shares": ["dead_groups", "truncated", "invalid"],
    "sampler against trainer": ["logprob_diff"],
}


def read_metrics(file: str) -> list[dict]:
    """The steps of a GRPO run, without a torn last line. Raises BadInput if `file` has none."""
    try:
        steps = [json.loads(line) for line in Path(file).read_text().split("\n")[:-1]]
    except (OSError, ValueError):
        steps = []
    need(steps and "reward" in steps[0], f"{file} is not the metrics.jsonl of a GRPO run")
    return steps


def draw_curves(files: list[str], out: str):
    """Draw the panels above against the GRPO steps: the mean and the range over `files`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise BadInput("tools.plot needs matplotlib: pip install matplotlib") from error
    lines = [line for file in files for line in read_metrics(file)]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items()):
        for name in names:
            points = {}  # step -> the value in each run
            for line in lines:
                if name in line:
                    points.setdefault(line["step"], []).append(line[name])
            steps, values = sorted(points), [points[step] for step in sorted(points)]
            axis.plot(steps, [mean(one) for one in values], label=name)
            axis.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2)
        axis.set(title=title, xlabel="GRPO step", ylim=(0, None))
        axis.legend()
    figure.savefig(out, dpi=110)
    print(f"drawn from {len(files)} run(s) as {out}")


def main():
    need(len(sys.argv) > 2, "usage: python -m tools.plot PICTURE.png METRICS.jsonl ...")
    out, *files = sys.argv[1:]
    need(not Path(out).exists(), f"{out} exists: name another file")
    draw_curves(files, out)


if __name__ == "__main__":
    main()
