import json
import sys
from unittest.mock import MagicMock

import pytest

from config import BadInput
from tools import plot


@pytest.fixture
def drawn(monkeypatch):
    """{label: (steps, means)} of the curves, drawn by a stand-in for matplotlib."""
    curves, figure, axis = {}, MagicMock(), MagicMock()
    axis.plot.side_effect = lambda steps, means, label: curves.update({label: (steps, means)})
    pyplot = MagicMock()
    pyplot.subplots.return_value = figure, MagicMock(flat=[axis] * 6)
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    return curves


@pytest.mark.parametrize("text", [None, "", "not json\n", '{"step": 1, "loss": 2.0}\n'])
def test_curves_of_something_else(tmp_path, drawn, text):
    """Bug: a missing file, or that of an SFT run, ends in a traceback or in empty panels."""
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(BadInput, match="metrics.jsonl is not the metrics.jsonl of a GRPO run"):
        plot.draw_curves([tmp_path / "metrics.jsonl"], tmp_path / "curves.png")


def test_runs_of_different_lengths(tmp_path, drawn):
    """Bug: a shorter run, a rare metric or a torn last line shifts the means to other steps."""
    for name, rewards in (("a", [0.0, 0.5, 1.0]), ("b", [1.0])):
        steps = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)]
        steps[-1]["held_out_em"] = 0.25
        lines = [json.dumps(step) + "\n" for step in steps]
        (tmp_path / name).write_text("".join(lines) + '{"step": 9, "rew')
    plot.draw_curves([tmp_path / "a", tmp_path / "b"], tmp_path / "curves.png")
    assert drawn["reward"] == ([1, 2, 3], [0.5, 0.5, 1.0])
    assert drawn["held_out_em"] == ([1, 3], [0.25, 0.25])


def test_a_picture_is_not_overwritten(tmp_path, monkeypatch):
    """Bug: the curves of an earlier run are replaced without being asked."""
    (tmp_path / "curves.png").write_text("old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plot", "curves.png", "metrics.jsonl"])
    with pytest.raises(BadInput, match="curves.png exists"):
        plot.main()
