import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import DATA, Scripted, make_task

import evaluate
from agent import instruction, run_episodes
from config import OPERATIONS, BadInput, Config
from evaluate import Contestant
from tasks import held_out_tasks
from tasks.scoring import exact_match
from tasks.town import town_task


class Model(Scripted):
    """A script that stands in for a LanguageModel."""

    def with_config(self, config, temperature):
        return self


def qa_config(task="hotpotqa", file="hotpotqa.json", **settings):
    sizes = dict(documents=50, questions=0, max_prompt_tokens=1536, max_response_tokens=192)
    return Config(**sizes | dict(task=task, data=str(DATA / file), top_k=6, **settings))


@pytest.fixture(scope="module")
def gold_of():
    """Function from a config to the demonstrator as a contestant. Making a tokenizer takes long."""
    made = {}

    def get(config):
        if config.data not in made:
            made[config.data] = evaluate.open_contestants(config, [], torch.device("cpu"), True)
        [contestant] = made[config.data]
        return contestant

    return get


def test_bootstrap_interval():
    """Bug: questions of one task count as independent, so the interval is too narrow."""
    low, high = evaluate.bootstrap([0, 4] * 50, [4, 4] * 50)
    assert low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)
    assert list(evaluate.bootstrap([3, 3], [3, 3])) == [1, 1]


def test_a_row_counts_every_question(config, embed):
    """Bug: only the first task of a batch is scored, or unanswered questions do not count."""
    tasks = [make_task(["a"], (f"Q{n}a?", f"Q{n}b?"), ("Ben", "the Red Cat")) for n in range(3)]
    script = {
        "Q0a?": ["", "<answer>ben</answer>", "<answer>cat</answer>"],
        "Q1a?": [],
        "Q2a?": ["", "", "<answer>red cat</answer>"],
    }
    episodes = run_episodes(tasks, Scripted(script), config, embed, exact_match)
    row = evaluate.measure("x", episodes, 1.0)
    assert row["questions"] == 6 and row["tasks"] == 3
    assert row["em"] == pytest.approx(100 * 2 / 6)
    assert row["f1"] == pytest.approx(100 * (2 + 2 / 3) / 6)
    assert row["turns"] == pytest.approx(9 / 3) and row["answer"] == pytest.approx(3 / 9)


def test_the_judge_has_its_own_column(config, embed):
    """Bug: the judge's verdicts replace exact match, or are divided by the answered questions."""
    tasks = [make_task(["a"], ("Q0?", "Q1?"), ("Ben", "Ben"))]
    script = {"Q0?": ["", "<answer>Benjamin</answer>", ""]}
    episodes = run_episodes(tasks, Scripted(script), config, embed, exact_match)
    row = evaluate.measure("x", episodes, 1.0, judge=lambda episodes: 1)
    assert row["judge"] == 50 and row["em"] == 0


def test_the_table_is_aligned(config, embed):
    """Bug: a title stands above the wrong column, or a column is lost."""
    script = {"Who?": ["", "<answer>Ben</answer>"]}
    episodes = run_episodes([make_task(["a"])], Scripted(script), config, embed, exact_match)
    row = evaluate.measure("a label of a certain length", episodes, 1.0)
    lost = row | {"judge": 12.3, "lost": 4.5, "lost_low": -1.2, "lost_high": 6.7}
    head, plain = evaluate.table([row]).splitlines()
    assert len(head) == len(plain) and "judge" not in head and "lost" not in head
    head, line = evaluate.table([lost]).splitlines()
    for title, value in (("em", "100.0"), ("judge", "12.3"), ("lost_low", "-1.2")):
        end = head.index(f" {title} ") + 1 + len(title)
        assert line[:end].endswith(f" {value}")
    assert line.endswith(" 6.7")


@pytest.mark.parametrize(
    "task, file", [("2wikimultihopqa", "2wikimultihopqa.json"), ("musique", "musique.jsonl")]
)
def test_qa_sets_are_evaluated(task, file, embed, gold_of):
    """Bug: a set is scored by another set's rules, or only HotpotQA's files can be evaluated."""
    config = qa_config(task, file, documents=20, questions=1)
    gold = gold_of(config)
    tasks = held_out_tasks(config, "test", 20, gold.model.count)
    episodes = evaluate.play("x", gold, evaluate.Variant(), config, tasks, embed)
    row = evaluate.measure("x", episodes, 1.0)
    assert row["questions"] == 20 and row["em"] > 50 and row["f1"] >= row["em"]
    assert row["invalid"] == 0


