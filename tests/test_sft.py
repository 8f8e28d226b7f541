import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from conftest import Recorder, tiny_policy

import sft
from agent import render, run_episodes
from config import BadInput, Config
from policy import Sample
from tasks import demonstrators
from tasks.demonstrators import RECORDED, TownDemonstrator, demonstrate
from tasks.scoring import exact_match
from tasks.town import town_task


def stories(config, number):
    return [town_task(index, "train", config) for index in range(number)]


def played(config, embed, number=20):
    """Episodes of the demonstrator that plays the full workflow."""
    demonstrator = TownDemonstrator("full", config)
    return run_episodes(stories(config, number), demonstrator, config, embed, exact_match)


def demonstrated(config, policy, embed, number=20):
    """The samples of one block of demonstrations."""
    blocks = [stories(config, number)]
    [samples] = sft.demonstrated_samples(blocks, config, policy, embed, main=False)
    return samples


def write_file(path, config, episodes):
    """A teacher's file, with these episodes."""
    lines = [{"settings": {name: getattr(config, name) for name in RECORDED}}]
    for episode in episodes:
        turns = [
            {"prompt": render(turn.observation), "response": turn.response.text}
            for turn in episode.turns
        ]
        lines.append({"task": episode.task.id, "score": episode.reward, "turns": turns})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- samples --------------------------------------------------------------------------------------


def test_training_prompts_equal_evaluation_prompts(tiny, config, embed):
    """Bug: SFT and the sampler render an observation differently."""
    episodes = demonstrate(stories(config, 5), config, embed, tiny)
    shown = [turn.observation for one in episodes if one.reward >= 0.5 for turn in one.turns]
    samples = demonstrated(config, tiny, embed, 5)
    trained = [sample.prompt_ids for sample in samples]
    plain = [tiny.tokenizer(render(one) + "<response>")["input_ids"] for one in shown]
    assert trained == [response.prompt_ids for response in tiny.respond(shown)] == plain


def test_prompts_that_are_too_long_are_shortened(embed):
    """Bug: SFT trains on prompts that sampling never shows, with entries that do not fit."""
    config = Config(max_prompt_tokens=40)
    policy = tiny_policy(max_prompt_tokens=40)
    samples, plain = (
        demonstrated(config, policy, embed),
        demonstrated(Config(), tiny_policy(), embed),
    )
    lengths = [len(sample.prompt_ids) for sample in plain]
    assert max(lengths) > 40 >= max(len(sample.prompt_ids) for sample in samples)


def test_responses_end_and_fit_the_limit(tiny, config, embed):
    """Bug: the end token is not trained, or SFT teaches responses that sampling cuts off."""
    samples = demonstrated(config, tiny, embed, 100)
    end = tiny.tokenizer.eos_token_id
    for sample in samples:
        assert sample.response_ids.index(end) == len(sample.response_ids) - 1
        assert len(sample.response_ids) <= config.max_response_tokens


def test_poor_demonstrations_are_dropped(tiny, embed):
    """Bug: demonstrations that score below --keep_score are learnt from, or those that reach it
    are dropped."""
    tasks, number = stories(Config(), 40), {}
    for keep_score in (0.0, 0.5, 1.0):
        config = Config(keep_score=keep_score)
        episodes = demonstrate(tasks, config, embed, tiny)
        turns = sum(len(one.turns) for one in episodes if one.reward >= keep_score)
        number[keep_score] = len(demonstrated(config, tiny, embed, 40))
        assert number[keep_score] == turns
    assert number[0.0] > number[0.5] > number[1.0] > 0


def test_a_block_without_a_good_demonstration_is_skipped(tiny, config, embed, monkeypatch):
    """Bug: a block of poor demonstrations ends the lesson, or fails."""
    monkeypatch.setattr(sft, "demonstrate", lambda tasks, *_, **__: tasks)
    good = played(config, embed, 3)
    poor = played(config, embed, 3)
    for episode in poor:
        episode.scores = [0.0] * len(episode.scores)
    blocks = list(sft.demonstrated_samples([poor, good, poor], config, tiny, embed, main=True))
    assert [len(block) for block in blocks] == [sum(len(one.turns) for one in good)]
    nothing = sft.demonstrated_samples([poor], config, tiny, embed, main=True)
    assert list(nothing) == []


def test_a_teachers_file_gives_the_same_samples(tiny, embed, tmp_path):
    """Bug: recorded and played prompts use different templates, or poor episodes of the
    file are learnt from."""
    path = tmp_path / "t.jsonl"
    config = Config(demonstrations=str(path))
    episodes = played(config, embed)
    for episode in episodes[::3]:
        episode.scores = [0.0] * len(episode.scores)
    write_file(path, config, episodes)
    good = [turn for one in episodes if one.reward >= 0.5 for turn in one.turns]
    expected = [ids for _, ids in tiny.encode([turn.observation for turn in good])]
    samples = sft.recorded_samples(config, tiny)
    assert [sample.prompt_ids for sample in samples] == expected
    assert [tiny.tokenizer.decode(sample.response_ids[:-1]) for sample in samples] == [
        tiny.tokenizer.decode(tiny.tokenizer(turn.response.text)["input_ids"]) for turn in good
    ]
    assert {sample.response_ids[-1] for sample in samples} == {tiny.tokenizer.eos_token_id}


