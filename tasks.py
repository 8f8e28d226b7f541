"""What is asked: the town (town.py), long-context QA from three public data sets, and sets saved as JSONL.

    python tasks.py --task hotpotqa --data hotpot_dev.json --documents 800 --eval_tasks 500 --out hotpot800.jsonl
    python evaluate.py --name mine --task saved --data hotpot800.jsonl

The first command writes the tasks that evaluate.py builds from the original file by the same settings. A line of a saved set is one task,

    {"id": "a", "questions": [{"question": "Who?", "answers": ["Ben", "an alias"]}], "documents": ["a text", "another one"]}

so that questions of your own about texts of your own are asked in the same way.
"""

import dataclasses
import functools
import json
import mmap
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import town
from config import BadInput, check_new_file, parse_args


@dataclass(frozen=True)
class Question:
    """`answers`: the gold answer first, then its aliases. `support`: QA sets only, (title, sentence) that hold the answer."""

    text: str
    answers: tuple
    support: tuple = ()


@dataclass(frozen=True)
class Task:
    """One episode's work: `chunks` of text to read in order, then `questions` to answer from memory.

    `documents` are the texts that the chunks were made of. `beside` is a text to show with every question (evaluate.py's full
    context; empty in an agent's task).
    """

    id: str
    questions: tuple
    documents: tuple
    chunks: tuple = ()
    beside: str = ""


def load_tasks(config, split, count):
    """The stream of tasks, a function of the index: 'train', 'dev' (held out while training) or 'test'.

    count(texts) gives the number of tokens of each text; the town does without.
    """
    if config.task == "town":
        return functools.partial(town_task, split=split, config=config)
    build = (SavedTasks if config.task == "saved" else QATasks)(config, split)
    return lambda index: lay_out(build(index), config, count)


def held_out_tasks(config, split, number, count):
    """The first `number` tasks of the 'dev' or the 'test' stream, or as many as a saved set has."""
    most = len(SavedTasks(config, split).numbers) if config.task == "saved" else number
    return list(map(load_tasks(config, split, count), range(min(number, most))))


