"""Rows that come and go, and transformers' continuous batching: see sampling.py."""

import dataclasses
import random
from collections import deque

import pytest
import torch
from test_policy import observations, qwen3

import sampling
from agent import run_episodes
from config import Config
from scoring import exact_match
from tasks import town_task


def waiting_for(count):
    return deque((number, observation, random.Random(number)) for number, observation in enumerate(observations(count)))


def gap(policy, responses):
    """The largest difference between the sampler's log-probabilities and the trainer's."""
    logprobs, _ = policy([(response.prompt_ids, response.ids) for response in responses])
    return (logprobs - torch.tensor([x for response in responses for x in response.logprobs])).abs().max().item()


def test_an_episode_does_not_depend_on_the_others(tiny, embed):
    """Bug: what is drawn for an episode depends on who else is in the batch, on its size, or on the place in the list."""
    tasks = [town_task(index % 3, "train", tiny.config) for index in range(12)]  # in groups of four

    def play(order, rows):
        tiny.config = dataclasses.replace(tiny.config, sample_rows=rows)
        episodes = run_episodes([tasks[number] for number in order], tiny, tiny.config, embed, exact_match)
        return {number: episode for number, episode in zip(order, episodes)}

    reference = play(range(12), 256)
    assert len({tuple(episode.turns[0].response.ids) for episode in reference.values()}) == 12  # those of a group differ
    for order, rows in ((range(12), 1), (range(12), 5), ([1, 4, 7, 10], 256), ([2, 0, 5, 3, 8, 6, 11, 9], 3)):
        for number, episode in play(order, rows).items():
            turns, same = [[turn.response for turn in one.turns] for one in (episode, reference[number])]
            assert [turn.ids for turn in turns] == [turn.ids for turn in same]
            assert [x for turn in turns for x in turn.logprobs] == pytest.approx([x for turn in same for x in turn.logprobs], abs=1e-4)
            assert episode.reward == reference[number].reward
    again = run_episodes(tasks, tiny, tiny.config, embed, exact_match, seed=1)
    assert all(episode.turns[0].response.ids != reference[number].turns[0].response.ids for number, episode in enumerate(again))


def test_nobody_waits_for_the_slowest(tiny, monkeypatch):
    """Bug: a response that is done is held back until the longest of its batch is, or what was added meanwhile waits for that."""
    def draw(policy, logits, rows):
        for row in rows:  # number 0 never ends by itself, the others at their second token
            row.ids.append(1 if row.item[0] and row.ids else 5)
            row.logprobs.append(0.0)

    monkeypatch.setattr(sampling, "draw", draw)
    tiny.end_ids, waiting, order = {1}, waiting_for(3), []
    for finished in tiny.serve(waiting):
        order += [item[0] for item, _ in finished]
        if len(order) == 2:
            waiting += [(number, *item[1:]) for number, item in zip((3, 4), waiting_for(2))]
    assert order[-1] == 0 and sorted(order) == [0, 1, 2, 3, 4]


def test_a_cache_whose_rows_come_and_go(tiny):
    """Bug: a row reads another's keys after one has left, the columns have been moved, or places have been added."""
    policy = qwen3(tiny.tokenizer, Config(sample_rows=7, max_response_tokens=90, micro_batch_tokens=128), len(tiny.tokenizer))
    policy.end_ids = {3, 5, 8, 21}  # one token in fifty or so
    responses = policy.respond(observations(40))
    lengths = sorted(len(response.ids) for response in responses)
    assert lengths[0] < 20 < 2 * sampling.RowCache.SPARE < lengths[-1]
    assert gap(policy, responses) < 1e-4


def test_transformers_continuous_batching(tiny, monkeypatch):
    """Bug: keys of the old policy answer for the new one through a shared prefix, or another distribution is sampled from than here."""
    if not sampling.has_pages():
        pytest.skip("this version of transformers has no continuous batching with pages")
    monkeypatch.setattr(sampling, "PAGE", 4)  # short pages, so that prompts share some
    config = Config(sample_rows=8, max_prompt_tokens=90, max_response_tokens=12, micro_batch_tokens=64)
    policy = qwen3(tiny.tokenizer, config, len(tiny.tokenizer) + 13)

    def play():
        responses = {item[0]: response for finished in sampling.serve_paged(policy, waiting_for(20)) for item, response in finished}
        return [responses[number] for number in range(20)]

    first = play()
    assert gap(policy, first) < 1e-4 and max(id for response in first for id in response.ids) < policy.known_ids
    for response in first:
        assert (response.ids[-1] in policy.end_ids) != response.truncated and len(response.ids) <= 12
    manager = policy.model._cached_continuous_batching_manager
    for change in (lambda p: p.add_(0.05 * torch.randn_like(p)), lambda p: setattr(p, "data", p.data + 0.05 * torch.randn_like(p))):
        with torch.no_grad():
            for parameter in policy.parameters():
                change(parameter)
        assert gap(policy, play()) < 1e-4
    assert policy.model._cached_continuous_batching_manager is manager  # it stays alive
    policy.temperature = 0
    assert [response.ids for response in play()] == [response.ids for response in policy.respond(observations(20))]
    policy.model.destroy_cached_continuous_batching_manager()