@pytest.fixture
def baseline(embed, gold_of):
    """Function from a baseline's name and settings to the demonstrator's row and episodes."""
    long = dict(max_prompt_tokens=20_000, max_response_tokens=500)
    config = qa_config(documents=30, questions=2, **long)
    gold = gold_of(config)

    def row(variant, **settings):
        now = replace(config, **settings)
        tasks = held_out_tasks(now, "test", 10, gold.model.count)
        episodes = evaluate.play(variant, gold, evaluate.BASELINES[variant], now, tasks, embed)
        return evaluate.measure(variant, episodes, 1.0), episodes

    return row


def test_full_context(baseline):
    """Bug: the full-context baseline sees less than its window holds, or the label hides that. Or
    the sentences of the town run into each other."""
    full, _ = baseline("full context")
    assert full["em"] == 100 and full["turns"] == 2
    assert full["label"] == "full context (100% of it)"
    part, _ = baseline("full context", max_prompt_tokens=1500)
    assert 0 < part["em"] < 100 and part["label"] != full["label"]
    story = town_task(0, "test", Config())
    assert evaluate.full_context(story).context == " ".join(story.chunks)


def test_rag(baseline):
    """Bug: RAG lacks documents, does not search with the question, or sees all entries."""
    rag, episodes = baseline("RAG")
    assert 0 < rag["em"] < 100 and rag["create"] > 0 and rag["entries"] == 30
    turns = [turn for episode in episodes for turn in episode.turns]
    asked = [turn.observation for turn in turns if "<answer>" in turn.response.text]
    assert asked and all(shown.query == shown.question for shown in asked)
    assert baseline("RAG", top_k=1)[0]["em"] < rag["em"] < baseline("RAG", top_k=12)[0]["em"]


@pytest.mark.parametrize("settings", [dict(max_reads=0), dict(disable=["read", "create"])])
def test_rag_can_always_search(baseline, settings):
    """Bug: RAG's own Read is refused by --max_reads 0 or --disable read, so it scores 0."""
    assert baseline("RAG", **settings)[0]["em"] == baseline("RAG")[0]["em"] > 0


def test_scratchpad_and_no_memory(baseline):
    """Bug: a baseline has a memory that it should not have."""
    notes, _ = baseline("scratchpad")
    assert notes["em"] > 50 and notes["entries"] == 0 and notes["scratchpad"] > 0
    nothing, _ = baseline("no memory")
    assert nothing["em"] == 0 and nothing["turns"] == 2


def test_baselines_of_a_model(tiny, embed):
    """Bug: a baseline that the demonstrator plays fails with a language model."""
    config = replace(tiny.config, eval_tasks=4)
    tasks = held_out_tasks(config, "test", 4, tiny.count)
    for variant in evaluate.BASELINES.values():
        played = evaluate.play("x", Contestant("x", tiny), variant, config, tasks, embed)
        assert len(played) == 4 and all(episode.done for episode in played)
    answering = replace(config, disable=list(OPERATIONS))
    assert "memory" not in instruction(answering) and "<answer>" in instruction(config)


def test_rag_lets_a_model_only_answer(config, embed):
    """Bug: a trained policy's own Deletes and Creates are executed while it is RAG's reader."""
    text = "<delete_memory>1</delete_memory><answer>Eva</answer><create_memory>x</create_memory>"
    wild, task = (
        Model({"Who?": [text + "<answer>Ben</answer>"]}),
        make_task(["Ben bakes.", "Who is Eva?"]),
    )
    rag = evaluate.BASELINES["RAG"]
    [episode] = evaluate.play("x", Contestant("x", wild), rag, config, [task], embed)
    assert episode.reward == 1 and len(episode.turns) == 4 and len(episode.memory) == 2
    assert wild.seen["Who?"][0].entries[0].text == "Who is Eva?"  # found for the question


