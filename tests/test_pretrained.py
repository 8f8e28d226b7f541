"""A real chat model: ATOMMEM_MODEL=FOLDER pytest -m slow tests/test_pretrained.py"""

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import grpo
import sft
from agent import Episode, instruction, observe, render
from config import Config
from policy import load_policy
from tasks import load_tasks

MODEL = os.environ.get("ATOMMEM_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="ATOMMEM_MODEL names no chat model: a folder or hub name"),
]


def metrics(stage):
    lines = Path(f"runs/town/{stage}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def made_up_reward(episode):
    return sum(len(turn.response.text) for turn in episode.turns) % 7 / 6


def test_a_pretrained_model_learns_the_town(tmp_path, monkeypatch, capsys):
    """Bug: what works with a tiny model fails with a real one: its template, its end token, its
    precision, its weights on disk. Takes about three minutes with a model of 135M on a CPU."""
    monkeypatch.chdir(tmp_path)

    def call(module, arguments):
        monkeypatch.setattr("sys.argv", [module.__name__, *arguments.split()])
        module.main()
        return capsys.readouterr().out

    policy = load_policy(MODEL, Config(max_prompt_tokens=1000))
    task = load_tasks(policy.config, "test", policy.count)(0)
    shown = observe(Episode(task), policy.config)
    chat = [{"role": "system", "content": instruction(policy.config)}]
    chat.append({"role": "user", "content": render(shown)})
    [(_, ids)] = policy.encode([shown])
    template = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False}
    assert ids == policy.tokenizer.apply_chat_template(chat, **template)

    sizes = "--cpu --sft_tasks 40 --sft_steps 8 --sft_batch 16 --eval_tasks 1 --sample_rows 8"
    call(sft, f"--preset smollm2 --name town --model {MODEL} {sizes}")
    losses = [line["loss"] for line in metrics("sft")]
    assert losses[1] < losses[0] and losses[-1] < losses[0] / 2
    with monkeypatch.context() as patch:  # made-up rewards: equal ones would train nothing
        patch.setattr(Episode, "reward", property(made_up_reward))
        call(grpo, f"--tasks_per_step 1 --group_size 4 --grpo_steps 1 {sizes}")
    [line] = metrics("grpo")
    assert line["logprob_diff"] < 1e-3 and line["grad_norm"] > 0 and line["bad_steps"] == 0
    assert "grpo 1x" in call(evaluate, "--eval_tasks 1 --cpu --sweep length=1")

    newest = Path("runs/town/grpo") / Path("runs/town/grpo/latest").read_text().strip()
    AutoModelForCausalLM.from_pretrained(newest)
    saved = "runs/town/sft/step-000000"  # before the first step it chats as it did
    model, tokenizer = (one.from_pretrained(saved) for one in (AutoModelForCausalLM, AutoTokenizer))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=20)[0]
    assert "Paris" in tokenizer.decode(ids)
