import time

import pytest

from config import BadInput, Config
from tools import bench

TINY = dict(
    vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, intermediate_size=128,
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(bench, "CPU", True)
    monkeypatch.setattr(bench, "trl_steps", lambda *_: {})


def test_a_ratio_says_who_is_faster(capsys, monkeypatch):
    """Bug: the ratio is upside down, or the first run, which warms up, counts."""
    now = 0.0
    seconds = iter([100, 7, 1, 2, 1, 3, 1, 4])  # ours and the peer in turn

    def work():
        nonlocal now
        now += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    bench.compare("x", work, {"peer": work}, repeats=3)
    out = capsys.readouterr().out
    assert "ours 1 s" in out and "3.00 x  (2.00 to 4.00)" in out


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_step_is_a_step(kind):
    """Bug: what is timed does not train."""
    model, policy = bench.made_policy(Config(cpu=True), TINY)
    samples = bench.made_samples(3, (4, 9), (2, 3))
    before = policy.model.lm_head.weight.clone()
    steps = bench.make_steps(model, policy, samples, kind)
    assert steps["ours"]()["grad_norm"] > 0
    assert not policy.model.lm_head.weight.equal(before)


def test_an_unknown_part(monkeypatch):
    """Bug: a typo is noticed after the parts before it, which take minutes."""
    monkeypatch.setattr("sys.argv", ["bench", "sft", "sfts"])
    with pytest.raises(BadInput, match="no part 'sfts'"):
        bench.main()
