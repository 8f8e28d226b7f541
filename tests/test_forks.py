"""The worked examples in forks/."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, Scripted, make_task, save_qwen3
from transformers import AutoModelForCausalLM

import agent
import evaluate
import grpo
import sft
from config import Config
from memory import Memory
from tasks import scoring
from training import distributed


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(module, *arguments): run its main function in a new folder. Returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return run


def last_line(run):
    return json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1])


def load(name):
    """The fork, imported anew."""
    sys.modules.pop(f"forks.{name}", None)
    return importlib.import_module(f"forks.{name}")


@pytest.fixture
def pin(monkeypatch):
    """forks.pin, whose changes are undone after the test."""
    monkeypatch.setattr(agent, "execute", agent.execute)
    for name in ("USAGE", "NUMBERED"):
        monkeypatch.setattr(agent, name, dict(getattr(agent, name)))
    monkeypatch.setitem(agent.TAGS, "paper", dict(agent.TAGS["paper"]))
    return load("pin")


def test_a_new_operation_is_executed(pin, config, embed):
    """Bug: after a change of the grammar or the loop, the fork's operation is not executed."""
    script = [
        "<create_memory>Ben bakes</create_memory><read_memory>Ben</read_memory>",
        "<pin_memory>1</pin_memory><pin_memory>2</pin_memory><pin_memory>Ben</pin_memory>",
    ]
    policy, task = Scripted({"Who?": script}), make_task(["one", "two"])
    [episode] = agent.run_episodes([task], policy, config, embed, scoring.exact_match)
    assert episode.memory.scratchpad == "Ben bakes"
    executed = [not operation.error for operation in episode.turns[1].operations]
    assert executed == [True, False, False]
    assert scoring.summarize(scoring.tally([episode]))["pin"] == pytest.approx(1 / 3)
    assert "<pin_memory>2</pin_memory> copies" in agent.instruction(config)


def test_a_new_operation_is_trained(pin, call):
    """Bug: a script ignores the fork's operation: it is not counted, or not a token of its own."""
    call(sft, *TINY)
    call(grpo, *TINY)
    assert "pin" in last_line("runs/town/grpo")
    [*_, newest] = sorted(Path("runs/town/grpo").glob("step-*"))
    assert "<pin_memory>" in (newest / "tokenizer.json").read_text()
    assert "grpo 1x" in call(evaluate, "--sweep", "length=1", "--eval_tasks", 2, "--cpu")


def test_a_new_task(call):
    """Bug: the fork's task is not read, demonstrated or scored, or its files replace others."""
    shelves = load("shelves")
    call(shelves)
    with pytest.raises(SystemExit, match="shelves-train.jsonl exists"):
        call(shelves)
    short = [*TINY, "--max_response_tokens", 200, "--eval_tasks", 1, "--save_every", 2]
    data = ["--task", "saved", "--data", "shelves-train.jsonl", "--questions", 3]
    data += ["--max_prompt_tokens", 2000]
    save_qwen3("base")
    call(sft, "--model", "base", *data, "--name", "shelves", *short)
    call(grpo, "--name", "shelves", *short, "--max_response_tokens", 20)
    test = ["--name", "shelves", "--data", "shelves-test.jsonl", "--cpu"]
    assert "grpo shelves-test.jsonl" in call(evaluate, *test, "--eval_tasks", 1)
    gold = ["--top_k", 6, "--task", "saved", *test[2:], "--name", "gold", "--gold"]
    gold += ["--max_prompt_tokens", 1000, "--max_response_tokens", 200]
    out = call(evaluate, *gold, "--eval_tasks", 5)
    assert float(re.search(r"shelves-test\.jsonl +([0-9.]+)", out)[1]) > 90


def test_a_new_reward(call, monkeypatch):
    """Bug: GRPO does not use the reward that the fork sets."""
    call(sft, *TINY)
    monkeypatch.setattr(agent.Episode, "reward", agent.Episode.reward)  # undone after the test
    load("frugal")
    memory = Memory()
    memory.create("a", [1.0])
    episode = agent.Episode(make_task(["a"]), memory, scores=[1.0])
    assert episode.reward == pytest.approx(0.98)
    monkeypatch.setattr("forks.frugal.right_answers", lambda episode: 1.0)
    call(grpo, "--from", "runs/town/sft", "--name", "frugal", *TINY)
    line = last_line("runs/frugal/grpo")
    assert line["reward"] == pytest.approx(1 - 0.02 * line["entries"])