def test_long_work_has_a_bar(monkeypatch, config, embed):
    """Bug: hours of work show no progress, or the bar never reaches its end."""
    bars = []

    class Bar(evaluate.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(evaluate, "tqdm", Bar)
    policy = Contestant("x", Model({"Who?": ["<read_memory>a</read_memory>"] * 9}))
    evaluate.play("x", policy, evaluate.Variant(), config, [make_task(["a", "b"])], embed)
    assert bars[0] == (3, 3)


def test_sweeps(config):
    """Bug: a combination is left out, a value stays a string, a training setting is swept, or one
    that the task ignores gives the same row several times."""
    assert evaluate.parse_sweep(["top_k=3,6", "eval_temperature=0.5"], config) == [
        {"top_k": 3, "eval_temperature": 0.5},
        {"top_k": 6, "eval_temperature": 0.5},
    ]
    assert evaluate.parse_sweep([], config) == [{}]
    for text in (
        "top_k",
        "top_k=",
        "topk=3",
        "top_k=three",
        "model=a,b",
        "disable=read",
        "sft_lr=1",
        "documents=50",
        "order=1",
        "chunk_tokens=64",
    ):
        with pytest.raises(BadInput, match="--sweep " + text):
            evaluate.parse_sweep([text], config)
    with pytest.raises(BadInput, match="top_k twice"):
        evaluate.parse_sweep(["top_k=3", "top_k=6"], config)
    with pytest.raises(BadInput, match="--sweep questions"):
        evaluate.parse_sweep(["questions=1,2"], Config(task="saved", data="x"))


def test_no_evaluation_is_overwritten(tmp_path, monkeypatch, config):
    """Bug: a quick evaluation of three tasks replaces the table of five hundred."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        out = evaluate.new_file(replace(config, overwrite=True), ["ablate"])
        out.write_text(json.dumps(number))
    names = ["evaluation-ablate.json", "evaluation-ablate-2.json", "evaluation-ablate-3.json"]
    assert [json.loads((tmp_path / "runs/town" / name).read_text()) for name in names] == [0, 1, 2]


def test_a_loss_is_compared_task_by_task(config, embed):
    """Bug: the comparison is not paired by task, so a certain loss looks random."""
    tasks = [make_task(["a"], (f"Q{n}a?", f"Q{n}b?"), ("Ben", "Ben")) for n in range(40)]
    right, wrong = "<answer>Ben</answer>", "<answer>Eva</answer>"
    half = {f"Q{n}a?": ["", *[right if n < 20 else wrong] * 2] for n in range(40)}
    less = {f"Q{n}a?": ["", right if n < 20 else wrong, wrong] for n in range(40)}
    before, after = (
        run_episodes(tasks, Scripted(script), config, embed, exact_match) for script in (half, less)
    )
    lost = evaluate.compare(before, after)
    assert lost["lost"] == 25 and 15 < lost["lost_low"] < 25 < lost["lost_high"] < 35
    apart = evaluate.bootstrap([sum(e.scores) for e in before], [2] * 40)
    assert lost["lost_high"] - lost["lost_low"] < 0.75 * 100 * (apart[1] - apart[0])
    assert evaluate.compare(before, before) == {"lost": 0, "lost_low": 0, "lost_high": 0}


def test_one_process_evaluates(monkeypatch):
    """Bug: under a launcher every process plays all tasks and writes the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    with pytest.raises(BadInput, match="one process"):
        evaluate.main()


def make_run(folder, stage, policy, **settings):
    """A finished run folder with one checkpoint."""
    checkpoint = folder / "step-000007"
    policy.save(checkpoint)
    quick = dict(sft_steps=7, grpo_steps=7, eval_tasks=2, max_response_tokens=3)
    config = Config(**quick | settings)
    (folder / "config.json").write_text(json.dumps({"stage": stage, **config.saved()}))
    (folder / "latest").write_text(checkpoint.name + "\n")
    (checkpoint / "progress.json").write_text(json.dumps({"step": 7}))


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Function that runs evaluate.py in tmp_path. Returns the rows that it saved."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--cpu", *map(str, arguments)])
        evaluate.main()
        saved = capsys.readouterr().out.split("saved as ")[1].strip()
        return json.loads((tmp_path / saved).read_text())

    return run


