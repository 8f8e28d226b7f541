"""Readers of data files. One function per format converts a row.

A file is a JSON list, JSONL, either of them compressed by gzip, or Parquet. It may also be a data
set of the Hugging Face hub: NAME[:CONFIG[:SPLIT]]. In HotpotQA, 2WikiMultihopQA and MuSiQue a row
is one question with its paragraphs. In the other formats it is a complete task. Their rows are
brought into the format of saved sets, which is also the format for your own questions:

    {"id": "a", "questions": [{"question": "Who?", "answers": ["Ben", "an alias"]}],
     "documents": ["a text", "another one"]}
"""

import ast
import functools
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from sys import intern

from config import BadInput, need
from tasks import Question, Task

MAX_BAD = 0.05  # a file with a larger share of bad rows is refused
ACCEPTED = "Accepted: a JSON list of rows or JSONL, UTF-8 or .gz; unpack a .zip, .xz or .tar first"
HUB = re.compile(r"(?!.*\.(json|jsonl|gz|parquet)$)[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
Rows = Iterator[tuple[str, dict]]  # (place, row); the place is "line N" of JSONL, else "row N"


@dataclass(frozen=True, slots=True)
class Example:
    """A row of a QA file: its question, and its paragraphs as "title, newline, text"."""

    questions: tuple[Question, ...]  # one
    documents: tuple[str, ...]  # the gold ones first
    gold: int  # the number of gold ones


# --- rows of a file -------------------------------------------------------------------------------
def raw_rows(path: str) -> Rows:
    """The rows of a file, or of a data set of the hub, one by one."""
    if not os.path.isfile(path):
        need(HUB.fullmatch(path) and not os.path.exists(path), f"{path}: no such file")
        name, config, split = (path.split(":") + ["", ""])[:3]
        what = f"{path}: no such file; as a data set of the hub,"
        return dataset_rows(what, name, config or None, split=split or "train")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return dataset_rows(f"{path}:", "parquet", data_files=path, split="train")
    return json_rows(path, start[:2] == b"\x1f\x8b")


def dataset_rows(what: str, *names: str | None, **settings) -> Rows:
    """The rows that load_dataset(*names, **settings) gives. what: for error messages."""
    try:
        from datasets import load_dataset

        rows = load_dataset(*names, **settings)
    except ImportError as error:
        raise BadInput(f"{what} it needs a package: pip install datasets") from error
    except Exception as error:  # load_dataset raises errors of many kinds
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{what} it cannot be loaded: {reason}") from error
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def json_rows(path: str, compressed: bool) -> Rows:
    """raw_rows of JSON or JSONL. JSONL is read line by line."""
    open_file, number = gzip.open if compressed else open, 0
    # newline="\n": texts contain other line separators
    with open_file(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        start = file.read(1000).lstrip()
        need(start, f"{path}: the file is empty")
        file.seek(0)
        try:
            if start.startswith("{"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"line {number}", json.loads(line)
                return
            rows = json.load(file)
        except json.JSONDecodeError as error:
            line = f"line {number or error.lineno} is not JSON, or not complete: {error.msg}"
            raise BadInput(f"{path}: {line}. {ACCEPTED}") from error
    need(isinstance(rows, list), f"{path}: there is no list of rows. {ACCEPTED}")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


# --- all rows, converted --------------------------------------------------------------------------
class Report:
    """Counts what is skipped of the rows of a file, or of the questions in them."""

    def __init__(self, path: str, unit: str):
        self.path, self.unit = path, unit
        self.total = self.unanswerable = self.bad = 0
        self.first = ""  # the first bad one: where it is, and why it is bad

    def attempt(self, where: str, function: Callable, row: dict):
        """function(row), which is None if there is no answer. Also None if the row is bad."""
        self.total += 1
        try:
            result = function(row)
            self.unanswerable += result is None
            return result
        except BadInput as error:
            reason = str(error)
        except (AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
            fields = f", and its fields are {', '.join(row)}" if isinstance(row, dict) else ""
            reason = f"it is not in this format: {error!r:.200}{fields}"
        self.bad += 1
        self.first = self.first or f"{where}: {reason}"
        return None

    def finish(self):
        """Print what was skipped. Raises BadInput if too many are bad."""
        share = f"{self.bad} of {self.total} {self.unit} are bad, at most {MAX_BAD:.0%} may be"
        need(self.bad <= MAX_BAD * self.total, f"{self.path}: {self.first} ({share})")
        skipped = self.unanswerable + self.bad
        if skipped and os.environ.get("RANK", "0") == "0":
            first = f", the first is {self.first}" if self.first else ""
            reasons = f"{self.unanswerable} without an answer in the text, {self.bad} bad{first}"
            print(f"{self.path}: skipped {skipped} of {self.total} {self.unit}: {reasons}")


@functools.cache
def read_rows(path: str, task: str) -> list[Example] | list[Task]:
    """All rows of a data file, converted. Each file is read once per process.

    It keeps only the converted rows, and stores equal texts once. Reading a JSON list takes memory
    of four to six times the file's size. Raises BadInput, with the line or row, for a bad file.
    """
    report, questions = Report(path, "rows"), Report(path, "questions")
    rows, places = [], {}  # places: id -> where it was found
    function = FORMATS[task]
    if task == "2wikimultihopqa":
        function = functools.partial(hotpot_example, aliases=read_aliases(path))

    def convert_row(row):
        one = function(row)
        return complete_task(one, where, questions) if isinstance(one, dict) else one

    try:
        for where, row in raw_rows(path):
            one = report.attempt(where, convert_row, row)
            if isinstance(one, Task):
                same = f"{path}: {places.get(one.id)} and {where} have the same id {one.id!r}"
                need(one.id not in places or task != "saved", f"{same}: give each its own")
                one = replace(one, id=f"{one.id} ({where})") if one.id in places else one
                places[one.id] = where
            if one and one.questions:
                rows.append(one)
    except (EOFError, OSError, RecursionError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(f"{path}: not readable, or not complete: {error}. {ACCEPTED}") from error
    report.finish()
    questions.finish()
    need(rows, f"{path}: the file has no rows that can be used")
    return rows


def alias_file(data: str) -> str:
    """2Wiki's file of aliases, which lies beside the data file."""
    return os.path.join(os.path.dirname(data), "id_aliases.json")


def read_aliases(data: str) -> dict[str, list[str]]:
    """{Wikidata id: aliases and demonyms}, or {} without a file of aliases."""
    path, aliases = alias_file(data), {}
    try:
        for _, row in raw_rows(path) if os.path.isfile(path) else ():
            aliases[row["Q_id"]] = row["aliases"] + row["demonyms"]
    except (EOFError, OSError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise BadInput(f"{path} is not 2Wiki's file of aliases: {error!r}") from error
    return aliases


# --- formats: QA sets -----------------------------------------------------------------------------
def parsed(value: object) -> object:
    """A field that some files hold as JSON, or as Python's repr, in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return ast.literal_eval(value)


def pairs(value: object, other: str) -> list[tuple]:
    """[(title, value of `other`)] from such a list, a list of dicts, or a dict of lists."""
    value = parsed(value)
    if isinstance(value, dict):
        return list(zip(value["title"], value[other], strict=True))
    return [(one["title"], one[other]) if isinstance(one, dict) else tuple(one) for one in value]


def checked(text: str) -> str:
    """The interned text: equal texts are stored once. UnicodeEncodeError for half an emoji."""
    text.encode()
    return intern(text)


def make_question(text: str, answers: list, support: Iterable[tuple] = ()) -> Question:
    """answers: texts or numbers, the gold answer first. Empty and repeated aliases are dropped."""
    need(isinstance(answers, list), "its answers are not a list")
    texts = [str(one).strip() if isinstance(one, str | int | float) else "" for one in answers]
    need(text.strip() and texts and texts[0], "its question or its answer is empty")
    answers = dict.fromkeys(map(checked, filter(None, texts)))  # an ordered set
    return Question(checked(text.strip()), tuple(answers), tuple(dict.fromkeys(support)))


def make_example(question: Question, gold: list[str], rest: list[str]) -> Example:
    """gold, rest: the texts of paragraphs. Repeated ones are dropped."""
    need(gold, "it has no supporting paragraphs")
    documents = tuple(dict.fromkeys(map(checked, gold + rest)))
    return Example((question,), documents, len(set(gold)))


def hotpot_example(row: dict, aliases: dict | None = None) -> Example:
    """A row of HotpotQA or 2WikiMultihopQA. aliases: see read_aliases."""
    wanted = {}  # title -> numbers of the supporting sentences
    for title, number in pairs(row["supporting_facts"], "sent_id"):
        wanted.setdefault(title, []).append(number)
    context = pairs(row["context"], "sentences")
    titles = dict(context)
    for title in wanted:
        hint = "a 'fullwiki' file? use 'distractor'"
        need(title in titles, f"its gold paragraph {title!r} is not in its context ({hint})")
    support, gold, rest = [], [], []
    for title, sentences in context:
        need(isinstance(sentences, list), f"the sentences of {title!r} are not a list")
        sentences = [sentence.strip() for sentence in sentences]
        text = " ".join(sentence for sentence in sentences if sentence)
        (gold if title in wanted else rest).append(f"{title}\n{text}")
        numbers = [number for number in wanted.get(title, ()) if 0 <= number < len(sentences)]
        support += [(title, sentences[number]) for number in numbers if sentences[number]]
    answers = [row["answer"], *(aliases or {}).get(row.get("answer_id"), ())]
    return make_example(make_question(row["question"], answers, support), gold, rest)


def musique_example(row: dict) -> Example | None:
    """A row of MuSiQue. Its support: for each hop, the first sentence with the hop's answer."""
    hops = row["question_decomposition"]
    unknown = any(hop["paragraph_support_idx"] is None for hop in hops)
    if unknown or row.get("answerable") is False:  # in MuSiQue-Full
        return None
    texts, gold = {}, []  # texts: idx -> (title, text)
    for one in row["paragraphs"]:
        title, text = one["title"], " ".join(one["paragraph_text"].split())
        texts[one["idx"]] = (title, text)
        if one["is_supporting"]:
            gold.append(f"{title}\n{text}")
    support = []
    for hop in hops:
        title, text = texts[hop["paragraph_support_idx"]]
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z0-9\"'(])", text)
        answer = str(hop["answer"]).lower()
        matching = [sentence for sentence in sentences if answer in sentence.lower()]
        support.append((title, (matching or sentences)[0]))
    answers = [row["answer"], *(row.get("answer_aliases") or ())]
    question = make_question(row["question"], answers, support)
    return make_example(question, gold, list(map("\n".join, texts.values())))


# --- formats: complete tasks, as rows of a saved set ----------------------------------------------
def complete_task(row: dict, where: str, report: Report) -> Task:
    """The Task of a row of a saved set. In `questions`, None is a question without an answer."""

    def convert_question(one):
        if one is None:
            return None
        support = [(checked(title), checked(text)) for title, text in one.get("support", ())]
        return make_question(one["question"], one["answers"], support)

    filled = all(isinstance(row[name], list) and row[name] for name in ("questions", "documents"))
    need(filled, "its questions and documents must be lists that are not empty")
    questions = []
    for number, one in enumerate(row["questions"], 1):
        questions.append(report.attempt(f"{where}, question {number}", convert_question, one))
    documents = tuple(map(checked, row["documents"]))
    id = where if row.get("id") is None else checked(str(row["id"]))
    return Task(id, tuple(filter(None, questions)), documents)


def task_row(question: str, answers: object, documents: list[str], id: str | None = None) -> dict:
    """A saved set's row with one question. answers: a list, or one text or number."""
    answers = answers if isinstance(answers, list) else [answers]
    questions = [{"question": question, "answers": answers}]
    return {"id": id, "questions": questions, "documents": documents}


def memagent_row(row: dict) -> dict:
    """A row of MemAgent's evaluation files. RULER's rows have `outputs` instead of `answers`."""
    answers = row["outputs"] if "outputs" in row else row["answers"]
    documents = re.split(r"^Document \d+:\s*", row["context"], flags=re.M)
    documents = list(filter(str.strip, documents))
    return task_row(row["input"], answers, documents, row.get("index"))


def locomo_row(row: dict) -> dict:
    """A conversation of LoCoMo. Its questions of category 5 have no answer in the text."""
    talk, documents = row["conversation"], []
    names = [name for name in talk if re.fullmatch(r"session_\d+", name) and talk[name]]
    for number in sorted(int(name.removeprefix("session_")) for name in names):
        lines = [talk.get(f"session_{number}_date_time", f"session {number}")]
        for turn in talk[f"session_{number}"]:
            caption = turn.get("blip_caption")
            photo = f" [shares a photo: {caption}]" if caption else ""
            lines.append(f"{turn['speaker']}: {turn['text']}{photo}")
        documents.append("\n".join(lines))
    questions = [one | {"answers": [one.get("answer")]} for one in row["qa"]]
    questions = [one if one["category"] != 5 else None for one in questions]
    return {"id": row["sample_id"], "questions": questions, "documents": documents}


def longmemeval_row(row: dict) -> dict | None:
    """A question of LongMemEval. Its sessions are sorted by date."""
    if row["question_id"].endswith("_abs"):
        return None
    dated = zip(parsed(row["haystack_dates"]), row["haystack_sessions"], strict=True)
    documents = []
    for date, turns in sorted(dated, key=lambda one: one[0]):  # such as 2023/05/20 (Sat) 02:21
        lines = [f"{turn['role']}: {turn['content']}" for turn in turns]
        documents.append("\n".join([date, *lines]))
    question = f"({row['question_date']}) {row['question']}"
    return task_row(question, row["answer"], documents, row["question_id"])


def memoryagentbench_row(row: dict) -> dict:
    """A text of MemoryAgentBench with its questions."""
    asked = zip(row["questions"], row["answers"], strict=True)
    questions = [{"question": text, "answers": answers} for text, answers in asked]
    source = row["metadata"]["source"]
    return {"id": source, "questions": questions, "documents": [row["context"]]}


FORMATS = {  # functions of a row; None is a row whose question has no answer in the text
    "hotpotqa": hotpot_example,
    "2wikimultihopqa": hotpot_example,
    "musique": musique_example,
    "saved": dict,  # as it is
    "memagent": memagent_row,
    "locomo": locomo_row,
    "longmemeval": longmemeval_row,
    "memoryagentbench": memoryagentbench_row,
    "babilong": lambda row: task_row(row["question"], row["target"], [row["input"]]),
}
