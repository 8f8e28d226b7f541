"""A new operation: <pin_memory>2</pin_memory> copies the entry shown as number 2 into the
scratchpad, where it is always shown.

    python -m forks.pin sft --name pin
    python -m forks.pin grpo --name pin
    python -m forks.pin evaluate --name pin

Always use these commands, also to resume: the plain scripts do not know the operation.
A pretrained model is told about it in its instruction. The tiny model learns only from
demonstrations, so it also needs a demonstrator that pins: see tasks/demonstrators.py.
"""

import sys

import agent
import evaluate
import grpo
import sft
from config import need

agent.TAGS["paper"]["pin"] = "pin_memory"
agent.USAGE["pin"] = "<{tag}>{number}</{tag}> copies entry #2 into your scratchpad"
agent.NUMBERED["pin"] = agent.NUMBERED["delete"]  # like Delete: only a number
execute = agent.execute


def execute_with_pin(operation, episode, observation, vectors):
    """agent.execute, and Pin."""
    if operation.kind != "pin":
        execute(operation, episode, observation, vectors)
    elif 1 <= operation.number <= len(observation.entries):
        entry = observation.entries[operation.number - 1]
        episode.memory.scratchpad = f"{episode.memory.scratchpad} {entry.text}".strip()
    else:
        operation.error = "no entry with that number is shown"


agent.execute = execute_with_pin

if __name__ == "__main__":
    scripts = {"sft": sft, "grpo": grpo, "evaluate": evaluate}
    need(sys.argv[1:] and sys.argv[1] in scripts, "say which script: sft, grpo or evaluate")
    scripts[sys.argv.pop(1)].main()
