import dataclasses
import json
import sys
from unittest.mock import Mock

import pytest
from conftest import DATA, Scripted, make_task

import evaluate
import show
from agent import instruction, run_episodes
from config import OPERATIONS, PRESETS, BadInput, Config
from scoring import exact_match
from tasks import held_out_tasks, town_task


def test_bootstrap_interval():
    """Bug: questions of one task are resampled as if they were independent, which makes the interval too narrow."""
    low, high = evaluate.bootstrap([0, 4] * 50, [4, 4] * 50)
    assert low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)
    assert list(evaluate.bootstrap([3, 3], [3, 3])) == [1, 1]


def test_a_row_counts_every_question(config, embed):
    """Bug: only the first question or task of a batch is scored, or unanswered questions leave the denominator."""
    tasks = [make_task(["a"], (f"Q{n}a?", f"Q{n}b?"), ("Ben", "the Red Cat")) for n in range(3)]
    script = {"Q0a?": ["", "<answer>ben</answer>", "<answer>cat</answer>"], "Q1a?": [], "Q2a?": ["", "", "<answer>red cat</answer>"]}
    row = evaluate.measure("x", run_episodes(tasks, Scripted(script), config, embed, exact_match), 1.0)
    assert row["questions"] == 6 and row["tasks"] == 3
    assert row["em"] == pytest.approx(100 * 2 / 6) and row["f1"] == pytest.approx(100 * (2 + 2 / 3) / 6)
    assert row["turns"] == pytest.approx(9 / 3) and row["answer"] == pytest.approx(3 / 9)
    assert "x" in evaluate.table([row])


def test_the_trace_replays_the_memory(config, embed):
    """Bug: the memory shown after a turn is not what the store held."""
    script = ["<create_memory>Anna has a cat</create_memory><create_memory>Ben</create_memory><read_memory>cat</read_memory>",
              "<update_memory>1: Anna has a dog</update_memory><delete_memory>7</delete_memory>", "<answer>Ben</answer>"]
    [episode] = run_episodes([make_task(["one", "two"])], Scripted({"Who?": script}), config, embed, exact_match)
    text = show.trace(episode)
    assert "memory: [0] Anna has a dog | [1] Ben" in text and "not executed, delete" in text
    assert "answer: Ben  gold: Ben  score: 1" in text


def test_the_trace_cannot_command_the_terminal(config, embed):
    """Bug: a document with escape sequences in it clears the screen, or hides what the policy did."""
    [episode] = run_episodes([make_task(["a\x1b[2Jb\u202e漢字"])], Scripted({"Who?": []}), config, embed, exact_match)
    assert "a\\x1b[2Jb\\u202e漢字\n" in show.trace(episode)


@pytest.mark.parametrize("task, file", [("2wikimultihopqa", "2wikimultihopqa.json"), ("musique", "musique.jsonl")])
def test_qa_sets_are_evaluated(task, file, embed):
    """Bug: a set is scored by another set's rules, or only HotpotQA's files get through evaluate.py."""
    config = Config(**PRESETS["qa"] | dict(task=task, data=str(DATA / file), documents=20, questions=1))
    count, [(label, make_policy)] = evaluate.policies(config, {"gold": True, "runs": []}, False, "cpu")
    episodes = evaluate.play(label, make_policy, evaluate.Variant(), config, held_out_tasks(config, "test", 20, count), embed)
    row = evaluate.measure(label, episodes, 1.0)
    assert row["questions"] == 20 and row["em"] > 50 and row["f1"] >= row["em"] and row["invalid"] == 0


def test_baselines(embed):
    """Bug: a baseline sees less than it should (its window, its documents), or more: a memory, another question's documents."""
    config = Config(**PRESETS["qa"] | dict(task="hotpotqa", data=str(DATA / "hotpotqa.json"), documents=30, questions=2, max_prompt_tokens=20_000))
    count, [(label, make_policy)] = evaluate.policies(config, {"gold": True, "runs": []}, False, "cpu")

    def row(variant, **settings):
        now = dataclasses.replace(config, **settings)
        episodes = evaluate.play(label, make_policy, evaluate.BASELINES[variant], now, held_out_tasks(now, "test", 10, count), embed)
        return evaluate.measure(variant, episodes, 1.0), episodes

    full, _ = row("full context")
    assert full["em"] == 100 and full["label"] == "full context (100% of it)" and full["turns"] == 2
    part, _ = row("full context", max_prompt_tokens=4000)
    assert 0 < part["em"] < 100 and part["label"] != full["label"]
    rag, episodes = row("RAG")
    assert 0 < rag["em"] < 100 and rag["create"] > 0 and rag["entries"] == 30
    assert all(turn.observation.query == turn.observation.question for e in episodes for turn in e.turns if "<answer>" in turn.response.text)
    assert row("RAG", top_k=1)[0]["em"] < rag["em"] < row("RAG", top_k=12)[0]["em"]
    notes, _ = row("scratchpad", max_response_tokens=500)
    assert notes["em"] > 50 and notes["entries"] == 0 and notes["scratchpad"] > 0
    nothing, _ = row("no memory")
    assert nothing["em"] == 0 and nothing["turns"] == 2