def corpus(config):
    """The texts from which a tiny model's tokenizer takes its vocabulary."""
    if config.task == "town":
        yield from town.texts()
        return
    rows = read_rows(config.data, config.task)
    for row in map(rows.read, range(0, len(rows), max(1, len(rows) // 2000))):  # of a large file a part is enough
        if isinstance(row, Task):
            yield from [text for q in row.questions for text in (q.text, *q.answers)] + list(row.documents)
        else:
            yield from (row.question.text, *row.question.answers, *("\n".join(paragraph) for paragraph in row.paragraphs))


def town_task(index, split, config, **easier):
    """Story number `index` of a stream of the town, see town.story. Its chunks are its documents."""
    asked, chunks = town.story(index, split, config, **easier)
    questions = tuple(Question(text, (answer,)) for text, answer in asked)
    return Task(f"town-{split}-{index}", questions, tuple(chunks), tuple(chunks))


# --- data files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One question of a QA file. `paragraphs`: (title, text), gold ones first; `gold` says how many of them are gold."""

    question: Question
    paragraphs: tuple
    gold: int


def hotpot_example(row):
    """A row of HotpotQA or 2WikiMultihopQA: {question, answer, context [[title, [sentence]]], supporting_facts}."""
    support, gold, rest = [], [], []
    wanted = {}
    for title, number in row["supporting_facts"]:
        wanted.setdefault(title, []).append(number)
    for title, sentences in row["context"]:
        sentences = [sentence.strip() for sentence in sentences]
        paragraph = (title, " ".join(sentence for sentence in sentences if sentence))
        (gold if title in wanted else rest).append(paragraph)
        support += [(title, sentences[n]) for n in wanted.get(title, ()) if n < len(sentences) and sentences[n]]
    complete = set(wanted) <= {title for title, _ in gold}
    question = Question(row["question"].strip(), (str(row["answer"]),), tuple(dict.fromkeys(support)))
    return Example(question, tuple(dict.fromkeys(gold + rest)), len(set(gold)) if complete else 0)


def musique_example(row):
    """A row of MuSiQue-Ans; its support, a sentence per hop, is the first one that holds the hop's answer."""
    paragraphs = [(p["title"], " ".join(p["paragraph_text"].split())) for p in row["paragraphs"]]
    places = [n for n, p in enumerate(row["paragraphs"]) if p["is_supporting"]]
    gold = list(dict.fromkeys(paragraphs[n] for n in places))
    by_idx = {p["idx"]: paragraph for p, paragraph in zip(row["paragraphs"], paragraphs)}
    support = []
    for hop in row["question_decomposition"]:
        title, text = by_idx[hop["paragraph_support_idx"]]
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z0-9\"'(])", text)
        holding = [s for s in sentences if hop["answer"].lower() in s.lower()] or sentences
        support.append((title, holding[0]))
    question = Question(row["question"].strip(), (row["answer"], *row["answer_aliases"]), tuple(dict.fromkeys(support)))
    return Example(question, tuple(dict.fromkeys(gold + paragraphs)), len(gold))


def saved_task(row):
    """A line of a saved set."""
    questions = [Question(q["question"].strip(), tuple(map(str, q["answers"])), tuple((title, text) for title, text in q.get("support", ())))
                 for q in row["questions"]]
    if not all(isinstance(one, list) and one for one in (row["questions"], row["documents"], *(q["answers"] for q in row["questions"]))):
        raise ValueError("questions, documents and each question's answers are lists with something in them")
    return Task(str(row["id"]), tuple(questions), tuple(text + "" for text in row["documents"]))


CONVERT = {"hotpotqa": hotpot_example, "2wikimultihopqa": hotpot_example, "musique": musique_example, "saved": saved_task}
JSONL = ("musique", "saved")


class Rows(Sequence):
    """The rows of a data file, each read from the disk when it is asked for; what stays in memory is their places.

    Making it goes through the whole file once: a fault shows before any long work. BadInput names the file, the row and the fault.
    """

    def __init__(self, path, task):
        self.path, self.task = Path(path), task
        self.places, self.gold, paragraphs = [], [], set()  # (first byte, the one after the last) of each row; its gold paragraphs
        if not (self.path.is_file() and self.path.stat().st_size):
            raise BadInput(f"{path}: " + ("the file is empty" if self.path.is_file() else "no such file"))
        try:
            for start, end, row in (lines if task in JSONL else elements)(self.path):
                example = self.convert(row)
                self.places.append((start, end))
                if isinstance(example, Example):
                    self.gold.append(example.gold)
                    paragraphs.update(map(hash, example.paragraphs))
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not a text file: {error}") from error
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}: row {len(self.places)} is not JSON; is the file whole? {error}") from error
        if not self.places:
            raise BadInput(f"{path}: the file has no rows")
        self.different_paragraphs = len(paragraphs)
        with open(self.path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.read = functools.lru_cache(10_000)(self.read)  # a small file's rows are converted once

    def convert(self, row):
        """The row after those in `places`, checked."""
        number = len(self.places)
        try:
            example = CONVERT[self.task](row)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise BadInput(f"{self.path}: row {number} is not in the format of {self.task}: {error!r}") from error
        if isinstance(example, Example) and example.gold == 0:
            raise BadInput(f"{self.path}: row {number}: the supporting paragraphs are not in its context; this looks like a "
                           "file of the 'fullwiki' kind, use the 'distractor' one")
        return example

    def read(self, number):
        start, end = self.places[number]
        return CONVERT[self.task](json.loads(self.bytes[start:end]))

    def __getitem__(self, number):
        return self.read(range(len(self))[number])

    def __len__(self):
        return len(self.places)


read_rows = functools.cache(Rows)


def lines(path):
    """(first byte, the one after the last, row) of each line of a JSONL file."""
    end = 0
    with open(path, "rb") as file:  # split at "\n" alone: the texts contain other line separators
        for line in file:
            start, end = end, end + len(line)
            if line.strip():
                yield start, end, json.loads(line)


def elements(path, block=2**24):
    """(first byte, the one after the last, element) of each element of the list that a JSON file holds, read block by block."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*", re.ASCII)
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read(block)
        at = gap.match(text).end() + 1
        if text[at - 1 : at] != "[":
            raise BadInput(f"{path}: the file holds no list of rows (MuSiQue's and saved sets are JSONL, the others are not)")
        byte = at  # where text[at:] begins in the file; all before it is ASCII
        while True:
            start = gap.match(text, at).end()
            if text[start : start + 1] == "]":
                return
            try:
                row, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError:
                more = file.read(block) if len(text) - at < 4 * block else ""
                if not more:
                    raise
                text, at = text[at:] + more, 0
                continue
            first = byte + start - at
            byte = first + len(text[start:end].encode())
            yield first, byte, row
            at = end


# --- tasks from rows -----------------------------------------------------------------------------------------------


def held_out_rows(rows, split, most):
    """The numbers of the rows of a split. Of a training file, up to every 20th is kept for the evaluations during training."""
    every = min(20, max(2, len(rows) // most))
    return [number for number in range(len(rows)) if split == "test" or (number % every == every - 1) == (split == "dev")]


class QATasks:
    """Builds tasks from the questions of one file, without chunks."""

    def __init__(self, config, split):
        self.config, self.split, self.rows = config, split, read_rows(config.data, config.task)
        most = config.questions or 10
        self.numbers = held_out_rows(self.rows, split, most)
        if self.rows.different_paragraphs < config.documents:
            raise BadInput(f"{config.data}: {self.rows.different_paragraphs} different paragraphs are too few for --documents "
                             f"{config.documents}")
        if len(self.numbers) < most:
            raise BadInput(f"{config.data}: {len(self.numbers)} questions are too few for tasks of up to {most}")
        gold = sum(sorted(self.rows.gold[number] for number in self.numbers)[-most:])
        if gold > config.documents:
            raise BadInput(f"--documents {config.documents} cannot hold the gold paragraphs of {most} questions (up to "
                             f"{gold}): raise it, or lower --questions")

    def __call__(self, index):
        """Task number `index`: its questions, distractors and order hang on the index, and in training on the seed."""
        rng = random.Random(f"{self.config.task} {self.split} {self.config.seed if self.split == 'train' else ''} {index}")
        questions = self.config.questions or (1 if rng.random() < 0.5 else rng.randint(2, 10))
        examples = [self.rows[number] for number in rng.sample(self.numbers, questions)]
        gold = [p for example in examples for p in example.paragraphs[: example.gold]]
        own = [p for example in examples for p in example.paragraphs[example.gold :]]
        rng.shuffle(own)  # if there is no room for all of them, none is preferred
        documents = dict.fromkeys(list(dict.fromkeys(gold + own))[: self.config.documents])
        while len(documents) < self.config.documents:
            documents[rng.choice(self.rows[rng.randrange(len(self.rows))].paragraphs)] = None
        documents = ["\n".join(paragraph) for paragraph in documents]
        rng.shuffle(documents)
        return Task(f"{self.config.task}-{self.split}-{index}", tuple(e.question for e in examples), tuple(documents))


class SavedTasks:
    """The tasks of a saved set: for the test in their order, in training in passes, shuffled."""

    def __init__(self, config, split):
        self.seed, self.split, self.rows = config.seed, split, read_rows(config.data, config.task)
        self.numbers = held_out_rows(self.rows, split, 5)
        if not self.numbers:
            raise BadInput(f"{config.data}: {len(self.rows)} tasks are too few to train on: one has to be held out")

    def __call__(self, index):
        done, index = divmod(index, len(self.numbers))
        order = self.numbers
        if self.split == "train":
            order = random.Random(f"saved {self.seed} {done}").sample(self.numbers, len(self.numbers))
        return self.rows[order[index]]


def save_tasks(tasks, path):
    """Write tasks as a saved set; their chunks are made anew when it is read."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        for task in tasks:
            questions = [{"question": q.text, "answers": q.answers, "support": q.support} for q in task.questions]
            file.write(json.dumps({"id": task.id, "questions": questions, "documents": task.documents}, ensure_ascii=False) + "\n")
    part.rename(path)


def lay_out(task, config, count):
    """The task with its documents numbered and cut into chunks; with --order N, in another order, the N-th."""
    documents = list(task.documents)
    if config.order:
        random.Random(f"{config.order} {task.id}").shuffle(documents)
    chunks = split_chunks([f"Document {n}: {text}\n" for n, text in enumerate(documents, start=1)], config.chunk_tokens, count)
    return dataclasses.replace(task, documents=tuple(documents), chunks=chunks)


def split_chunks(texts, most, count):
    """Join `texts` to chunks of at most `most` tokens, whole where they fit; "".join(chunks) == "".join(texts)."""
    chunks, used = [], most
    for text, size in zip(texts, count(texts)):
        while size > most:  # too long for any chunk: cut at white space if there is some
            window = text[: 16 * most]  # never counts the whole rest, which would be quadratic
            cut = len(window) * most // max(most, count([window])[0])
            while count([text[:cut]])[0] > most:
                cut = cut * 9 // 10
            cut = max(1, text.rfind(" ", 1, cut) + 1 or cut)
            chunks.append(text[:cut])
            text, used = text[cut:], most
            [size] = count([text]) if len(text) <= 16 * most else [most + 1]
        if text:
            if used + size > most:
                chunks.append("")
                used = 0
            chunks[-1] += text
            used += size
    return tuple(chunks)


def main():
    config, extra = parse_args("Build the test tasks of a QA file, and save them.", extra=[
        ("--out", dict(required=True, metavar="FILE", help="the JSONL file to write"))])
    check_new_file("--out", extra["out"], config.overwrite)
    if config.task in ("town", "saved"):
        raise BadInput(f"--task {config.task}: a set is built from a QA file: hotpotqa, 2wikimultihopqa or musique")
    build = QATasks(config, "test")
    save_tasks((build(index) for index in range(config.eval_tasks)), extra["out"])
    print(f"{config.eval_tasks} tasks of {config.documents} documents, saved as {extra['out']}; "
          f"next: python evaluate.py --name NAME --task saved --data {extra['out']} --eval_tasks {config.eval_tasks}")


if __name__ == "__main__":
    main()
