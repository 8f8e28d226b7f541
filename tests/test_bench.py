import sys

import pytest

import bench
from config import BadInput


def test_a_ratio_says_who_is_faster(capsys, monkeypatch):
    """Bug: the ratio is upside down, or the first run, which warms up, counts."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    seconds = iter([100, 7, 1, 2, 1, 3, 1, 4])  # ours and the peer in turn

    def work():
        now[0] += next(seconds)

    bench.against("x", work, {"peer": work}, repeats=3)
    assert "ours 1 s" in (out := capsys.readouterr().out) and "3.00 x  (2.00 to 4.00)" in out


def test_the_store_without_peers(capsys, monkeypatch):
    """Bug: a benchmark that needs a package which the project does not."""
    monkeypatch.setitem(sys.modules, "langchain_community.docstore.in_memory", None)
    bench.store(count=1000)
    out = capsys.readouterr().out
    assert "left out: LangChain FAISS" in out and "one matrix-vector product" in out and "among 1 " in out
    monkeypatch.setattr("sys.argv", ["bench.py", "stores"])
    with pytest.raises(BadInput, match="no part 'stores'"):
        bench.main()
