"""Long-context QA: tasks built from HotpotQA, 2WikiMultihopQA and MuSiQue, and saved sets of tasks.

Each line of a saved set is one task. Your own questions work in the same format:

    {"id": "a", "questions": [{"question": "Who?", "answers": ["Ben", "an alias"]}],
     "documents": ["a text", "another one"]}
"""

import functools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from sys import intern  # equal texts of different rows are stored once

from config import BadInput, Config, need
from tasks import Count, Question, Task


@dataclass(frozen=True, slots=True)
class Example:
    """A row of a QA file: its question, and its paragraphs as "title, newline, text"."""

    questions: tuple[Question, ...]  # one
    documents: tuple[str, ...]  # the gold ones first
    gold: int  # the number of gold ones


# --- rows of the data files -----------------------------------------------------------------------
def make_example(question: str, answers: list, support: list, gold: list, rest: list) -> Example:
    """gold, rest: the texts of paragraphs. Repeated ones are dropped."""
    need(gold, "no supporting paragraphs in its context (a 'fullwiki' file? use 'distractor')")
    question = Question(question.strip(), tuple(map(str, answers)), tuple(dict.fromkeys(support)))
    documents = tuple(dict.fromkeys(map(intern, gold + rest)))
    return Example((question,), documents, len(set(gold)))


def hotpot_example(row: dict) -> Example:
    """A row of HotpotQA or 2WikiMultihopQA, whose context is [[title, [sentence]]]."""
    wanted = {}  # title -> numbers of the supporting sentences
    for title, number in row["supporting_facts"]:
        wanted.setdefault(title, []).append(number)
    support, gold, rest = [], [], []
    for title, sentences in row["context"]:
        sentences = [sentence.strip() for sentence in sentences]
        text = " ".join(sentence for sentence in sentences if sentence)
        (gold if title in wanted else rest).append(f"{title}\n{text}")
        numbers = [number for number in wanted.get(title, ()) if number < len(sentences)]
        support += [(title, sentences[number]) for number in numbers if sentences[number]]
    complete = set(wanted) <= {title for title, _ in row["context"]}
    return make_example(row["question"], [row["answer"]], support, gold if complete else [], rest)


def musique_example(row: dict) -> Example:
    """A row of MuSiQue-Ans. Its support: for each hop, the first sentence with the hop's answer."""
    texts, gold = {}, []  # texts: idx -> (title, text)
    for one in row["paragraphs"]:
        title, text = one["title"], " ".join(one["paragraph_text"].split())
        texts[one["idx"]] = (title, text)
        if one["is_supporting"]:
            gold.append(f"{title}\n{text}")
    support = []
    for hop in row["question_decomposition"]:
        title, text = texts[hop["paragraph_support_idx"]]
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z0-9\"'(])", text)
        answer = hop["answer"].lower()
        matching = [sentence for sentence in sentences if answer in sentence.lower()]
        support.append((title, (matching or sentences)[0]))
    answers, rest = [row["answer"], *row["answer_aliases"]], map("\n".join, texts.values())
    return make_example(row["question"], answers, support, gold, list(rest))


def saved_task(row: dict) -> Task:
    """A line of a saved set."""
    lists = [row["questions"], row["documents"], *(one["answers"] for one in row["questions"])]
    if not all(isinstance(one, list) and one for one in lists):
        raise ValueError("questions, documents and answers must be lists that are not empty")
    questions = []
    for one in row["questions"]:
        support = tuple((title, text) for title, text in one.get("support", ()))
        answers = tuple(map(str, one["answers"]))
        questions.append(Question(one["question"].strip(), answers, support))
    return Task(str(row["id"]), tuple(questions), tuple(map(intern, row["documents"])))


CONVERT = {"hotpotqa": hotpot_example, "2wikimultihopqa": hotpot_example}
CONVERT |= {"musique": musique_example, "saved": saved_task}
SHAPES = "HotpotQA and 2Wiki files hold a list of rows, MuSiQue files and saved sets are JSONL"


