"""Finer credit than the paper's one advantage per episode, which it names as a limitation.

    python -m forks.credit hide --from runs/town/sft --name hide
    python -m forks.credit branch --from runs/town/sft --name branch
    python -m forks.credit plain --from runs/town/sft --name plain       grpo.py, to compare

hide: choose REPLAYS of the entries that were shown while answering. For each one, answer all
    questions again without it. The fall in reward is its credit. It is 0 for entries that are
    stored at the end and were never shown while answering. A turn that wrote such entries gets the
    mean of the episode's advantage and the entries' credit less PRICE. See also ECHO (2606.31650).
branch: play one episode of each task. Go back to REPLAYS random turns of it, and play on from each
    one `group_size` times. These are the groups of eq. 8. Only the turns from there on are trained,
    and counted in the metrics `turns` and `tokens`. See also Memory-R2 (2605.21768).
Two more metrics: `sampled_tokens`, with those that are not trained on, and `useless`, the number of
    entries that are stored at the end and were never shown while answering. For one process.
"""

import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from random import Random
from statistics import mean

import grpo
from agent import Episode, continue_episodes
from config import need
from memory import Memory
from policy import Sample
from tasks.scoring import tally

REPLAYS = 2  # turns of a task to branch from, or entries of an episode to hide
PRICE = 0.02  # the reward that an entry has to bring, or else it should not be stored
run_episodes, summarize, to_samples = grpo.run_episodes, grpo.summarize, grpo.to_samples
logged = {}  # metrics of the step
credits = []  # for each episode of the step: {entry id: credit}, where known


def shown_entries(episode: Episode) -> set[int]:
    """The ids of the entries that were shown while answering."""
    seen = [turn.observation for turn in episode.turns]
    return {entry.id for one in seen if one.question for entry in one.entries}


def run_and_keep(tasks, policy, config, *rest) -> tuple[list[Episode], list[list[Episode]]]:
    """run_episodes. Also returns each episode's states before each turn: copies without turns."""
    states = [[Episode(task, Memory(config.capacity))] for task in tasks]

    def keep(episodes):
        for before, episode in zip(states, episodes):
            if not episode.done:
                before.append(deepcopy(replace(episode, turns=[])))

    return run_episodes(tasks, policy, config, *rest, progress=keep), states


def branch(tasks, policy, config, embed, score, seed) -> tuple[list[Episode], list[Episode]]:
    """(groups of `group_size` episodes that start from one state, the episodes they are from)."""
    trunks, states = run_and_keep(tasks[:: config.group_size], policy, config, embed, score, seed)
    rng = Random(f"{config.seed} {seed}")
    chosen = [state for before in states for state in rng.choices(before, k=REPLAYS)]
    branches = [deepcopy(state) for state in chosen for _ in range(config.group_size)]
    for one in branches:
        one.rng = Random(rng.random())
    continue_episodes(branches, policy, config, embed, score)
    return branches, trunks


def hide(tasks, policy, config, embed, score, seed) -> tuple[list[Episode], list[Episode]]:
    """(episodes, replays of their questions). Sets `credits`."""
    episodes, states = run_and_keep(tasks, policy, config, embed, score, seed)
    replays, hidden = [], []  # for each replay: (its episode's credits and reward, hidden entry)
    credits.clear()
    for episode, before in zip(episodes, states):
        shown, chunks = shown_entries(episode), len(episode.task.chunks)
        credits.append(dict.fromkeys(set(episode.memory.texts) - shown, 0.0))
        state = next(one for one in before if one.position == chunks)  # before the first question
        candidates = sorted(shown & set(state.memory.texts))
        for id in episode.rng.sample(candidates, min(REPLAYS, len(candidates))):
            replays.append(deepcopy(state))
            replays[-1].memory.delete(id)
            hidden.append((credits[-1], episode.reward, id))
    continue_episodes(replays, policy, config, embed, score)
    for replay, (credit, reward, id) in zip(replays, hidden):
        credit[id] = reward - replay.reward
    return episodes, replays


def credited_samples(episodes, advantages, keep_all) -> list[Sample]:
    """to_samples, with an advantage of their own for the turns that wrote entries."""
    samples = []
    for episode, advantage, credit in zip(episodes, advantages, credits):
        for turn in episode.turns:
            wrote = {one.id for one in turn.operations if one.kind in ("create", "update")}
            own = [credit[id] - PRICE for id in wrote & credit.keys()]
            value = (advantage + mean(own)) / 2 if own else advantage
            samples += to_samples([replace(episode, turns=[turn])], [value], keep_all)
    return samples


def rollout(play, *arguments) -> list[Episode]:
    """In place of run_episodes: the episodes to train on. Sets `logged`."""
    trained, others = play(*arguments)
    whole = [one for one in trained + others if one.turns[0].position == 0]  # nothing is hidden
    logged["useless"] = mean(len(set(one.memory.texts) - shown_entries(one)) for one in whole)
    logged["sampled_tokens"] = tally(trained + others)["tokens"]
    return trained


WAYS = {"plain": lambda *arguments: (run_episodes(*arguments), []), "hide": hide, "branch": branch}

if __name__ == "__main__":
    way = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    need(way in WAYS, f"the first argument must be one of: {', '.join(WAYS)}")
    grpo.run_episodes = partial(rollout, WAYS[way])
    if way == "hide":
        grpo.to_samples = credited_samples
    grpo.summarize = lambda sums: summarize(sums) | logged
    grpo.main()
