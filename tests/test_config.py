import dataclasses
import json

import pytest

import config as module
from config import BadInput, Config, load_settings, parse_args


def parsed(monkeypatch, *arguments, default_run=None):
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    return parse_args("", default_run=default_run)[0]


@pytest.mark.parametrize("settings, complaint", [
    (dict(task="village"), "--task"),
    (dict(task="musique"), "--data"),
    (dict(data="x.json"), "--data"),
    (dict(disable=["forget"]), "--disable"),
    (dict(group_size=1), "--group_size"),
    (dict(temperature=0.0), "--temperature"),
    (dict(questions=11), "--questions"),
    (dict(top_k=0), "--top_k"),
    (dict(kl=-1.0), "--kl"),
    (dict(task="musique", data="x", max_prompt_tokens=900), "--max_prompt_tokens"),
])
def test_contradictions_fail_at_once(settings, complaint):
    """Bug: an impossible setting is found out an hour into the run."""
    with pytest.raises(BadInput, match=complaint):
        Config(**settings)


def test_later_sources_win(monkeypatch, tmp_path):
    """Bug: a preset or a saved run overrides what was typed on the command line."""
    (tmp_path / "config.json").write_text(Config(name="mine", top_k=3, hidden_size=64).json())
    found = parsed(monkeypatch, "--from", str(tmp_path), "--top_k", "5")
    assert (found.name, found.top_k, found.hidden_size) == ("mine", 5, 64)
    found = parsed(monkeypatch, "--preset", "paper", "--data", "x.json", "--top_k", "5")
    assert (found.model, found.top_k, found.group_size) == ("Qwen/Qwen3-8B", 5, 16)
    assert parsed(monkeypatch, default_run=lambda name: tmp_path).top_k == 3
    found = parsed(monkeypatch, "--preset", "paper", "--from", str(tmp_path), "--model", "m")
    assert (found.model, found.top_k, found.name) == ("m", 3, "mine")
    assert parsed(monkeypatch, "--model", "m").optimizer == "adamw"
    assert parsed(monkeypatch, "--task", "musique", "--data", "x").max_response_tokens == module.PRESETS["qa"]["max_response_tokens"]


def test_the_presets_are_settings():
    """Bug: a preset names a field that does not exist, or contradicts itself."""
    for preset in module.PRESETS.values():
        Config(**{"data": "x.json" if preset else "", "task": "hotpotqa" if preset else "town", **preset})


def test_saved_settings_come_back(tmp_path):
    """Bug: a run cannot be repeated from its folder, or a newer version's setting is dropped in silence."""
    saved = Config(disable=["read"], seed=7)
    (tmp_path / "config.json").write_text(saved.json())
    assert Config(**load_settings(tmp_path)) == saved
    (tmp_path / "config.json").write_text(json.dumps({"brightness": 3}))
    with pytest.raises(BadInput, match="brightness"):
        load_settings(tmp_path)


def test_help_lists_every_setting(monkeypatch, capsys):
    """Bug: a per cent sign in one field's help makes --help a traceback."""
    with pytest.raises(SystemExit) as raised:
        parsed(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert raised.value.code == 0 and "over the last 60 % (default: 0.005)" in " ".join(out.split())
    assert all(f"--{field.name}" in out for field in dataclasses.fields(Config))
