"""Does training teach anything? Minutes long, so out of the default run: pytest -m slow"""

import json

import pytest

import grpo
import sft
import town

SMALL = "--cpu --questions 1 --sft_tasks 5000 --sft_steps 500 --grpo_steps 40 --grpo_decay 0.5 --save_every 40".split()


@pytest.mark.slow
def test_sft_then_grpo_raise_the_score(tmp_path, monkeypatch):
    """Bug: a sign, a mask or a schedule is wrong in a way that no unit test sees, and the policy does not get better."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(town, "SENTENCES_PER_STORY", 6)  # three chunks
    for script in (sft, grpo):
        monkeypatch.setattr("sys.argv", ["script", *SMALL])
        script.main()
    (first, *_, taught), (*_, last) = [[json.loads(line) for line in open(f"runs/town/{stage}/metrics.jsonl")]
                                       for stage in ("sft", "grpo")]
    print(f"SFT loss {first['loss']:.2f} to {taught['loss']:.2f}; EM {taught['held_out_em']:.2f}, after GRPO {last['held_out_em']:.2f}")
    assert taught["loss"] < 0.1 * first["loss"] and taught["held_out_em"] > 0.3
    assert last["held_out_em"] > taught["held_out_em"] + 0.1
