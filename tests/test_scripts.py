"""The scripts from the command line, with tiny settings, and what they say to bad input.

Most tests call main functions in this process: starting another one takes seconds.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA, ROOT, TINY, save_qwen3, save_set
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent import KINDS
from chat import Chat
from config import Config
from tasks.qa import QATasks

HOTPOT = str(DATA / "hotpotqa.json")
QA = ["--task", "hotpotqa", "--data", HOTPOT, "--documents", 12, "--questions", 1]
QA += ["--chunk_tokens", 600, "--max_prompt_tokens", 2000, "--max_response_tokens", 300]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(module, *arguments): run its main function in a new folder. Returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        capsys.readouterr()
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


def start(script, *arguments, folder):
    """The script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def settings(run):
    return json.loads((Path(run) / "config.json").read_text())


def check_runs(name):
    """runs/NAME holds the runs of both stages, with all their metrics."""
    for stage, steps in (("sft", 4), ("grpo", 2)):
        run = Path("runs") / name / stage
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == steps and settings(run)["stage"] == stage
        checkpoint = run / (run / "latest").read_text().strip()
        AutoModelForCausalLM.from_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(checkpoint)
    names = "reward em turns tokens dead_groups truncated invalid entries tokens_per_second lr"
    assert {*names.split(), *KINDS, "held_out_em", "bad_steps"} <= set(lines[-1])
    of_updates = set("loss grad_norm entropy ratio logprob_diff clipped kl".split())
    for line in lines:  # such a bad policy may win nothing at all, and then there is no update
        assert of_updates & set(line) == (set() if line["dead_groups"] == 1 else of_updates)


# --- from end to end ------------------------------------------------------------------------------
def test_the_town_from_end_to_end(call):
    """Bug: a script does not find what the one before it has left, or forgets its settings."""
    assert "next: python grpo.py --from runs/town/sft" in call("sft", *TINY, "--top_k", 3)
    assert "next: python evaluate.py --from runs/town/grpo" in call("grpo", *TINY)
    assert settings("runs/town/sft")["top_k"] == settings("runs/town/grpo")["top_k"] == 3
    check_runs("town")
    out = call("evaluate", "--eval_tasks", 2, "--cpu")
    assert all(f"{stage} {size}x" in out for stage in ("sft", "grpo") for size in (1, 2, 4))
    rows = json.loads(Path("runs/town/evaluation.json").read_text())
    assert len(rows) == 6 and all(row["low"] <= row["em"] <= row["high"] for row in rows)
    out = call("evaluate", "--eval_tasks", 1, "--ablate", "--cpu")
    rows = ("all on", "- Update", "- Delete", "- Read", "- scratchpad", "- storage", "- both")
    assert all(f"grpo 1x {row}" in out for row in rows)
    out = call("tools.view", "--trace", 1, "--cpu")
    assert "Text: " in out and "memory: " in out and "gold: " in out
    out = call("evaluate", "--from", "runs/town/sft", "--sweep", "length=1", "--eval_tasks", 1)
    assert "sft 1x" in out and "grpo" not in out
    call("grpo", "--from", "runs/town/sft", "--name", "b", *TINY)
    assert Path("runs/b/grpo/latest").exists()


def test_a_qa_file_from_end_to_end(call):
    """Bug: the QA path works in parts, but not from the command line."""
    save_qwen3("base")
    short = [*TINY, "--eval_tasks", 1, "--save_every", 2]
    call("sft", *short, *QA, "--model", "base")
    out = call("grpo", "--name", "hotpotqa", *short)
    assert "next: python evaluate.py --from runs/hotpotqa/grpo --data TEST_FILE" in out
    check_runs("hotpotqa")
    with pytest.raises(SystemExit, match="was trained on"):
        call("evaluate", "--name", "hotpotqa")
    Path("dev.json").write_text(Path(HOTPOT).read_text())
    out = call("evaluate", "--name", "hotpotqa", "--data", "dev.json", "--eval_tasks", 1, "--cpu")
    assert "grpo 12 documents" in out
    out = call("evaluate", *QA, "--name", "x", "--eval_tasks", 10, "--gold", "--cpu")
    assert "demonstrator 12 documents" in out