def test_a_teachers_file_with_nothing_to_learn(tiny, embed, tmp_path):
    """Bug: a file without good episodes gives an endless loop, prompts that are too long fail in
    the middle of the training, or SFT teaches responses that sampling always cuts."""
    path = tmp_path / "t.jsonl"
    config = Config(demonstrations=str(path))
    write_file(path, config, played(config, embed, 2))
    short = Config(demonstrations=str(path), max_prompt_tokens=20)
    with pytest.raises(BadInput, match="raise --max_prompt_tokens"):
        sft.recorded_samples(short, tiny)
    short = Config(demonstrations=str(path), max_response_tokens=3)
    with pytest.raises(BadInput, match="raise --max_response_tokens"):
        sft.recorded_samples(short, tiny)
    write_file(path, config, [])
    with pytest.raises(BadInput, match="no demonstration reached --keep_score"):
        sft.make_curriculum(config, tiny, None, embed, main=False)


# --- parts --------------------------------------------------------------------------------------


def test_lessons_come_in_order_and_whole():
    """Bug: a lesson is skipped, or samples are drawn with replacement so that some are never
    seen."""
    config = Config(sft_steps=10, sft_batch=4)
    parts = [(0.3, iter([list("abcd"), list("ef")])), (0.7, iter([list(range(14))]))]
    drawn = list(sft.batches(parts, config))
    assert len(drawn) == 10 and all(len(batch) == 4 for batch in drawn)
    first, second = sum(drawn[:3], []), sum(drawn[3:], [])
    assert Counter(first) == dict.fromkeys("abcdef", 2)
    assert Counter(second) == dict.fromkeys(range(14), 2)


def test_a_pass_is_shuffled():
    """Bug: blocks come in the order of play, or every pass in the same order."""
    blocks = [list(range(20)), list(range(20, 40))]
    samples = sft.passes(iter(blocks), random.Random(0))
    first, second, third = (list(itertools.islice(samples, 40)) for _ in range(3))
    assert sorted(first[:20]) == blocks[0] != first[:20]  # block by block
    assert sorted(second) == sorted(third) == list(range(40))
    assert max(second[:20]) >= 20 and second != third  # all together


def test_demonstrations_are_played_when_they_are_needed(tiny, embed, monkeypatch):
    """Bug: the first step waits until all 10,000 tasks are demonstrated. Or the samples of a block
    are lost, or come in the order of play."""
    monkeypatch.setattr(demonstrators, "BLOCK", 40)
    config, asked = Config(sft_tasks=200, easy_share=0.5, sft_steps=24, sft_batch=32), []

    def stream(index):
        asked.append(index)
        return town_task(index, "train", config)

    parts = sft.make_curriculum(config, tiny, stream, embed, main=False)
    assert asked == [*range(100, 140)]  # the second lesson's; the first makes its own easy stories
    drawn = list(sft.batches(parts, config))
    assert asked == [*range(100, 180)]  # 12 steps of 32 samples each, about 9 samples a task
    (_, again), _ = sft.make_curriculum(config, tiny, stream, embed, main=False)
    first = [sample.key for sample in next(again)]
    seen = [sample.key for batch in drawn for sample in batch][: len(first)]
    assert sorted(seen) == sorted(first) and seen != first


# --- the step -------------------------------------------------------------------------------------


def step(policy, samples, num_tokens, **settings):
    """Metrics of one sft_step, and its gradients."""
    policy.zero_grad()
    recorder, accelerator = Recorder(policy.parameters(), lr=0.0), Accelerator(cpu=True)
    config = Config(max_grad_norm=1e9, **settings)
    metrics = sft.sft_step(policy, samples, num_tokens, [recorder], accelerator, config)
    return metrics, recorder.gradients


def test_the_step_is_cross_entropy_over_the_response_tokens(tiny, embed):
    """Bug: the loss counts prompt tokens, is normalised per micro-batch, or token_accuracy is taken
    over the last micro-batch alone."""
    tiny.temperature = 0.05  # so sharp that its own responses are nearly certain
    prompts = [sample.prompt_ids for sample in demonstrated(Config(), tiny, embed, 5)[:6]]
    rngs = [random.Random(n) for n in range(6)]
    written = tiny.sample(prompts, rngs)
    samples = [
        Sample(prompt, ids[: 2 + n]) for n, (prompt, (ids, _)) in enumerate(zip(prompts, written))
    ]
    samples += [Sample(prompt, [7, 8, 9]) for prompt in prompts]  # and these are unlikely
    num_tokens = 5 + sum(len(sample.response_ids) for sample in samples)  # 5: of another process
    expected = 0.0
    likely = 0
    for sample in samples:
        prompt, response = sample.key
        logits = tiny.model(torch.tensor([prompt + response])).logits[0] / tiny.temperature
        logprobs = logits[:, : tiny.known_ids].log_softmax(-1)
        own = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])
        expected = expected - own.sum() / num_tokens
        likely += (own > math.log(0.5)).sum().item()
    tiny.zero_grad()
    expected.backward()
    by_hand = [p.grad.clone() for p in tiny.parameters()]
    assert 0 < likely < num_tokens - 5
    for order, budget in ((1, 1), (-1, 100), (1, 10**6)):
        metrics, found = step(tiny, samples[::order], num_tokens, micro_batch_tokens=budget)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert metrics["token_accuracy"] == pytest.approx(likely / num_tokens)
        norm = sum(gradient.square().sum().item() for gradient in by_hand) ** 0.5
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
        for one, other in zip(found, by_hand):
            assert torch.allclose(one, other, atol=1e-5 + 1e-3 * other.abs().max().item())
