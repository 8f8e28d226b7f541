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

import town
from config import Config, parse_args

ROOT = Path(__file__).parent.parent
QA = ["--task", "hotpotqa", "--data", str(DATA / "hotpotqa.json"), "--documents", "20", "--questions", "1", "--chunk_tokens", "300"]


def script(name, *arguments, folder, status=0):
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout + done.stderr


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, in a folder of its own, and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        importlib.import_module(name.removesuffix(".py")).main()
        return capsys.readouterr().out

    return run


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


def test_the_town_end_to_end(call, tmp_path):
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
    out = call("evaluate.py", "--eval_tasks", 3, "--ablate", "--cpu")
    assert all(row in out for row in ("all on", "- Update", "- Delete", "- Read", "- scratchpad", "- storage", "- both"))
    out = call("evaluate.py", "--trace", 1, "--cpu")
    assert "Text: " in out and "memory: " in out and "gold: " in out
    out = call("evaluate.py", "--runs", "runs/town/sft", "--sweep", "length=1", "--eval_tasks", 3, "--cpu")
    assert "runs/town/sft 1x" in out and "grpo" not in out
    call("grpo.py", "--from", "runs/town/sft", "--name", "b", *TINY)
    with pytest.raises(SystemExit, match="--overwrite"):
        call("sft.py", *TINY)
    call("sft.py", *TINY, "--overwrite")


def test_a_qa_file_end_to_end(call, tmp_path):
    """Bug: the QA path works in parts, but not from the command line."""
    call("sft.py", *QA, *TINY, "--max_response_tokens", 100)
    call("grpo.py", *QA, *TINY)
    check_runs(tmp_path, "hotpotqa")
    with pytest.raises(SystemExit, match="was trained on"):
        call("evaluate.py", "--name", "hotpotqa")
    (tmp_path / "dev.json").write_text((DATA / "hotpotqa.json").read_text())
    out = call("evaluate.py", *QA, "--data", "dev.json", "--eval_tasks", 2, "--cpu")
    assert "grpo 20 documents" in out
    out = call("evaluate.py", *QA, "--eval_tasks", 10, "--gold", "--cpu")
    assert "gold-facts demonstrator" in out