def test_a_saved_set(call):
    """Bug: one's own set cannot be evaluated, or not by the baselines."""
    save_set(
        map(QATasks(Config(task="hotpotqa", data=HOTPOT, documents=12), "test"), range(3)), "set"
    )
    saved = ["--task", "saved", "--data", "set", "--chunk_tokens", 300]
    saved += ["--max_prompt_tokens", 2000, "--max_response_tokens", 300]
    out = call("evaluate", *saved, "--eval_tasks", 3, "--gold", "--baselines", "--cpu")
    rows = ("AtomMem", "full context", "RAG", "scratchpad", "no memory")
    assert all(f"set {row}" in out for row in rows)


def test_from_a_teacher_to_an_answer(call):
    """Bug: the tools beside the main path work in parts, but not from the command line."""
    call("sft", *TINY)
    [*_, teacher] = sorted(Path("runs/town/sft").glob("step-*"))
    recorded = ["--demonstrations", "taught.jsonl", "--keep_score", 0]
    short = ["--sft_tasks", 3, "--max_response_tokens", 10, "--max_prompt_tokens", 256]
    out = call("tools.teach", "--model", teacher, *recorded, *short, "--cpu")
    assert "taught.jsonl: 3 of 3 episodes are good enough" in out
    lines = Path("taught.jsonl").read_text().splitlines()
    lines.append(
        '{"task": "one", "score": 1, "turns": [{"prompt": "a", "response": "<answer>"}]}'
    )  # an untrained teacher may only write turns that were cut
    Path("taught.jsonl").write_text("\n".join(lines) + "\n")
    call("sft", *TINY, *recorded, "--name", "pupil")
    assert settings("runs/pupil/sft")["demonstrations"] == "taught.jsonl"
    sweep = ["--sweep", "top_k=1,2", "retrieval=similarity,random"]
    out = call("evaluate", *sweep, "--eval_tasks", 2, "--cpu")
    assert out.count("sft 1x top_k") == 4 and "sft 1x top_k 2 retrieval random" in out
    Path("notes.txt").write_text("Anna lives in Rome.\nAnna is a baker.\n" * 5)
    questions = ["Where does Anna live?", "What is the job of Anna?"]
    ask = ["tools.ask", *questions, "--from", "runs/town/sft", "--memory", "m", "--cpu"]
    out = call(*ask, "--file", "notes.txt")
    assert "What is the job of Anna?\n  " in out and "entries saved as m" in out
    assert "What is the job of Anna?\n  " in call(*ask)


# --- models ---------------------------------------------------------------------------------------
def test_the_released_checkpoint(call, monkeypatch):
    """Bug: a pretrained Qwen3 is prompted with thinking on, without its chat template, or with the
    paper's tags."""
    save_qwen3("AtomMem")
    prompts, encode = [], Chat.encode_prompts

    def encode_and_keep(self, texts):
        rows = encode(self, texts)
        prompts.extend(map(self.tokenizer.decode, rows))
        return rows

    monkeypatch.setattr(Chat, "encode_prompts", encode_and_keep)
    sizes = ["--documents", 12, "--max_prompt_tokens", 4000, "--max_response_tokens", 20]
    model = ["--model", "AtomMem", "--dialect", "released", "--eval_tasks", 1, "--cpu"]
    assert "AtomMem 12 documents" in call("evaluate", *QA, *model, *sizes)
    assert prompts
    for prompt in prompts:
        assert prompt.startswith("<|im_start|>system\nYou read")
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert "<modify_memory>Memory 2: text</modify_memory>" in prompt
        assert "create_memory" not in prompt and "<scratchpad>" not in prompt


ANSWERS = {
    "paper": "<answer>yes</answer>",
    "released": r"<final_answer>\boxed{yes}</final_answer>",
}


@pytest.mark.parametrize("dialect", ANSWERS)
def test_a_server_in_the_models_place(call, serve, dialect):
    """Bug: with --endpoint the model is loaded here, too, or an old run is evaluated instead."""
    judging = "judged"
    server = serve(lambda chat: "yes" if judging in chat[0]["content"] else ANSWERS[dialect])
    model = ["--endpoint", server.url, "--model", "big", "--dialect", dialect, "--judge", "wise"]
    sizes = ["--documents", 12, "--eval_tasks", 3, "--max_prompt_tokens", 4000, "--cpu"]
    out = call("evaluate", *QA, *model, *sizes)
    assert "big 12 documents" in out and "100.0" in out
    assert {one["model"] for one in server.seen} == {"big", "wise"}
    with pytest.raises(SystemExit, match="cannot be trained"):
        call("sft", "--endpoint", server.url, "--model", "big", "--cpu")