def test_baselines_of_a_model(tiny, embed):
    """Bug: the script around a model asks it for no answers at all, or a trained policy's Reads and Creates get past it."""
    config = dataclasses.replace(tiny.config, eval_tasks=4)
    for variant in evaluate.BASELINES.values():
        assert len(evaluate.play("x", lambda tasks, now: tiny, variant, config, held_out_tasks(config, "test", 4, tiny.count), embed)) == 4
    wild = Scripted({"Who?": ["<delete_memory>1</delete_memory><answer>Eva</answer><create_memory>x</create_memory><answer>Ben</answer>"]})
    rag, task = evaluate.RAG(wild, config), make_task(["Ben bakes.", "Who is Eva?"])
    [episode] = run_episodes([evaluate.BASELINES["RAG"].change(task)], rag, config, embed, exact_match)
    assert episode.reward == 1 and len(episode.turns) == 4 and len(episode.memory) == 2
    assert wild.seen["Who?"][0].entries[0].text == "Who is Eva?"  # found for the question
    assert "memory" not in instruction(dataclasses.replace(config, disable=list(OPERATIONS))) and "<answer>" in instruction(config)


def test_long_work_is_announced(monkeypatch, capsys, config, embed):
    """Bug: a table of hours starts without a word, or every table of seconds with an estimate."""
    for seconds, told in ((0.5, False), (20, True)):
        clock = iter(range(10_000))
        monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock) * seconds)
        evaluate.play("x", lambda tasks, now: Scripted({task.questions[0].text: [] for task in tasks}), evaluate.Variant(), config,
                      held_out_tasks(config, "test", 3, None), embed)
        out = capsys.readouterr().out
        assert ("turns or more, by the first 3 of them about 3 minutes" in out) == told
    evaluate.announce([config, dataclasses.replace(config, length=4)], 2, {"": evaluate.Variant()}, 100, None)
    tasks = [town_task(n, "test", dataclasses.replace(config, length=length)) for length in (1, 4) for n in range(5)]
    turns = sum(len(task.chunks) + 2 for task in tasks) * 2 * 20
    assert f"4 rows of 100 tasks: about {turns} turns or more, and up to {turns * 276 / 1e6:.3g} million tokens" in capsys.readouterr().out


def test_sweeps(config):
    """Bug: a combination is left out, a value keeps the type of the command line, or a setting is swept that changes nothing."""
    assert evaluate.parse_sweep(["top_k=3,6", "eval_temperature=0.5"], config) == [
        {"top_k": 3, "eval_temperature": 0.5}, {"top_k": 6, "eval_temperature": 0.5}]
    assert evaluate.parse_sweep([], config) == [{}]
    for text in ("top_k", "top_k=", "topk=3", "top_k=three", "model=a,b", "disable=read", "sft_lr=1"):
        with pytest.raises(BadInput, match="--sweep " + text):
            evaluate.parse_sweep([text], config)


def test_no_evaluation_is_overwritten(tmp_path, monkeypatch, config):
    """Bug: a look with three tasks replaces the table of five hundred."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        out = evaluate.new_file(config, ["ablate"])
        out.write_text(json.dumps([{"number": number}]))
    files = ["evaluation-ablate.json", "evaluation-ablate-2.json", "evaluation-ablate-3.json"]
    assert [json.loads((tmp_path / "runs/town" / file).read_text())[0]["number"] for file in files] == [0, 1, 2]


def test_a_loss_is_compared_task_by_task(config, embed):
    """Bug: two ablations are compared as if they had played different tasks, so that a sure loss looks like chance."""
    tasks = [make_task(["a"], (f"Q{n}a?", f"Q{n}b?"), ("Ben", "Ben")) for n in range(40)]
    right, wrong = "<answer>Ben</answer>", "<answer>Eva</answer>"
    half = {f"Q{n}a?": ["", *[right if n < 20 else wrong] * 2] for n in range(40)}
    less = {f"Q{n}a?": ["", right if n < 20 else wrong, wrong] for n in range(40)}  # one answer less where there was any
    before, after = (run_episodes(tasks, Scripted(script), config, embed, exact_match) for script in (half, less))
    lost = evaluate.compare(before, after)
    assert lost["lost"] == 25 and 15 < lost["lost_low"] < 25 < lost["lost_high"] < 35
    apart = evaluate.bootstrap([sum(e.scores) for e in before], [2] * 40)
    assert lost["lost_high"] - lost["lost_low"] < 0.75 * 100 * (apart[1] - apart[0])
    assert evaluate.compare(before, before) == {"lost": 0, "lost_low": 0, "lost_high": 0}


@pytest.mark.parametrize("text", [None, "not json\n", '{"step": 1, "loss": 2.0}\n'])
def test_curves_of_something_else(tmp_path, monkeypatch, text):
    """Bug: a file that is missing, or no GRPO run's, ends in a traceback or in empty axes."""
    if text:
        (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", Mock())  # optional, and not needed for this
    monkeypatch.setitem(sys.modules, "matplotlib", Mock())
    with pytest.raises(BadInput, match="metrics.jsonl of GRPO runs"):
        show.draw_curves([tmp_path / "metrics.jsonl"], tmp_path / "curves.png")


def test_one_process_evaluates(monkeypatch):
    """Bug: under a launcher every process plays all the tasks, and writes the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    with pytest.raises(BadInput, match="one process"):
        evaluate.main()
