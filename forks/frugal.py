"""A new reward: the share of right answers, less 0.02 for each entry in the store at the end.

python -m forks.frugal --from runs/town/sft --name frugal
"""

import grpo
from agent import Episode

PRICE = 0.02  # of one entry
right_answers = Episode.reward.fget


def reward(episode: Episode) -> float:
    """Within [0, 1], as every reward."""
    return max(0.0, right_answers(episode) - PRICE * len(episode.memory))


Episode.reward = property(reward)

if __name__ == "__main__":
    grpo.main()