def test_a_checkpoint_as_the_model(call):
    """Bug: --model cannot name a checkpoint, or takes its run for the one to continue."""
    call("sft", *TINY)
    model = ["--model", "runs/town/sft/step-000004", "--name", "b"]
    call("sft", *TINY, *model, "--sft_steps", 1)
    assert settings("runs/b/sft")["model"] == model[1] and settings("runs/town/sft")["model"] == ""
    short = ["--max_response_tokens", 10, "--eval_tasks", 1, "--sweep", "length=1"]
    assert "step-000004 1x" in call("evaluate", *model, *short)


# --- stopping, and bad input ----------------------------------------------------------------------
def test_ctrl_c_leaves_a_usable_checkpoint(call, tmp_path):
    """Bug: Ctrl-C loses a long run, or leaves a model folder that does not open."""
    call("sft", *TINY)
    flags = ["--grpo_steps", 5000, "--save_every", 5000]
    running = start("grpo.py", *TINY, *flags, folder=tmp_path)
    metrics = tmp_path / "runs/town/grpo/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert "to continue: python grpo.py --resume runs/town/grpo" in out
    latest = Path("runs/town/grpo/latest").read_text().strip()
    AutoModelForCausalLM.from_pretrained(Path("runs/town/grpo") / latest)


@pytest.mark.parametrize(
    "name, arguments, status, sentence",
    [
        ("sft", "--stpes 3", 2, "unrecognized arguments: --stpes"),
        ("sft", "--task village", 2, "--task 'village' is not one of"),
        ("sft", "--task hotpotqa", 2, "needs --data"),
        ("sft", "--disable forget", 2, "--disable 'forget' is not one of"),
        ("sft", "--from runs/none", 2, "runs/none is not a run folder"),
        ("sft", "--max_prompt_tokens 20", 1, "--max_prompt_tokens 20"),
        (
            "sft",
            f"--task hotpotqa --data {DATA / 'hotpotqa.json'} --documents 10",
            1,
            "needs a --model: a chat model",
        ),
        ("sft", "--model ./no-such-model", 1, "./no-such-model: there is no such folder"),
        ("evaluate", "--task hotpotqa --data none.json --gold", 1, "none.json: no such file"),
        ("sft", "--log_with abacus", 2, "--log_with 'abacus' is not one of"),
        ("sft", "--demonstrations none.jsonl", 1, "none.jsonl: no such file"),
        ("sft", "--keep_score 1 --sft_tasks 1 --disable read", 1, "--keep_score 1.0"),
        ("grpo", "", 1, "run sft.py"),
        ("evaluate", "", 1, "run sft.py"),
    ],
)
def test_bad_input_is_one_sentence_and_no_folder(call, capsys, name, arguments, status, sentence):
    """Bug: a mistake on the command line ends in a traceback, or leaves half a run."""
    with pytest.raises(SystemExit) as raised:
        call(name, *arguments.split(), "--cpu")
    # Python prints a sentence and exits with 1. argparse prints it itself and gives the status.
    code = raised.value.code
    assert sentence in (code if status == 1 else capsys.readouterr().err)
    assert status == 1 or code == status
    assert not Path("runs").exists()


def test_bad_input_in_a_shell(tmp_path):
    """Bug: the sentence comes with a traceback, or with exit status 0."""
    process = start("grpo.py", folder=tmp_path)
    out, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in out + errors
    assert errors.strip().splitlines()[-1].startswith("no model to start from")


def test_the_guides_example_in_python(tiny, tmp_path, monkeypatch, capsys):
    """Bug: the example in docs/guide.md no longer runs."""
    run = tmp_path / "runs" / "town" / "grpo"
    tiny.save(run / "step-000001")
    (run / "config.json").write_text(json.dumps({"stage": "grpo"} | tiny.config.saved()))
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], names)
    assert len(names["episode"].answers) == 2 and capsys.readouterr().out.startswith("[")
