import dataclasses
import json
from pathlib import Path

import pytest

from config import PRESETS, TASKS, BadInput, Config, check_new_file, load_settings, parse_args
from training.checkpoint import Run


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse("--flag value", ...) -> (config, other arguments), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def parse(line="", **keywords):
        monkeypatch.setattr("sys.argv", ["script.py", *line.split()])
        return parse_args("", **keywords)

    return parse


@pytest.fixture
def refused(parse, capsys):
    """refused("--flag value", ...) -> the message with which the command line is refused."""

    def refused(line, **keywords):
        with pytest.raises(SystemExit) as raised:
            parse(line, **keywords)
        message = capsys.readouterr().err
        assert raised.value.code == 2 and "Traceback" not in message
        return message

    return refused


def write_run(folder, stage="sft", **settings):
    """A run folder that has settings and nothing else."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    values = {"stage": stage} | Config(**settings).saved()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (dict(task="village"), "--task"),
        (dict(task="musique"), "--data"),
        (dict(data="x.json"), "--data"),
        (dict(disable=["forget"]), "--disable"),
        (dict(group_size=1), "--group_size"),
        (dict(temperature=0.0), "--temperature"),
        (dict(questions=11), "--questions"),
        (dict(questions=5), "--questions"),  # of the town
        (dict(top_k=0), "--top_k"),
        (dict(kl=-1.0), "--kl"),
        (dict(clip_low=1.0), "--clip_low"),
        (dict(easy_share=1.0), "--easy_share"),
        (dict(in_flight=101), "--in_flight"),
        (dict(name="a/b"), "--name"),
        (dict(grpo_decay=1.5), "--grpo_decay"),
        (dict(grpo_lr=-1e-3), "--grpo_lr"),
        (dict(max_grad_norm=0), "--max_grad_norm"),
    ],
)
def test_contradictions_fail_at_once(settings, complaint):
    """Bug: an impossible setting is noticed an hour into the run."""
    with pytest.raises(BadInput, match=complaint):
        Config(**settings)


def test_a_bad_flag_is_one_sentence(refused):
    """Bug: a mistake on the command line ends in a traceback, or is accepted."""
    assert "--group_size must be at least 2, not 1" in refused("--group_size 1")
    assert "--topk" in refused("--topk 3")
    both = dict(extra=[("--runs", dict(nargs="+"))])
    assert "--runs or --from" in refused("--runs a --from b", **both)  # whose settings?
    assert "--top" in refused("--top 3")  # no abbreviations: a new flag would change their meaning


def test_flags_win(parse):
    """Bug: a preset or a saved run overrides what was typed on the command line."""
    run = write_run("runs/old", top_k=3, hidden_size=64, grpo_lr=0.5, warmup_steps=9)

    def values(line):
        config, _ = parse(line)
        return config.top_k, config.hidden_size, config.grpo_lr, config.layers

    default = Config()
    assert values("") == (default.top_k, default.hidden_size, default.grpo_lr, default.layers)
    assert values("--top_k 5") == (5, *values("")[1:])
    preset = PRESETS["qwen3"]
    assert values("--preset qwen3 --model m")[::2] == (preset["top_k"], preset["grpo_lr"])
    assert values("--preset qwen3 --model m")[1::2] == (default.hidden_size, default.layers)
    assert values("--preset qwen3 --model m --grpo_lr 2")[::2] == (preset["top_k"], 2)
    assert values(f"--from {run}") == (3, 64, 0.5, default.layers)
    assert values(f"--from {run} --top_k 5") == (5, 64, 0.5, default.layers)


def test_an_own_instruction_is_stored_with_the_run(parse, refused):
    """Bug: the run stores the name of a file that is later changed, moved or deleted."""
    file = Path("mine.txt")
    file.write_text(" Remember what matters.\nÜber alles. ", encoding="utf-8")
    config, _ = parse("--instruction mine.txt")
    assert config.instruction == "Remember what matters.\nÜber alles."
    run = write_run("runs/old", instruction=config.instruction)
    file.unlink()
    assert parse(f"--from {run}")[0].instruction == config.instruction
    assert "mine.txt: it cannot be read" in refused("--instruction mine.txt")
    file.write_text(" ")
    assert "mine.txt is empty" in refused("--instruction mine.txt")


def test_a_flag_switches_off_what_a_run_switched_on(parse):
    """Bug: a saved True cannot be overridden, because the flag takes no value."""
    run = write_run("runs/old", gradient_checkpointing=True)
    assert parse(f"--from {run}")[0].gradient_checkpointing is True
    assert parse(f"--from {run} --gradient_checkpointing False")[0].gradient_checkpointing is False


def test_a_run_of_the_name_is_the_default_and_announced(parse, capsys):
    """Bug: a script starts from the wrong run, or does not say which run it starts from."""
    stages = ("grpo", "sft")
    write_run("runs/town/sft", top_k=2)
    write_run("runs/mine/sft", top_k=3)
    write_run("runs/mine/grpo", "grpo", top_k=9)

    def found(line, stages=stages):
        config, args = parse(line, default_runs=stages)
        start = None if args.start is None else Path(args.start).as_posix()
        assert (f"starting from {start}" in capsys.readouterr().out) == bool(start)
        return config.name, config.top_k, start

    assert found("") == ("town", 2, "runs/town/sft")
    assert found("--name mine") == ("mine", 9, "runs/mine/grpo")
    assert found("--name mine", ("sft",)) == ("mine", 3, "runs/mine/sft")
    assert found("--name mine --top_k 5") == ("mine", 5, "runs/mine/grpo")
    # A run that is named by its folder keeps its name, but for --name.
    assert parse("--from runs/mine/sft", default_runs=stages)[0].name == "mine"
    assert parse("--from runs/mine/sft --name b", default_runs=stages)[0].name == "b"
    # Nothing is picked up for another name, or beside a preset or a model.
    top_k = Config().top_k
    assert found("--name mine", ()) == ("mine", top_k, None)
    assert found("--name other") == ("other", top_k, None)
    assert found("--name mine --preset town") == ("mine", top_k, None)
    parse("--name mine --model m", default_runs=stages)
    assert "runs/mine/grpo is not used, because" in capsys.readouterr().out.replace("\\", "/")
    # evaluate.py's --runs: the settings of a table are those of the first run
    flags = [("--runs", dict(nargs="*"))]
    config, args = parse("--runs runs/mine/sft runs/town/sft", extra=flags, default_runs=stages)
    assert (config.top_k, args.start) == (3, "runs/mine/sft")
    assert found("--name mine --model m") == ("mine", top_k, None)
    config, args = parse("--name mine --from runs/town/sft", default_runs=stages)
    assert (config.top_k, args.start) == (2, "runs/town/sft")


def test_a_model_or_preset_beside_a_run_is_refused(parse, refused):
    """Bug: --model is ignored because --from has a model of its own, or replaces it in silence. The
    settings of --preset are ignored because the run has stored all of its own."""
    run = write_run("runs/old")
    assert "--preset is for a new run" in refused(f"--from {run} --preset qwen3")
    assert "--preset is for a new run" in refused(f"--resume {run} --preset qwen3", resume=True)
    assert "--model is for a new run" in refused(f"--from {run} --model m")
    assert "--model is for a new run" in refused(f"--resume {run} --model m", resume=True)


def test_resume_changes_nothing_but_the_length(parse, refused):
    """Bug: a resumed run continues with other settings, so its metrics are those of two runs."""
    run = write_run("runs/old", top_k=3, seed=7)
    config, args = parse(f"--resume {run} --sft_steps 9 --save_every 2", resume=True)
    assert (config.top_k, config.seed, config.sft_steps, config.save_every) == (3, 7, 9, 2)
    assert (args.start, args.resume) == (str(run), str(run))
    assert parse(f"--resume {run} --top_k 3", resume=True)[0].top_k == 3
    message = refused(f"--resume {run} --top_k 5 --seed 8", resume=True)
    assert "another --top_k, --seed" in message
    for more in ("--name other", "--overwrite", "--from runs/old"):
        assert "no --from, --name" in refused(f"--resume {run} {more}", resume=True)
    assert "--resume" in refused(f"--resume {run}")  # a script that has no --resume


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_settings(preset):
    """Bug: a preset names a field that does not exist, contradicts itself, or has a value of
    another type, so that the run's folder cannot be read back."""
    default = Config()
    for name, value in PRESETS[preset].items():
        assert type(value) is type(getattr(default, name))
    for task in TASKS[1:] if preset != "town" else ("town",):
        data = "" if task == "town" else "x.json"
        config = Config(**PRESETS[preset] | {"task": task, "data": data})
        assert config.folder("sft") == Path("runs", task, "sft")


