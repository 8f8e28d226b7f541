"""A new reward: the share of right answers, minus 0.02 for each entry in the store at the end.

    python -m forks.frugal --from runs/town/sft --name frugal
    python -m forks.frugal --resume runs/frugal/grpo

Do not resume it with grpo.py, which has the plain reward.
"""

import grpo
from agent import Episode

PRICE = 0.02  # per entry
right_answers = Episode.reward.fget


def reward(episode: Episode) -> float:
    """Within [0, 1], like every reward."""
    return max(0.0, right_answers(episode) - PRICE * len(episode.memory))


Episode.reward = property(reward)

if __name__ == "__main__":
    grpo.main()
