"""Finer credit than one advantage per episode, which the paper names as a limitation.

    python -m forks.credit branch --from runs/town/sft --name branch --tasks_per_step 4
    python -m forks.credit hide --from runs/town/sft --name hide

The paper gives the credit of a right answer to every turn of its episode, useless Creates included.

branch: play one episode of each task. Replay it from random turns, `group_size` times each, with
    the very same memory, query and position. Advantages are relative to these siblings (eq. 8) and
    apply to the turns after the branching. After Memory-R2 (2605.21768), which rolls out locally.
hide: for each entry that was shown while answering, answer once more without it. The loss in reward
    is the credit of the operations that wrote the entry. Their tokens get it, mixed with the
    episode's advantage. After ECHO (2606.31650), which routes credit by record.

Both log `sampled_tokens`, which counts the additional turns as well, and `useless`: the entries per
episode that no answering turn has shown. Resume with the same command. For one process.
"""

import random
import re
import sys
from bisect import bisect_left
from copy import deepcopy
from dataclasses import replace

import torch

import grpo
from agent import Episode, continue_episodes
from config import need
from memory import Memory
from policy import Sample

BRANCHES = 2  # per task; with half the tasks, about as many tokens as the plain trainer samples
MIX = 0.5  # weight of an entry's own credit
PRICE = 0.02  # what an entry has to bring in reward, or else it should not be stored
run_episodes, summarize = grpo.run_episodes, grpo.summarize
step = {}  # what the functions below have to tell each other in one step


def copy_state(episode: Episode, rng: random.Random) -> Episode:
    """An episode that goes on from the same state. Its list of turns is empty."""
    scores, answers = list(episode.scores), list(episode.answers)
    memory = deepcopy(episode.memory)
    return replace(episode, memory=memory, rng=rng, turns=[], answers=answers, scores=scores)


def sampled(episodes: list[Episode]) -> int:
    return sum(turn.response.tokens for episode in episodes for turn in episode.turns)


def shown_entries(episode: Episode) -> set[int]:
    """The ids of the entries that were shown while answering."""
    answering = [turn.observation for turn in episode.turns if turn.observation.question]
    return {entry.id for observation in answering for entry in observation.entries}


def branch(tasks, policy, config, embed, score, seed) -> list[Episode]:
    """Instead of run_episodes: groups of `group_size` episodes from the same state."""
    tasks = tasks[:: config.group_size]
    states = [[Episode(task, Memory(config.capacity))] for task in tasks]

    def keep(episodes):
        for before, episode in zip(states, episodes):
            if not episode.done and len(before) == len(episode.turns):
                before.append(copy_state(episode, random.Random()))

    trunks = run_episodes(tasks, policy, config, embed, score, seed, progress=keep)
    rng, branches = random.Random(f"{config.seed} {seed} branches"), []
    for before in states:
        for state in rng.choices(before, k=BRANCHES):
            draws = (random.Random(rng.random()) for _ in range(config.group_size))
            branches += [copy_state(state, one) for one in draws]
    continue_episodes(branches, policy, config, embed, score)
    step.update(extra=sampled(trunks), useless=mean_useless(trunks))
    return branches


def hide(tasks, policy, config, embed, score, seed) -> list[Episode]:
    """Instead of run_episodes. step["credit"]: {entry id: its credit} of each episode."""
    states = {}

    def keep(episodes):
        for number, episode in enumerate(episodes):
            if episode.position == len(episode.task.chunks) and number not in states:
                states[number] = copy_state(episode, deepcopy(episode.rng))

    episodes = run_episodes(tasks, policy, config, embed, score, seed, progress=keep)
    replays = []
    for number, episode in enumerate(episodes):
        for id in shown_entries(episode) & set(states[number].memory.texts):
            replay = copy_state(states[number], deepcopy(states[number].rng))
            replay.memory.delete(id)
            replays.append((number, id, replay))
    continue_episodes([replay for *_, replay in replays], policy, config, embed, score)
    credit = [{} for _ in episodes]
    for number, id, replay in replays:
        credit[number][id] = episodes[number].reward - replay.reward
    extra = sampled([replay for *_, replay in replays])
    step.update(
        extra=extra, useless=mean_useless(episodes), credit=credit, decode=policy.chat.decode
    )
    return episodes


def credited_samples(episodes, advantages, keep_all) -> list[Sample]:
    """Instead of to_samples: the tokens of a Create or Update get the credit of its entry."""
    samples = []
    for episode, advantage, credit in zip(episodes, advantages, step["credit"]):
        for turn in episode.turns:
            one, ends = turn.response, [m.end() for m in re.finditer(r"</\w+>", turn.response.text)]
            values = torch.full((len(one.ids),), float(advantage))
            if len(ends) == len(turn.operations):
                for index in range(len(one.ids)):
                    at = bisect_left(ends, len(step["decode"](one.ids[: index + 1])))
                    if at < len(ends) and turn.operations[at].kind in ("create", "update"):
                        own = credit.get(turn.operations[at].id, 0.0) - PRICE
                        values[index] += MIX * (own - values[index])
            if not one.truncated and (values.any() or keep_all):
                samples.append(Sample(one.prompt_ids, one.ids, one.logprobs, values))
    return samples


def mean_useless(episodes: list[Episode]) -> float:
    """The mean number of entries left at the end that were never shown while answering."""
    left = [set(episode.memory.texts) - shown_entries(episode) for episode in episodes]
    return sum(map(len, left)) / len(episodes)


def summarize_with_costs(sums: dict) -> dict:
    means = summarize(sums)
    tokens = sums["tokens"] + step.get("extra", 0)
    return means | {"sampled_tokens": tokens, "useless": step["useless"]}


def plain(tasks, policy, config, embed, score, seed) -> list[Episode]:
    """run_episodes, with the two metrics."""
    episodes = run_episodes(tasks, policy, config, embed, score, seed)
    step.update(useless=mean_useless(episodes))
    return episodes


PLAYERS = {"plain": plain, "branch": branch, "hide": hide}

if __name__ == "__main__":
    need(sys.argv[1:2] and sys.argv[1] in PLAYERS, f"say which: {', '.join(PLAYERS)}")
    kind = sys.argv.pop(1)
    grpo.run_episodes, grpo.summarize = PLAYERS[kind], summarize_with_costs
    if kind == "hide":
        grpo.to_samples = credited_samples
    grpo.main()