def test_which_runs_are_compared(call, tmp_path, tiny):
    """Bug: evaluate.py depends on a run folder's name or place, or mixes up equal labels."""
    make_run(tmp_path / "runs/town/sft", "sft", tiny)
    make_run(tmp_path / "runs/town/grpo", "grpo", tiny)
    shutil.copytree(tmp_path / "runs/town/grpo", tmp_path / "my copy")
    one = ["--sweep", "length=1"]
    assert [row["label"] for row in call(*one)] == ["sft 1x", "grpo 1x"]
    assert [row["label"] for row in call(*one, "--from", "runs/town/sft")] == ["sft 1x"]
    assert [row["label"] for row in call(*one, "--from", "my copy")] == ["grpo 1x"]
    rows = call(*one, "--runs", "my copy", "my copy", "runs/town/grpo")
    assert [row["label"] for row in rows] == ["my copy 1x", "my copy 1x", "runs/town/grpo 1x"]
    assert rows[0]["em"] == rows[1]["em"] == rows[2]["em"]
    with pytest.raises(BadInput, match="--runs or --endpoint"):
        call("--runs", "my copy", "--endpoint", "http://localhost:1")
    with pytest.raises(BadInput, match="--gold: give only one run"):
        call("--runs", "my copy", "runs/town/grpo", "--ablate")
    other = tmp_path / "other"  # its prompts would lack what the first run's have
    shutil.copytree(tmp_path / "my copy", other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"disable": []', '"disable": ["update"]'))
    with pytest.raises(BadInput, match="other was trained with another --disable than my copy"):
        call(*one, "--runs", "my copy", "other")
    shutil.rmtree(tmp_path / "runs/town/sft")
    rows = call("--ablate")
    assert [row["label"] for row in rows] == [f"grpo 1x {name}" for name in evaluate.ABLATIONS]
    assert rows[0]["lost"] == 0


def test_an_unfinished_run_says_so(tmp_path, tiny):
    """Bug: the row of a run that was stopped early cannot be told from that of a finished one."""
    make_run(tmp_path / "a", "sft", tiny, sft_steps=7)
    make_run(tmp_path / "b", "sft", tiny, sft_steps=8)
    runs = evaluate.chosen_runs(tiny.config, None, [str(tmp_path / "a"), str(tmp_path / "b")])
    labels = [
        one.label for one in evaluate.open_contestants(tiny.config, runs, torch.device("cpu"))
    ]
    assert labels == [str(tmp_path / "a"), f"{tmp_path / 'b'} step-000007"]


def test_the_training_file_is_refused(call, tmp_path, tiny, monkeypatch):
    """Bug: a run is evaluated on its own training file, whose path is spelled in another way."""
    (tmp_path / "train.json").write_text((DATA / "hotpotqa.json").read_text())
    settings = dict(task="hotpotqa", data="train.json", max_prompt_tokens=2000)
    make_run(tmp_path / "moved", "sft", tiny, **settings)
    for data in ([], ["--data", tmp_path / "train.json"]):
        with pytest.raises(BadInput, match="is the file that moved was trained on"):
            call("--from", "moved", *data)


def test_nothing_to_evaluate(call, tmp_path):
    """Bug: without any run the script ends in a traceback, or leaves a folder behind."""
    with pytest.raises(BadInput, match="run sft.py first"):
        call()
    assert not (tmp_path / "runs").exists()


def test_prompts_that_cannot_fit_are_found_first(call, tmp_path, tiny):
    """Bug: the rows before a setting that cannot be played take hours, and no table is printed."""
    make_run(tmp_path / "runs/town/sft", "sft", tiny)
    with pytest.raises(BadInput, match="longer than --max_prompt_tokens 20"):
        call("--sweep", "max_prompt_tokens=256,20")
    assert not list(tmp_path.glob("runs/town/evaluation*"))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--ablate", "--baselines"], "--ablate or --baselines"),
        (["--gold", "--baselines"], "cannot play the baselines"),
    ],
)
def test_flags_that_contradict_each_other(call, flags, sentence):
    """Bug: one of two flags is silently ignored."""
    with pytest.raises(BadInput, match=sentence):
        call(*flags)
