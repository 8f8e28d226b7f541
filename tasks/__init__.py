"""The tasks: the built-in town (town.py), and long-context QA (qa.py) from files (formats.py).

Each is a Stream: a function from an index to a task. The same settings give the same tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from config import BUILT, COMPLETE, Config


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]  # the gold answer, then its aliases
    support: tuple[tuple[str, str], ...] = ()  # QA sets: (title, sentence) pairs with the answer


@dataclass(frozen=True)
class Task:
    """One episode's work: `chunks` to read in order, then `questions` to answer from memory."""

    id: str
    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    chunks: tuple[str, ...] = ()  # the documents, cut to size
    context: str = ""  # shown beside every question: the full-context baseline


Count = Callable[[list[str]], list[int]]  # the number of tokens of each text
Stream = Callable[[int], Task]


def load_tasks(config: Config, split: str, count: Count) -> Stream:
    """The stream of 'train', 'dev' (held out during training) or 'test' tasks."""
    if config.task == "town":
        from tasks.town import town_task  # here, because it needs the records above

        return lambda index: town_task(index, split, config)
    from tasks.qa import QATasks, SavedTasks, lay_out

    build = (QATasks if config.task in BUILT else SavedTasks)(config, split)
    return lambda index: lay_out(build(index), config, count)


def held_out_tasks(config: Config, split: str, number: int, count: Count) -> list[Task]:
    """The first `number` tasks of the 'dev' or 'test' stream. A complete set may have fewer."""
    if config.task in COMPLETE:
        from tasks.qa import SavedTasks

        number = min(number, len(SavedTasks(config, split)))
    return list(map(load_tasks(config, split, count), range(number)))
