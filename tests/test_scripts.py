"""The three scripts as a user runs them, with tiny settings, and what they say to bad input."""

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA, TINY

ROOT = Path(__file__).parent.parent
QA = ["--task", "hotpotqa", "--data", str(DATA / "hotpotqa.json"), "--documents", "20", "--questions", "1", "--chunk_tokens", "300"]


def script(name, *arguments, folder, status=0):
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout + done.stderr


def check_runs(folder, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage, steps in (("sft", 4), ("grpo", 2)):
        run = folder / "runs" / name / stage
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == steps and json.loads((run / "config.json").read_text())["name"] == name
        AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    metrics = "reward em create read update delete scratchpad turns tokens dead_groups truncated invalid tokens_per_second held_out_em"
    assert set(metrics.split()) <= set(lines[-1])
    of_updates = set("loss grad_norm entropy ratio gap clipped kl".split())
    for line in lines:  # so bad a policy may win nothing at all, and then there is no update
        assert of_updates & set(line) == (set() if line["dead_groups"] == 1 else of_updates)


def test_the_town_end_to_end(tmp_path):
    """Bug: a script does not find what the one before it has left, or forgets the settings it was made with."""
    script("sft.py", *TINY, "--top_k", 3, folder=tmp_path)
    assert json.loads((tmp_path / "runs/town/sft/config.json").read_text())["top_k"] == 3
    script("grpo.py", *TINY, folder=tmp_path)
    assert json.loads((tmp_path / "runs/town/grpo/config.json").read_text())["top_k"] == 3
    check_runs(tmp_path, "town")
    out = script("evaluate.py", "--eval_tasks", 3, "--cpu", folder=tmp_path)
    assert all(f"{stage} {length}x" in out for stage in ("sft", "grpo") for length in (1, 2, 4))
    rows = json.loads((tmp_path / "runs/town/evaluation.json").read_text())
    assert len(rows) == 6 and all(row["low"] <= row["em"] <= row["high"] for row in rows)
    out = script("evaluate.py", "--eval_tasks", 3, "--ablate", "--cpu", folder=tmp_path)
    assert all(row in out for row in ("all on", "- Update", "- Delete", "- Read", "- scratchpad", "- storage", "- both"))
    out = script("evaluate.py", "--trace", 1, "--cpu", folder=tmp_path)
    assert "Text: " in out and "memory: " in out and "gold: " in out
    out = script("evaluate.py", "--runs", "runs/town/sft", "--sweep", "length=1", "--eval_tasks", 3, "--cpu", folder=tmp_path)
    assert "runs/town/sft 1x" in out and "grpo" not in out
    script("grpo.py", "--from", "runs/town/sft", "--name", "b", *TINY, folder=tmp_path)
    out = script("sft.py", *TINY, folder=tmp_path, status=1)
    assert "--overwrite" in out and "Traceback" not in out
    script("sft.py", *TINY, "--overwrite", folder=tmp_path)


def test_a_qa_file_end_to_end(tmp_path):
    """Bug: the QA path works in parts, but not from the command line."""
    script("sft.py", *QA, *TINY, "--max_response_tokens", 100, folder=tmp_path)
    script("grpo.py", *QA, *TINY, folder=tmp_path)
    check_runs(tmp_path, "hotpotqa")
    out = script("evaluate.py", "--name", "hotpotqa", folder=tmp_path, status=1)
    assert "was trained on" in out
    (tmp_path / "dev.json").write_text((DATA / "hotpotqa.json").read_text())
    out = script("evaluate.py", *QA, "--data", "dev.json", "--eval_tasks", 2, "--cpu", folder=tmp_path)
    assert "grpo 20 documents" in out
    out = script("evaluate.py", *QA, "--eval_tasks", 10, "--gold", "--cpu", folder=tmp_path)
    assert "gold-facts demonstrator" in out


def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path):
    """Bug: stopping a long run by hand loses it, or leaves a model folder that does not open."""
    from transformers import AutoModelForCausalLM

    script("sft.py", *TINY, folder=tmp_path)
    running = subprocess.Popen([sys.executable, str(ROOT / "grpo.py"), *TINY, "--grpo_steps", "5000", "--save_every", "5000"], cwd=tmp_path,
                               stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs/town/grpo/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and "python grpo.py --resume runs/town/grpo" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/town/grpo/model")


@pytest.mark.parametrize("name, arguments, status, sentence", [
    ("sft.py", ["--stpes", "3"], 2, "unrecognized arguments: --stpes"),
    ("sft.py", ["--task", "village"], 2, "--task 'village' is not one of"),
    ("sft.py", ["--task", "hotpotqa"], 2, "needs --data"),
    ("sft.py", ["--disable", "forget"], 2, "--disable 'forget' is not one of"),
    ("sft.py", ["--from", "runs/none"], 2, "runs/none is no run folder"),
    ("sft.py", ["--max_prompt_tokens", "20"], 1, "--max_prompt_tokens 20"),
    ("sft.py", ["--model", "./no-such-model"], 1, "cannot load this model"),
    ("sft.py", ["--task", "hotpotqa", "--data", "none.json"], 1, "none.json: no such file"),
    ("grpo.py", [], 1, "run sft.py"),
    ("evaluate.py", [], 1, "run sft.py"),
])
def test_bad_input_is_one_sentence_and_no_folder(tmp_path, monkeypatch, capsys, name, arguments, status, sentence):
    """Bug: a mistake on the command line ends in a traceback, or leaves a half-written run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(name.removesuffix(".py")).main()
    code = raised.value.code  # a sentence, which the interpreter prints, with status 1; or a status, after argparse has printed
    assert sentence in (code if status == 1 else capsys.readouterr().err) and (status == 1 or code == status)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments, status", [([], 1), (["--stpes", "3"], 2)])
def test_bad_input_in_a_shell(tmp_path, arguments, status):
    """Bug: the sentence comes with a traceback, or with exit status 0."""
    out = script("grpo.py", *arguments, folder=tmp_path, status=status)
    assert "Traceback" not in out and len(out.strip().splitlines()[-1]) > 30
