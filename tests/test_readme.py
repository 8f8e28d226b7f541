"""The README's three forks, run as they stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
    """Writes the README's script of that name into an empty folder; the function that it returns runs one there."""
    def start(name):
        [code] = re.findall(rf"```python\n(# {name}\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        assert len(code.splitlines()) < 30
        (tmp_path / name).write_text(code)

        def run(*arguments):
            done = subprocess.run([sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=200,
                                  env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        return run

    return start


def last_line(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_new_operation(run, tmp_path):
    """Bug: the grammar, the loop or the metrics have changed so that the README's seventh operation is not one any more."""
    run = run("pin.py")
    run("pin.py", "sft", *TINY)
    run("pin.py", "grpo", *TINY)
    assert "grpo 1x" in run("pin.py", "evaluate", "--sweep", "length=1", "--eval_tasks", 2, "--cpu")
    assert "pin" in last_line(tmp_path / "runs/town/grpo")
    (tmp_path / "check.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n" """
import pin
from conftest import Scripted, make_task
from agent import instruction, run_episodes
from config import Config
from memory import HashedEmbedder
from scoring import exact_match
config = Config()
script = ["<create_memory>Ben bakes</create_memory><read_memory>Ben</read_memory>", "<pin_memory>1</pin_memory><pin_memory>2</pin_memory>"]
[episode] = run_episodes([make_task(["one", "two"])], Scripted({"Who?": script}), config, HashedEmbedder(), exact_match)
assert episode.memory.scratchpad == "Ben bakes" and [bool(o.error) for o in episode.turns[1].operations] == [False, True]
assert "<pin_memory>2</pin_memory> copies" in instruction(config)
""")
    run("check.py")


def test_a_new_task(run, tmp_path):
    """Bug: the README's own task is no longer read, demonstrated or scored."""
    run = run("shelves.py")
    run("shelves.py")
    run(ROOT / "sft.py", "--task", "saved", "--data", "shelves-train.jsonl", "--questions", 3, "--name", "shelves", *TINY)
    run(ROOT / "grpo.py", "--name", "shelves", *TINY)
    test = ["--name", "shelves", "--data", "shelves-test.jsonl", "--eval_tasks", 3, "--cpu"]
    assert "grpo shelves-test.jsonl" in run(ROOT / "evaluate.py", *test)
    assert float(re.search(r"shelves-test\.jsonl +([0-9.]+)", run(ROOT / "evaluate.py", *test, "--gold"))[1]) > 90


def test_a_new_reward(run, tmp_path):
    """Bug: GRPO takes its reward from elsewhere than the README says."""
    run = run("frugal.py")
    run(ROOT / "sft.py", *TINY)
    run("frugal.py", "--from", "runs/town/sft", "--name", "frugal", *TINY)
    line = last_line(tmp_path / "runs/frugal/grpo")
    assert line["reward"] <= max(0, line["em"]) and line["dead_groups"] <= 1
    assert "reward" in run("-c", "import frugal, agent; from memory import Memory; from tasks import Question, Task\n"
                           "m = Memory(); m.create('a', [1.0]); task = Task('x', (Question('?', ('a',)),), ())\n"
                           "e = agent.Episode(task, m, scores=[1.0]); assert abs(e.reward - 0.98) < 1e-9; print('reward')")
