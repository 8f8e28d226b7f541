"""Tasks from data files: built from the questions of a QA set, or complete ones."""

import random
from dataclasses import replace

from config import Config, need
from tasks import Count, Task
from tasks.formats import read_rows


def split_numbers(total: int, split: str, least: int) -> list[int]:
    """The row numbers of a split of a file with `total` rows. The test split is the whole file.

    The dev split, held out of training, is every N-th row: at least `least` rows, if there are
    enough. N depends only on the file, so no setting moves a row between train and dev.
    """
    every = min(20, max(2, total // least))
    dev = range(every - 1, total, every)
    if split == "train":
        return [number for number in range(total) if number not in dev]
    return list(dev if split == "dev" else range(total))


class QATasks:
    """The stream of tasks built from the questions of one file, not yet cut into chunks.

    Raises BadInput if the file has too few paragraphs or questions for the settings.
    """

    def __init__(self, config: Config, split: str):
        self.config, self.split = config, split
        self.rows = read_rows(config.data, config.task)
        self.numbers = split_numbers(len(self.rows), split, least=10)
        file, size, most = config.data, config.documents, config.questions or 10
        found = len({text for row in self.rows for text in row.documents})
        need(found >= size, f"{file}: {found} paragraphs are too few for --documents {size}")
        few = f"{file}: {len(self.numbers)} questions are too few for tasks of up to {most}"
        need(len(self.numbers) >= most, few)
        gold = sum(sorted(self.rows[number].gold for number in self.numbers)[-most:])
        many = f"{most} questions have up to {gold} gold paragraphs, more than --documents {size}"
        need(gold <= size, f"{file}: {many}: raise it, or lower --questions")

    def __call__(self, index: int) -> Task:
        """Task `index`. It depends on the index, the split and, in training, the seed."""
        config, rows = self.config, self.rows
        seed = config.seed if self.split == "train" else ""
        rng = random.Random(f"{config.task} {self.split} {seed} {index}")
        most = config.questions or (1 if rng.random() < 0.5 else rng.randint(2, 10))
        examples = [rows[number] for number in rng.sample(self.numbers, most)]
        gold = [text for example in examples for text in example.documents[: example.gold]]
        own = [text for example in examples for text in example.documents[example.gold :]]
        rng.shuffle(own)  # if not all of them fit, a random part is used
        chosen = dict.fromkeys(list(dict.fromkeys(gold + own))[: config.documents])  # ordered set
        while len(chosen) < config.documents:
            chosen[rng.choice(rows[rng.randrange(len(rows))].documents)] = None
        documents = list(chosen)
        rng.shuffle(documents)
        questions = tuple(example.questions[0] for example in examples)
        return Task(f"{config.task}-{self.split}-{index}", questions, tuple(documents))


class SavedTasks:
    """The complete tasks of a file, in its order. In training, each pass is shuffled.

    Tasks of benchmarks are split, because all questions of a task are shown while reading. Those of
    saved sets are as their author made them.
    """

    def __init__(self, config: Config, split: str):
        self.seed, self.split = config.seed, split
        rows = read_rows(config.data, config.task)
        numbers = split_numbers(len(rows), split, least=5)
        need(numbers, f"{config.data}: one task is too few: training needs another, held out")
        self.tasks = [rows[number] for number in numbers]
        if config.task != "saved":
            most = config.questions or 10
            self.tasks = [part for task in self.tasks for part in split_questions(task, most)]

    def __len__(self) -> int:
        return len(self.tasks)

    def __call__(self, index: int) -> Task:
        passes, place = divmod(index, len(self))
        order = self.tasks
        if self.split == "train":
            order = random.Random(f"saved {self.seed} {passes}").sample(order, len(order))
        return order[place]


def split_questions(task: Task, most: int) -> list[Task]:
    """The task, or if it has more than `most` questions, several tasks with parts of them."""
    parts = [task.questions[i : i + most] for i in range(0, len(task.questions), most)]
    if len(parts) == 1:
        return [task]
    return [replace(task, id=f"{task.id}/{i}", questions=part) for i, part in enumerate(parts)]


def lay_out(task: Task, config: Config, count: Count) -> Task:
    """The task with its documents numbered and cut into chunks. --order N shuffles them first."""
    documents = list(task.documents)
    if config.order:
        dated = config.task in ("locomo", "longmemeval", "memoryagentbench")
        need(not dated, f"--order: the documents of {config.task} have to stay in their order")
        random.Random(f"{config.order} {task.id}").shuffle(documents)
    numbered = [f"Document {number}: {text}\n" for number, text in enumerate(documents, 1)]
    chunks = split_chunks(numbered, config.chunk_tokens, count)
    return replace(task, documents=tuple(documents), chunks=chunks)


def split_chunks(texts: list[str], most: int, count: Count) -> tuple[str, ...]:
    """Join `texts` to chunks of at most `most` tokens; "".join(chunks) == "".join(texts).

    Only a text that is longer than a chunk is cut: at a line's end if one is in the second half of
    the chunk, else at a space if possible.
    """
    chunks, used = [""], 0  # used: tokens in the last chunk
    for text, size in zip(texts, count(texts)):
        while size > most:
            window = text[: 16 * most]  # to count the whole rest each time would be quadratic
            cut = len(window) * most // max(most, count([window])[0])
            while count([text[:cut]])[0] > most:
                cut = cut * 9 // 10
            cut = text.rfind("\n", cut // 2, cut) + 1 or text.rfind(" ", 1, cut) + 1 or max(1, cut)
            chunks.append(text[:cut])
            text, used = text[cut:], most
            size = count([text])[0] if len(text) <= 16 * most else most + 1
        if used + size > most:
            chunks.append("")
            used = 0
        chunks[-1] += text
        used += size
    return tuple(filter(None, chunks))
