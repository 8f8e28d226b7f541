"""Finer credit than the paper's one advantage per episode, which it names as a limitation.

    python -m forks.credit hide --from runs/town/sft --name hide
    python -m forks.credit branch --from runs/town/sft --name branch --tasks_per_step 4
    python -m forks.credit plain --from runs/town/sft --name plain       grpo.py, to compare

hide: for each entry that was shown while answering, answer once more without it. The fall in reward
    is the entry's credit. The tokens of the Create or Update that wrote it get the mean of the
    episode's advantage and this credit less PRICE. ECHO (2606.31650) routes credit by record, too.
branch: play one episode of each task, and replay it from BRANCHES random turns, `group_size` times
    each, with the same memory, query and position. Advantages are relative to these siblings (eq.
    8) and apply to the turns after the branching. Memory-R2 (2605.21768) rolls out locally as well.

All log `sampled_tokens`, those of replays included, and `useless`: the entries at the end of an
episode that no answering turn has shown. For one process.
"""

import re
import sys
from bisect import bisect_left
from copy import deepcopy
from dataclasses import replace
from random import Random

import torch

import grpo
from agent import Episode, Turn, continue_episodes
from config import need
from memory import Memory
from policy import Sample
from tasks.scoring import tally

BRANCHES = 2  # per task; with half the tasks, about as many tokens as grpo.py samples
MIX = 0.5  # weight of an entry's own credit
PRICE = 0.02  # the reward that an entry has to bring, or else it should not be stored
run_episodes, summarize = grpo.run_episodes, grpo.summarize
step = {}  # what the functions below tell each other in one step


def copy_state(episode: Episode) -> Episode:
    """An episode that goes on from the same state. Its list of turns is empty."""
    return deepcopy(replace(episode, turns=[]))


def shown_entries(episode: Episode) -> set[int]:
    """The ids of the entries that were shown while answering."""
    shown = [turn.observation for turn in episode.turns if turn.observation.question]
    return {entry.id for observation in shown for entry in observation.entries}


def count(whole: list[Episode], parts: list[Episode]):
    """Note the metrics of a step's whole episodes and of the replayed parts of episodes."""
    useless = [len(set(one.memory.texts) - shown_entries(one)) for one in whole]
    step["useless"] = sum(useless) / len(whole)
    step["sampled_tokens"] = tally(whole + parts)["tokens"]


def plain(*arguments) -> list[Episode]:
    episodes = run_episodes(*arguments)
    count(episodes, [])
    return episodes


def branch(tasks, policy, config, embed, score, seed) -> list[Episode]:
    """In place of run_episodes: groups of `group_size` episodes that start from one state."""
    tasks = tasks[:: config.group_size]
    states = [[Episode(task, Memory(config.capacity))] for task in tasks]  # of each task, by turn

    def keep(episodes):
        for before, episode in zip(states, episodes):
            if not episode.done:
                before.append(copy_state(episode))

    trunks = run_episodes(tasks, policy, config, embed, score, seed, progress=keep)
    rng = Random(f"{config.seed} {seed} branches")
    chosen = [state for before in states for state in rng.choices(before, k=BRANCHES)]
    branches = [copy_state(state) for state in chosen for _ in range(config.group_size)]
    for one in branches:
        one.rng = Random(rng.random())
    continue_episodes(branches, policy, config, embed, score)
    count(trunks, branches)
    return branches


def hide(tasks, policy, config, embed, score, seed) -> list[Episode]:
    """run_episodes. Sets step["credit"]: {id of an entry: its credit} of each episode."""
    states = {}  # of each episode before its first question

    def keep(episodes):
        for number, episode in enumerate(episodes):
            if episode.position == len(episode.task.chunks) and number not in states:
                states[number] = copy_state(episode)

    episodes = run_episodes(tasks, policy, config, embed, score, seed, progress=keep)
    replays = []  # (episode number, hidden entry, replay)
    for number, state in states.items():
        for id in shown_entries(episodes[number]) & set(state.memory.texts):
            replays.append((number, id, copy_state(state)))
            replays[-1][2].memory.delete(id)
    played = [replay for *_, replay in replays]
    continue_episodes(played, policy, config, embed, score)
    step["credit"], step["decode"] = [{} for _ in episodes], policy.chat.decode
    for number, id, replay in replays:
        step["credit"][number][id] = episodes[number].reward - replay.reward
    count(episodes, played)
    return episodes


def token_advantages(turn: Turn, advantage: float, credit: dict[int, float]) -> torch.Tensor:
    """(n,): the episode's advantage. In a Create or Update it is mixed with its entry's credit."""
    ids, operations = turn.response.ids, turn.operations
    values = torch.full((len(ids),), float(advantage))
    ends = [match.end() for match in re.finditer(r"</\w+>", turn.response.text)]
    if len(ends) != len(operations):  # some are malformed: it is not clear which tokens are whose
        return values
    for index in range(len(ids)):
        at = bisect_left(ends, len(step["decode"](ids[: index + 1])))
        if at < len(ends) and operations[at].kind in ("create", "update"):
            own = credit.get(operations[at].id, 0.0) - PRICE
            values[index] += MIX * (own - values[index])
    return values


def credited_samples(episodes, advantages, keep_all) -> list[Sample]:
    """In place of to_samples, with an advantage for each token."""
    samples = []
    for episode, advantage, credit in zip(episodes, advantages, step["credit"]):
        for turn in episode.turns:
            written, values = turn.response, token_advantages(turn, advantage, credit)
            if not written.truncated and (values.any() or keep_all):
                samples.append(Sample(written.prompt_ids, written.ids, written.logprobs, values))
    return samples


KINDS = {"plain": plain, "branch": branch, "hide": hide}

if __name__ == "__main__":
    kind = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    need(kind in KINDS, f"say which: {', '.join(KINDS)}")
    grpo.run_episodes = KINDS[kind]
    if kind == "hide":
        grpo.to_samples = credited_samples
    logged = ("sampled_tokens", "useless")
    grpo.summarize = lambda sums: summarize(sums) | {name: step[name] for name in logged}
    grpo.main()
