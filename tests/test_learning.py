"""Does training teach anything? It takes minutes: run it with pytest -m slow."""

import json

import pytest

import grpo
import sft
from tasks import town

SMALL = (
    "--cpu --questions 1 --sft_tasks 5000 --sft_steps 500 --grpo_steps 40 --grpo_decay 0.5 "
    "--save_every 40"
).split()


@pytest.mark.slow
def test_sft_then_grpo_raise_the_score(tmp_path, monkeypatch):
    """Bug: a sign, a mask or a schedule is wrong in a way that no unit test sees, and the policy
    does not get better."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(town, "SENTENCES_PER_STORY", 6)  # three chunks
    for script in (sft, grpo):
        monkeypatch.setattr("sys.argv", ["script", *SMALL])
        script.main()

    def metrics(stage):
        with open(f"runs/town/{stage}/metrics.jsonl") as file:
            return [json.loads(line) for line in file]

    (first, *_, taught), (*_, last) = metrics("sft"), metrics("grpo")
    em, after = taught["held_out_em"], last["held_out_em"]
    print(
        f"SFT loss {first['loss']:.2f} to {taught['loss']:.2f}, EM {em:.2f}; GRPO: EM {after:.2f}"
    )
    assert taught["loss"] < 0.1 * first["loss"] and em > 0.3
    assert after > em + 0.1