@functools.cache
def read_rows(path: str, task: str) -> list[Example] | list[Task]:
    """All rows of a data file, converted. Each file is read once per process.

    It keeps only the converted rows, and stores equal texts once. To read a JSON list, it needs
    four to six times the file's size. Raises BadInput, with the row's number, for a bad file.
    """
    need(os.path.isfile(path), f"{path}: no such file")
    need(os.path.getsize(path), f"{path}: the file is empty")
    rows, jsonl = [], task in ("musique", "saved")
    try:
        with open(path, encoding="utf-8", newline="\n") as file:  # texts contain other line ends
            for row in map(json.loads, filter(str.strip, file)) if jsonl else json.load(file):
                rows.append(CONVERT[task](row))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a text file: {error}") from error
    except json.JSONDecodeError as error:
        where = f"row {len(rows)} is" if jsonl else "it is"
        raise BadInput(f"{path}: {where} not JSON, or not complete. {SHAPES}. {error}") from error
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        message = f"{path}: row {len(rows)} is not in the format of {task}"
        raise BadInput(f"{message}: {error!r}. {SHAPES}.") from error
    need(rows, f"{path}: the file has no rows")
    ids = Counter(row.id for row in rows) if task == "saved" else {}
    repeated = [id for id in ids if ids[id] > 1]
    need(not repeated, f"{path}: several tasks have the id {repeated[:1]}: give each its own")
    return rows


def texts(config: Config) -> Iterator[str]:
    """The texts of at most about 2000 rows, spread over the file."""
    rows = read_rows(config.data, config.task)
    for row in rows[:: max(1, len(rows) // 2000)]:
        for question in row.questions:
            yield from (question.text, *question.answers)
        yield from row.documents


# --- tasks from rows ------------------------------------------------------------------------------
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
    """The tasks of a saved set, in the file's order. In training, each pass is shuffled."""

    def __init__(self, config: Config, split: str):
        self.seed, self.split = config.seed, split
        self.rows = read_rows(config.data, config.task)
        self.numbers = split_numbers(len(self.rows), split, least=5)
        need(self.numbers, f"{config.data}: one task is too few: training needs another, held out")

    def __len__(self) -> int:
        return len(self.numbers)

    def __call__(self, index: int) -> Task:
        passes, place = divmod(index, len(self))
        order = self.numbers
        if self.split == "train":
            order = random.Random(f"saved {self.seed} {passes}").sample(order, len(order))
        return self.rows[order[place]]


def lay_out(task: Task, config: Config, count: Count) -> Task:
    """The task with its documents numbered and cut into chunks. --order N shuffles them first."""
    documents = list(task.documents)
    if config.order:
        random.Random(f"{config.order} {task.id}").shuffle(documents)
    numbered = [f"Document {number}: {text}\n" for number, text in enumerate(documents, 1)]
    chunks = split_chunks(numbered, config.chunk_tokens, count)
    return replace(task, documents=tuple(documents), chunks=chunks)


def split_chunks(texts: list[str], most: int, count: Count) -> tuple[str, ...]:
    """Join `texts` to chunks of at most `most` tokens; "".join(chunks) == "".join(texts).

    Only a text that is longer than a chunk is cut, at a space if possible.
    """
    chunks, used = [""], 0  # used: tokens in the last chunk
    for text, size in zip(texts, count(texts)):
        while size > most:
            window = text[: 16 * most]  # to count the whole rest each time would be quadratic
            cut = len(window) * most // max(most, count([window])[0])
            while count([text[:cut]])[0] > most:
                cut = cut * 9 // 10
            cut = max(1, text.rfind(" ", 1, cut) + 1 or cut)
            chunks.append(text[:cut])
            text, used = text[cut:], most
            size = count([text])[0] if len(text) <= 16 * most else most + 1
        if used + size > most:
            chunks.append("")
            used = 0
        chunks[-1] += text
        used += size
    return tuple(filter(None, chunks))