def test_from_a_saved_set_and_a_teacher_to_an_answer(call, tmp_path):
    """Bug: the ways beside the main one work in parts, but not from the command line."""
    out = call("tasks.py", *QA, "--eval_tasks", 3, "--out", "set.jsonl")
    assert "--task saved --data set.jsonl" in out and len((tmp_path / "set.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit, match="set.jsonl exists"):
        call("tasks.py", *QA, "--eval_tasks", 3, "--out", "set.jsonl")
    saved = ["--task", "saved", "--data", "set.jsonl", "--chunk_tokens", 300]
    out = call("evaluate.py", *saved, "--eval_tasks", 3, "--gold", "--baselines", "--cpu")
    assert all(f"set.jsonl {row}" in out for row in ("AtomMem", "full context", "RAG", "scratchpad", "no memory"))
    call("sft.py", *TINY)
    out = call("sft.py", "--teacher", "runs/town/sft", "--demonstrations", "taught.jsonl", "--sft_tasks", 3, "--keep_score", 0, "--cpu")
    assert "3 episodes, 3 of them kept" in out
    assert "taught.jsonl" in call("sft.py", *TINY, "--demonstrations", "taught.jsonl", "--keep_score", 0, "--name", "pupil")
    assert (tmp_path / "runs/pupil/sft/model").is_dir()
    out = call("evaluate.py", "--sweep", "top_k=1,2", "retrieval=similarity,random", "--eval_tasks", 2, "--cpu")
    assert out.count("sft 1x top_k") == 4 and "sft 1x top_k 2 retrieval random" in out
    (tmp_path / "notes.txt").write_text("Anna lives in Rome.\nAnna is a baker.\n" * 5)
    ask = ["evaluate.py", "--ask", "Where does Anna live?", "--ask", "What is the job of Anna?", "--model", "runs/town/sft", "--memory", "m"]
    out = call(*ask, "--file", "notes.txt", "--cpu")
    assert "What is the job of Anna?\n  " in out and "entries saved as m" in out
    assert "What is the job of Anna?\n  " in call(*ask, "--cpu")


def test_a_run_as_the_model(call, tmp_path):
    """Bug: a run given by --model is evaluated on the file that it was trained on, or replaced by the run that starts from it."""
    (tmp_path / "runs/mine/sft/model").mkdir(parents=True)
    config = Config(task="hotpotqa", data=QA[3], name="mine", max_prompt_tokens=2000)
    (tmp_path / "runs/mine/sft/config.json").write_text(config.json())
    with pytest.raises(SystemExit, match="is the file that runs/mine/sft was trained on"):
        call("evaluate.py", "--model", "runs/mine/sft", "--cpu")
    with pytest.raises(SystemExit, match="--overwrite would delete runs/mine/sft"):
        call("sft.py", "--model", "runs/mine/sft", "--name", "mine", "--overwrite", "--cpu")
    assert parse_args_of("sft.py", "--model", "runs/mine/sft").name == "hotpotqa"  # not the run's own


def parse_args_of(*argv):
    from unittest.mock import patch

    with patch("sys.argv", list(map(str, argv))):
        return parse_args("")[0]


QWEN3_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def test_the_released_checkpoint(call, tmp_path, monkeypatch):
    """Bug: a pretrained Qwen3 is prompted with thinking on, without its chat template, or with the tags of the paper."""
    from policy import LanguageModel, create_tiny, train_tokenizer

    config = Config(max_prompt_tokens=4000, max_response_tokens=100)
    tokenizer = train_tokenizer([QWEN3_TEMPLATE, *town.texts()], config, word_level=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"})
    policy = create_tiny(tokenizer, Config(max_prompt_tokens=4000, max_response_tokens=100, hidden_size=32, layers=1, heads=1))
    tokenizer.chat_template = QWEN3_TEMPLATE
    policy.save("AtomMem")
    prompts, frame = [], LanguageModel.frame

    def framed(self, texts):
        rows = frame(self, texts)
        prompts.extend(map(self.tokenizer.decode, rows))
        return rows

    monkeypatch.setattr(LanguageModel, "frame", framed)
    settings = ["--documents", 12, "--max_prompt_tokens", 4000, "--max_response_tokens", 20, "--eval_tasks", 1, "--cpu"]
    out = call("evaluate.py", "--model", "AtomMem", "--dialect", "released", *QA, *settings)
    assert "AtomMem 12 documents" in out
    for prompt in prompts:
        assert prompt.startswith("<|im_start|>system\nYou read") and prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert "<modify_memory>Memory 2: new text</modify_memory>" in prompt and "create_memory" not in prompt and "<scratchpad>" not in prompt


@pytest.mark.parametrize("dialect", ["paper", "released"])
def test_a_server_in_the_models_place(call, serve, dialect):
    """Bug: --endpoint is heeded in parts: the model is loaded here too, or an old run is evaluated in its stead."""
    answer = {"paper": "<answer>yes</answer>", "released": r"<final_answer>\boxed{yes}</final_answer>"}[dialect]
    server = serve(lambda messages: "yes" if "judged" in messages[0]["content"] else answer)
    out = call("evaluate.py", "--endpoint", server.url, "--model", "big", *QA, "--documents", 12, "--eval_tasks", 3, "--dialect", dialect,
               "--judge", "wise", "--max_prompt_tokens", 4000, "--cpu")
    assert "big 12 documents" in out and "100.0" in out and {one["model"] for one in server.seen} == {"big", "wise"}
    with pytest.raises(SystemExit, match="not trained"):
        call("sft.py", "--endpoint", server.url, "--model", "big", "--cpu")


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
