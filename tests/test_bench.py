import random
import sys

import pytest

import bench
from config import BadInput, Config


def test_a_ratio_says_who_is_faster(capsys, monkeypatch):
    """Bug: the ratio is upside down, or the first run, which warms up, counts."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    seconds = iter([100, 7, 1, 2, 1, 3, 1, 4])  # ours and the peer in turn

    def work():
        now[0] += next(seconds)

    bench.against("x", work, {"peer": work}, repeats=3)
    assert "ours 1 s" in (out := capsys.readouterr().out) and "3.00 x  (2.00 to 4.00)" in out


def test_the_operations_of_a_step(monkeypatch):
    """Bug: utilisation counts the padding, the embedding table, or the vocabulary at every token; or a formula that has lost a factor."""
    model, policy = bench.made_policy(Config(cpu=True), vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                      num_key_value_heads=1, intermediate_size=128)
    products = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)  # norms are next to nothing
    prompt, response = [5] * 7, [6] * 3
    by_hand = 3 * 2 * (10 * products + 3 * 1000 * 64 + 2 * 2 * 64 * 10 * 10)  # 2 for a product, attention's two of half a square each
    assert bench.model_flops(model, [(prompt, response)]) == pytest.approx(by_hand, rel=0.03)
    rows = bench.made_rows(3, (4, 9), (2, 3), random.Random(0))
    for kind in ("grpo", "sft"):
        assert bench.our_step(policy, rows, kind)()["grad_norm"] > 0


def test_the_gpu_part_on_a_cpu(capsys):
    """Bug: a command that is run once a month fails on the one machine that has a GPU."""
    bench.one_size("tiny", dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=64), cpu=True)
    assert "gpu: tiny, 4 turns: rollout" in capsys.readouterr().out


def test_the_store_without_peers(capsys, monkeypatch):
    """Bug: a benchmark that needs a package which the project does not."""
    monkeypatch.setitem(sys.modules, "langchain_community.docstore.in_memory", None)
    bench.store(count=1000)
    out = capsys.readouterr().out
    assert "left out: LangChain FAISS" in out and "one matrix-vector product" in out and "among 1 " in out
    monkeypatch.setattr("sys.argv", ["bench.py", "stores"])
    with pytest.raises(BadInput, match="no part 'stores'"):
        bench.main()