def test_adapters_are_trained(call, monkeypatch):
    """Bug: all weights are trained, or the adapters are not; a checkpoint loses them, or cannot be
    resumed, or transformers cannot open it."""
    pytest.importorskip("peft")
    monkeypatch.setattr(distributed, "make_rollout_model", distributed.make_rollout_model)
    for module in (sft, grpo, evaluate):
        monkeypatch.setattr(module, "load_policy", module.load_policy)
    load("lora")
    save_qwen3("base")
    short = [*TINY, "--max_prompt_tokens", 2000, "--sft_batch", 4, "--eval_tasks", 1]
    call(sft, *short, "--model", "base", "--optimizer", "adamw")
    [*_, newest] = sorted(Path("runs/town/sft").glob("step-*"))
    base, tuned = map(AutoModelForCausalLM.from_pretrained, ("base", newest))
    ids, weights = torch.arange(8)[None], dict(tuned.named_parameters())
    assert not torch.allclose(base(ids).logits, tuned(ids).logits, atol=1e-4)
    for name, weight in base.named_parameters():
        inner = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(weight, weights[inner if inner in weights else name])
    assert sum(file.stat().st_size for file in newest.glob("*.safetensors")) < 100_000
    policy = sft.load_policy(newest, Config(max_prompt_tokens=2000))
    assert torch.equal(policy.model(ids).logits, tuned(ids).logits)
    exact = dict(policy.named_parameters())
    rounded = sft.load_policy(newest, Config(max_prompt_tokens=2000, bf16=True))
    for name, weight in rounded.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        assert "lora_" not in name or torch.equal(weight, exact[name])
    call(sft, "--resume", "runs/town/sft", "--sft_steps", 5)
    call(grpo, *short, "--max_response_tokens", 40, "--bf16", "true")
    assert "grpo 1x" in call(evaluate, "--eval_tasks", 1, "--sweep", "length=1", "--cpu")


class Reader:
    """Stores both facts, Reads the name asked, and answers "cat" if it is shown, else at random."""

    def respond(self, observations):
        return [self.reply(one) for one in observations]

    def reply(self, shown):
        text = f"<create_memory>{shown.chunk}</create_memory>"
        if shown.question and shown.query != "Anna":
            text = "<read_memory>Anna</read_memory>"
        elif shown.question:
            answer = "cat" if shown.entries else shown.rng.choice(["dog", "rat"])
            text = f"<delete_memory>1</delete_memory><answer>{answer}</answer>"
        return agent.Response(text, tokens=1, prompt_ids=[1], ids=[2], logprobs=[-1.0])


FACTS = ["Anna has a cat", "Ben has a dog"]


def test_credit_by_hiding_an_entry(config, embed):
    """Bug: an entry gets the credit of another one, or a turn that of another turn."""
    credit, task = load("credit"), make_task(FACTS, answers=["cat"])
    rest = [task] * 2, Reader(), config, embed, scoring.exact_match, 0
    episodes = credit.rollout(credit.hide, *rest)
    assert [len(episode.turns) for episode in episodes] == [4, 4]
    assert credit.credits == [{0: 1.0, 1: 0.0}] * 2  # the dog is never shown
    assert credit.logged == {"useless": 1, "sampled_tokens": 12}  # the replays have two turns each
    samples = credit.credited_samples(episodes, [0.5, 0.0], keep_all=False)
    useful, useless = (1 - credit.PRICE) / 2, -credit.PRICE / 2  # the mean of this and 0.5 or 0.0
    expected = [useful + 0.25, useless + 0.25, 0.5, 0.5, useful, useless]
    assert [sample.advantage for sample in samples] == pytest.approx(expected)


def test_branches_start_from_the_same_state(config, embed):
    """Bug: the episodes of a group differ before their first turn, or are all the same."""
    credit, task = load("credit"), make_task(FACTS, answers=["cat"])
    config.group_size, config.disable = 16, ["create"]
    rest = [task] * 16, Reader(), config, embed, scoring.exact_match, 0
    episodes = credit.rollout(credit.branch, *rest)
    assert len(episodes) == 16 * credit.REPLAYS and all(one.done for one in episodes)
    for start in range(0, len(episodes), 16):
        group = episodes[start : start + 16]
        assert len({repr(replace(one.turns[0].observation, rng=None)) for one in group}) == 1
        assert len({one.answers[0] for one in group}) == 2
    assert {len(one.turns) for one in episodes} <= {1, 2, 3, 4}
