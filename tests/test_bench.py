import time

import pytest
from conftest import TINY, tiny_policy

from config import BadInput
from tools import bench


def test_a_ratio_says_who_is_faster(capsys, monkeypatch):
    """Bug: the ratio is upside down, or the first run, which warms up, counts."""
    now = 0.0
    seconds = iter([100, 7, 1, 2, 1, 3, 1, 4])  # ours and the peer in turn

    def work():
        nonlocal now
        now += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    bench.compare("x", {"ours": work, "peer": work}, repeats=3)
    ours, peer = capsys.readouterr().out.splitlines()[-2:]
    assert "ours" in ours and " 1 s" in ours and "1.00 x" in ours
    assert "peer" in peer and " 3 s" in peer and "3.00 x  (2.00 to 4.00)" in peer


def test_the_memory_of_a_run_is_its_own():
    """Bug: what earlier runs left behind counts, or what a run frees before its end does not."""

    def work():
        bytearray(200_000_000)

    assert all(0.19 < bench.measure(work)[1] < 0.25 for _ in range(2))
    assert bench.measure(lambda: None)[1] < 0.05


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_step_is_a_step(kind, monkeypatch):
    """Bug: what is timed does not train."""
    policy, compared = tiny_policy(sft_batch=3), {}
    monkeypatch.setattr(bench, "trl_steps", lambda *_: {})
    monkeypatch.setattr(bench, "compare", lambda title, work: compared.update(work))
    before = policy.model.lm_head.weight.clone()
    bench.step(policy, policy.config, kind)
    assert compared["ours"]()["grad_norm"] > 0
    assert not policy.model.lm_head.weight.equal(before)


def test_the_rollouts_are_timed(monkeypatch, capsys, tmp_path):
    """Bug: the bench does not run from the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", "rollouts", *TINY])
    bench.main()
    out = capsys.readouterr().out
    assert "a new tiny model: " in out and "generate, one batch" in out


def test_an_unknown_part(monkeypatch):
    """Bug: a typo is noticed after the parts before it, which take minutes."""
    monkeypatch.setattr("sys.argv", ["bench", "sft", "sfts"])
    with pytest.raises(BadInput, match="no part 'sfts'"):
        bench.main()