def test_saved_settings_come_back(tmp_path, monkeypatch):
    """Bug: a run cannot be repeated from its folder, or carries the name and the --overwrite of
    one command over to the next."""
    monkeypatch.chdir(tmp_path)
    config = Config(disable=["read"], seed=7, name="mine", overwrite=True, cpu=True)
    run = Run(config, "grpo")
    run.folder.mkdir(parents=True)
    run.write_settings()
    written = json.loads(Path("runs/mine/grpo/config.json").read_text())
    assert written["stage"] == "grpo" and not {"name", "overwrite"} & set(written)
    stage, settings = load_settings("runs/mine/grpo")
    assert stage == "grpo" and "stage" not in settings
    assert Config(**settings) == dataclasses.replace(config, name="town", overwrite=False)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"stage": "sft", "brightness": 3}', "does not know: brightness"),
        ('{"top_k": 3}', "not a run folder"),
        ("[1]", "not a run folder"),
        ("{", "not a run folder"),
        (None, "not a run folder"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(parse, refused, text, complaint):
    """Bug: a setting of another version is dropped in silence, or a folder that is no run ends in a
    traceback."""
    Path("run").mkdir()
    if text is not None:
        Path("run/config.json").write_text(text)
    with pytest.raises(BadInput, match=complaint):
        load_settings("run")
    assert complaint in refused("--from run")


def test_help_lists_every_setting(parse, capsys):
    """Bug: a per cent sign in a field's help makes --help end in a traceback."""
    with pytest.raises(SystemExit) as raised:
        parse("--help", resume=True)
    out = capsys.readouterr().out
    assert raised.value.code == 0
    assert "over the last 60 % (default: 0.005)" in " ".join(out.split())
    names = [field.name for field in dataclasses.fields(Config)]
    assert all(f"--{name}" in out for name in [*names, "preset", "from", "resume"])


def test_a_scripts_own_flags_are_no_settings(parse):
    """Bug: a flag of one script ends up in the settings, or hides one of them."""
    config, args = parse("--out x.jsonl --top_k 7", extra=[("--out", dict(default="y"))])
    assert (config.top_k, args.out, args.start) == (7, "x.jsonl", None)
    assert not hasattr(args, "top_k")


def test_a_file_is_overwritten_only_on_request(tmp_path):
    """Bug: an old file is lost, or a missing folder is noticed only after the work."""
    check_new_file("--out", tmp_path / "new", overwrite=False)
    (tmp_path / "old").write_text("x")
    with pytest.raises(BadInput, match="--overwrite"):
        check_new_file("--out", tmp_path / "old", overwrite=False)
    check_new_file("--out", tmp_path / "old", overwrite=True)
    with pytest.raises(BadInput, match="there is no folder"):
        check_new_file("--out", tmp_path / "nowhere" / "new", overwrite=True)
