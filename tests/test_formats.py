"""The data files that people have: their shapes, their bad rows, and the benchmarks."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import TASKS, BadInput, Config
from tasks import Question, Task, held_out_tasks, load_tasks
from tasks.formats import FORMATS, read_rows
from tasks.qa import lay_out

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
HOTPOT = {
    "question": "Q?",
    "answer": "A",
    "supporting_facts": [["T", 1]],
    "context": [["T", ["One.", "Two."]], ["U", ["x"]]],
}
MUSIQUE = {
    "question": "Q?",
    "answer": "A",
    "answer_aliases": ["B"],
    "answerable": True,
    "paragraphs": [
        {"idx": 3, "title": "T", "paragraph_text": "Not this.", "is_supporting": False},
        {"idx": 7, "title": "T", "paragraph_text": "First.\u2028The a is.", "is_supporting": True},
    ],
    "question_decomposition": [{"answer": "A", "paragraph_support_idx": 7}],
}
SAVED = {"id": 1, "questions": [{"question": "Q", "answers": ["a"]}], "documents": ["b"]}


def count(texts):
    return [len(text.split()) for text in texts]


@pytest.fixture
def write(tmp_path):
    """write(rows) -> the path of a new JSONL file. A text or bytes are written as they are."""

    def write(content, name="file.json"):
        if isinstance(content, list):
            lines = [json.dumps(row, ensure_ascii="\\ud83d" in str(row)) for row in content]
            content = "\n".join(lines) + "\n"
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def refusal(path, task):
    """The sentence with which read_rows refuses a file."""
    with pytest.raises(BadInput) as error:
        read_rows(path, task)
    message = str(error.value)
    assert path in message and "\n" not in message
    return message


def play(path, task, questions=0):
    """The test tasks of a file."""
    config = Config(task=task, data=path, questions=questions, chunk_tokens=50)
    return held_out_tasks(config, "test", 100, count)


# --- shapes of files and rows ---------------------------------------------------------------------
def test_every_task_has_a_format():
    """Bug: a task that --task accepts has no reader."""
    assert {"town", *FORMATS} == set(TASKS)


def test_details_of_the_formats(write):
    """Bug: 2Wiki's sentences are glued together, JSONL is split at separators inside a text, or
    MuSiQue's paragraphs are found by their titles, which repeat."""
    [example] = read_rows(write([HOTPOT]), "2wikimultihopqa")
    assert example.documents == ("T\nOne. Two.", "U\nx") and example.gold == 1
    assert example.questions == (Question("Q?", ("A",), (("T", "Two."),)),)
    line = json.dumps(MUSIQUE, ensure_ascii=False)
    example, again = read_rows(write(f"{line}\n \r\n{line}\r\n", "m.jsonl"), "musique")
    assert example.questions == (Question("Q?", ("A", "B"), (("T", "The a is."),)),)
    assert example.documents == ("T\nFirst. The a is.", "T\nNot this.") and example.gold == 1
    assert again == example


def test_equal_texts_are_stored_once():
    """Bug: a paragraph that many rows share is kept once per row, in several times the memory."""
    path = str(DATA / "musique.jsonl")
    rows = read_rows(path, "musique")
    assert read_rows(path, "musique") is rows  # not read again
    documents = [text for row in rows for text in row.documents]
    assert len(set(map(id, documents))) == len(set(documents)) < len(documents)


LISTS = {"title": ["T", "U"], "sentences": [["One.", "Two."], ["x"]]}
SHAPES = {
    "lists": (LISTS, {"title": ["T"], "sent_id": [1]}),
    "objects": (
        [{"title": "T", "sentences": ["One.", "Two."]}, {"title": "U", "sentences": ["x"]}],
        [{"title": "T", "sent_id": 1}],
    ),
    "text": (json.dumps(HOTPOT["context"]), json.dumps(HOTPOT["supporting_facts"])),
    "text of lists": (json.dumps(LISTS), json.dumps([{"title": "T", "sent_id": 1}])),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_the_hub(write, shape):
    """Bug: a file that was exported from the hub is refused, or its gold sentences get lost."""
    context, facts = SHAPES[shape]
    row = HOTPOT | {"context": context, "supporting_facts": facts}
    original, same = read_rows(write([HOTPOT, row]), "hotpotqa")
    assert same == original


@pytest.mark.parametrize("task, row", [("hotpotqa", HOTPOT), ("saved", SAVED)])
def test_kinds_of_files(write, task, row):
    """Bug: the reader depends on the file's name or on --task, or stumbles over a BOM."""
    rows = [row, row | {"id": 2}]
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    files = {
        "lines": lines,
        "lines with carriage returns": lines.replace(", ", ",\r "),
        "list": json.dumps(rows),
        "indented": "\n\n" + json.dumps(rows, indent=1),
        "bom": b"\xef\xbb\xbf" + lines.encode(),
        "bom list": b"\xef\xbb\xbf" + json.dumps(rows).encode(),
        "gzip": gzip.compress(lines.encode()),
        "gzip list": gzip.compress(json.dumps(rows).encode()),
    }
    results = [read_rows(write(content, name), task) for name, content in files.items()]
    assert len(results[0]) == 2 and all(one == results[0] for one in results)


def test_jsonl_is_not_parsed_as_a_whole(write, monkeypatch):
    """Bug: all rows of a JSONL file of many GB are in memory at once."""
    events, loads = [], json.loads
    monkeypatch.setattr("json.loads", lambda text: events.append("parsed") or loads(text))
    monkeypatch.setitem(FORMATS, "saved", lambda row: events.append("converted") or row)
    read_rows(write([SAVED | {"id": id} for id in range(9)]), "saved")
    assert "parsed parsed parsed" not in " ".join(events) and events.count("converted") == 9


def fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_parquet_and_the_hub(write, monkeypatch):
    """Bug: a Parquet file is read as JSON, a hub name loses its configuration, or a mistyped file
    name is looked up on the hub."""
    calls = []

    def load_dataset(*args, **keywords):
        calls.append((args, keywords))
        return [HOTPOT]

    fake_datasets(monkeypatch, load_dataset)
    path = write(b"PAR1...", "rows")
    [example] = read_rows(path, "hotpotqa")
    assert read_rows("some/name:distractor:validation", "hotpotqa") == [example]
    assert read_rows("some/name:distractor", "hotpotqa") == [example]
    assert read_rows("some/name-v1.1", "hotpotqa") == [example]
    assert calls == [
        (("parquet",), {"data_files": path, "split": "train"}),
        (("some/name", "distractor"), {"split": "validation"}),
        (("some/name", "distractor"), {"split": "train"}),
        (("some/name-v1.1", None), {"split": "train"}),
    ]
    for path in ("some/name.json", "/some/name", "name", "some/name.parquet", "tests/data"):
        assert refusal(path, "hotpotqa").endswith("no such file") and len(calls) == 4


def test_a_data_set_that_cannot_be_loaded(write, monkeypatch):
    """Bug: a missing package or a wrong hub name ends in a traceback."""
    monkeypatch.setitem(sys.modules, "datasets", None)  # then the import fails
    parquet = write(b"PAR1...", "rows")
    for path in (parquet, "some/missing"):
        assert "pip install datasets" in refusal(path, "hotpotqa")
    assert "no such file" in refusal("some/missing", "hotpotqa")
    assert "no such file" not in refusal(parquet, "hotpotqa")

    def load_dataset(*_, **__):
        raise RuntimeError("Couldn't\nfind it")

    fake_datasets(monkeypatch, load_dataset)
    assert "Couldn't find it" in refusal("some/missing", "hotpotqa")


# --- rows that are skipped ------------------------------------------------------------------------
def test_unanswerable_and_bad_rows_are_skipped(write, capsys, monkeypatch):
    """Bug: MuSiQue-Full is refused, or one bad row makes a file useless, or gets lost in silence,
    or is reported by every process."""
    hop = {"answer": "A", "paragraph_support_idx": None}
    unanswerable = [MUSIQUE | {"answerable": False}, MUSIQUE | {"question_decomposition": [hop]}]
    rows = [*unanswerable * 15, MUSIQUE, MUSIQUE | {"answer": None}, *[MUSIQUE] * 18]
    path = write(rows)
    assert read_rows(path, "musique") == read_rows(write([MUSIQUE], "good"), "musique") * 19
    counts = "skipped 31 of 50 rows: 30 without an answer in the text, 1 bad, the first is line 32"
    reason = "its question or its answer is empty"
    assert capsys.readouterr().out == f"{path}: {counts}: {reason}\n"
    monkeypatch.setenv("RANK", "1")
    read_rows(write(rows, "other"), "musique")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(answer=None), "its answer is empty"),
        (dict(answer=""), "its answer is empty"),
        (dict(answer=" "), "its answer is empty"),
        (dict(question=" "), "its question"),
        (dict(question=None), "not in this format"),
        (dict(question="Who? \ud83d"), "surrogates not allowed"),  # half an emoji
        (dict(context=[["T", ["A text. \ud83d"]]]), "surrogates not allowed"),
        (dict(context=None), "not in this format"),
        (dict(context="[["), "not in this format"),
        (dict(context=[["T", "a text"]]), "the sentences of 'T' are not a list"),
        (dict(supporting_facts=[]), "no supporting paragraphs"),
        (dict(supporting_facts=[["Gone", 0]]), "paragraph 'Gone' is not in its context (a 'fullw"),
    ],
)
def test_bad_rows(write, change, reason):
    """Bug: a bad row becomes a question that nobody can answer, or one too many are accepted."""
    rows = [HOTPOT] * 18 + [HOTPOT | change]
    assert len(read_rows(write([HOTPOT, *rows], "1 of 20"), "hotpotqa")) == 19
    message = refusal(write(rows, "1 of 19"), "hotpotqa")
    assert "line 19: " in message and reason in message
    assert "1 of 19 rows are bad, at most 5% may be" in message


def test_a_bad_task_of_a_saved_set_is_skipped(write, capsys):
    """Bug: a saved set is refused, or shortened in silence, because of one bad task."""
    bad = SAVED | {"id": "x", "questions": [{"question": "Q", "answers": [" "]}]}
    good = [SAVED | {"id": id} for id in range(20)]
    assert [task.id for task in play(write([bad, *good]), "saved")] == [str(n) for n in range(20)]
    assert "skipped 1 of 21 questions: " in capsys.readouterr().out


BAD_FILES = [
    (None, "hotpotqa", "no such file"),
    ("", "hotpotqa", "the file is empty"),
    (" \n", "musique", "the file is empty"),
    (gzip.compress(b""), "musique", "the file is empty"),
    ("[]", "hotpotqa", "no rows that can be used"),
    ("3", "2wikimultihopqa", "no list of rows. Accepted: "),
    ('{"train": [],\n "dev": []}', "hotpotqa", "line 1 is not JSON, or not complete"),
    ('{"train": [], "dev": []}', "hotpotqa", "line 1: it is not in this format"),
    ('{"train": [], "dev": []}', "hotpotqa", "its fields are train, dev"),
    ("{not json", "musique", "line 1 is not JSON"),
    ("[" * 100_000, "musique", "not readable, or not complete: maximum recursion depth"),
    ('[\n{"question": "Q', "hotpotqa", "line 2 is not JSON, or not complete"),
    (json.dumps(SAVED) + '\n\n{"id"', "saved", "line 3 is not JSON, or not complete"),
    ("id,question\n1,Q", "saved", "line 1 is not JSON"),
    ("[3]", "hotpotqa", "row 1: it is not in this format"),
    ('[{"question": "Q?"}]', "hotpotqa", "row 1: it is not in this format: KeyError('support"),
    (b"PK\x03\x04\xff", "hotpotqa", "unpack a .zip"),
    (b"\xfd7zXZ\x00", "musique", "unpack a .zip, .xz"),
    (b"name.json\0\0\0", "saved", "unpack a .zip, .xz or .tar"),
    (b"\x1f\x8b\x08\x00", "hotpotqa", "not complete"),
    (gzip.compress(b"[]" * 999)[:-9], "hotpotqa", "not complete"),
    (gzip.compress(b"[]")[:10] + b"\xff" * 30, "hotpotqa", "not readable"),
    (json.dumps(SAVED | {"questions": []}), "saved", "lists that are not empty"),
    (json.dumps(SAVED | {"documents": "text"}), "saved", "lists that are not empty"),
    (json.dumps(SAVED | {"documents": [3]}), "saved", "line 1: it is not in this format"),
    (json.dumps(SAVED).replace('["a"]', '"Ben"'), "saved", "answers are not a list"),
    (
        json.dumps(SAVED).replace('["a"]', "[]"),
        "saved",
        "line 1, question 1: its question or its a",
    ),
    ("\n".join([json.dumps(SAVED)] * 2), "saved", "line 1 and line 2 have the same id '1'"),
]


@pytest.mark.parametrize("content, task, complaint", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files_get_one_sentence(tmp_path, write, content, task, complaint):
    """Bug: a wrong file ends in a traceback deep in training, without the file's name."""
    path = str(tmp_path / "file.json") if content is None else write(content)
    assert complaint in refusal(path, task)


# --- 2Wiki's aliases ------------------------------------------------------------------------------
def test_aliases_of_2wiki(write):
    """Bug: answers that 2Wiki's official scorer accepts count as wrong."""
    rows = [HOTPOT | {"answer_id": "Q1"}, HOTPOT | {"answer_id": None}, HOTPOT]
    path = write(rows, "alone")
    assert {row.questions[0].answers for row in read_rows(path, "2wikimultihopqa")} == {("A",)}
    write([{"Q_id": "Q1", "aliases": ["B"], "demonyms": ["C", "A"]}], "id_aliases.json")
    path = write(rows)
    answers = [row.questions[0].answers for row in read_rows(path, "2wikimultihopqa")]
    assert answers == [("A", "B", "C"), ("A",), ("A",)]
    assert read_rows(path, "hotpotqa")[0].questions[0].answers == ("A",)
    for bad in (
        [{"Q_id": "Q1"}],
        [3],
        "{",
        b"\xff",
        [{"Q_id": "Q1", "aliases": "B", "demonyms": []}],
    ):
        write(bad, "id_aliases.json")
        with pytest.raises(BadInput, match="id_aliases.json is not 2Wiki's file of aliases"):
            read_rows(write(rows, f"with {len(bad)} {bad[:1]!r:.9}"), "2wikimultihopqa")


# --- benchmarks -----------------------------------------------------------------------------------
def test_memagent(write):
    """Bug: MemAgent's documents are one text with two numberings, or RULER's rows are refused."""
    context = "Document 1:\nT\nOne.\n\nDocument 2:\nU\nSee Document 1: two."
    rows = [
        {"input": "Q?", "answers": ["A", "B"], "context": context, "index": 5},
        {"input": "Q?", "outputs": "12", "context": "no headings"},
        {"input": "Q?", "answers": [7], "context": context, "index": 5},
    ]
    one, two, three = play(write(json.dumps(rows)), "memagent")
    assert "".join(one.chunks) == "Document 1: T\nOne.\n\n\nDocument 2: U\nSee Document 1: two.\n"
    assert (one.questions, one.id) == ((Question("Q?", ("A", "B")),), "5")
    assert (two.questions, two.documents) == ((Question("Q?", ("12",)),), ("no headings",))
    assert (three.questions, three.id) == ((Question("Q?", ("7",)),), "5 (row 3)")


def talk(id, questions):
    turn = {"speaker": "Ann", "dia_id": "D1:1", "text": "Hi."}
    conversation = {"speaker_a": "Ann", "speaker_b": "Ben", "session_11_date_time": "May 3"}
    conversation |= {"session_10_date_time": "May 2", "session_10": [turn | {"text": "Bye."}]}
    conversation |= {"session_9_date_time": "May 1", "session_12": []}
    conversation["session_9"] = [turn, turn | {"speaker": "Ben", "blip_caption": "a cat"}]
    return {"sample_id": id, "conversation": conversation, "qa": questions}


def test_locomo(write, capsys):
    """Bug: sessions are read in the order of their names, the photos are lost, a question without
    an answer is asked, or 200 questions are shown at once."""
    questions = [{"question": f"{n}?", "answer": n, "category": 1} for n in range(12)]
    trick = {"question": "X?", "adversarial_answer": "x", "category": 5}
    bad = {"question": "Y?", "category": 1}
    path = write(json.dumps([talk("a", [trick, *questions, bad]), talk("b", questions)]))
    one, two, *others = play(path, "locomo")
    photo = "May 1\nAnn: Hi.\nBen: Hi. [shares a photo: a cat]"
    assert one.documents == two.documents == (photo, "May 2\nAnn: Bye.")
    assert [task.id for task in (one, two, *others)] == ["a/0", "a/1", "b/0", "b/1"]
    assert [len(task.questions) for task in (one, two)] == [10, 2]
    assert two.questions[-1] == Question("11?", ("11",))
    counts = "skipped 2 of 26 questions: 1 without an answer in the text, 1 bad, the first is row 1"
    assert f"{path}: {counts}, question 14: " in capsys.readouterr().out
    assert [len(task.questions) for task in play(path, "locomo", questions=5)] == [5, 5, 2] * 2


def test_training_and_held_out_conversations_are_disjoint(write):
    """Bug: the questions of one conversation are split between training and the held-out score."""
    questions = [{"question": f"{n}?", "answer": n, "category": 1} for n in range(30)]
    path = write(json.dumps([talk(id, questions) for id in "abcd"]))
    config = Config(task="locomo", data=path, questions=0)
    train, dev = (load_tasks(config, split, count) for split in ("train", "dev"))
    assert {dev(index).id[0] for index in range(6)} == {"b", "d"}
    trained = [train(index).id for index in range(12)]
    assert {id[0] for id in trained} == {"a", "c"} and sorted(trained[:6]) == sorted(trained[6:])


def test_longmemeval(write, capsys):
    """Bug: the model does not know when a session or the question was, reads the sessions of the
    oracle file in another order, or is asked what has no answer."""
    sessions = [
        [{"role": "user", "content": "Hi.\nBye."}, {"role": "assistant", "content": "Yes?"}],
        [{"role": "user", "content": "First."}],
    ]
    row = {
        "question_id": "q",
        "question": "What?",
        "answer": 3,
        "question_date": "2023/05/10 (Wed) 10:00",
        "haystack_dates": "['2023/05/03 (Wed) 09:00', '2023/05/02 (Tue) 09:00']",
        "haystack_sessions": sessions,
    }
    path = write(json.dumps([row, row | {"question_id": "r_abs"}]))
    [task] = play(path, "longmemeval")
    assert task.questions == (Question("(2023/05/10 (Wed) 10:00) What?", ("3",)),)
    late = "2023/05/03 (Wed) 09:00\nuser: Hi.\nBye.\nassistant: Yes?"
    assert task.documents == ("2023/05/02 (Tue) 09:00\nuser: First.", late) and task.id == "q"
    assert "skipped 1 of 2 rows: 1 without an answer in the text" in capsys.readouterr().out


def test_memoryagentbench(write):
    """Bug: facts lose their order or are cut in two, or only the first question is asked."""
    facts = "".join(f"{n}. The fact number {n} is here.\n" for n in range(40))
    row = {"context": facts, "metadata": {"source": "factconsolidation_sh_6k"}}
    row |= {
        "questions": [f"{n}?" for n in range(11)],
        "answers": [[f"{n}", "x"] for n in range(11)],
    }
    tasks = play(write([row, row]), "memoryagentbench")
    source = "factconsolidation_sh_6k"
    assert [task.id for task in tasks[:2]] == [f"{source}/0", f"{source}/1"]
    assert len({task.id for task in tasks}) == 4 and tasks[0].documents == (facts,)
    assert tasks[1].questions == (Question("10?", ("10", "x")),)
    assert len(tasks[0].chunks) > 3 and all(
        chunk.endswith("here.\n") for chunk in tasks[0].chunks[:-1]
    )


def test_babilong(write):
    """Bug: a row of BABILong is refused, or all have the same id."""
    row = {"input": "Mary went home.", "question": "Where is Mary?", "target": "home"}
    one, two = play(write([row, row]), "babilong")
    assert one.questions == (Question("Where is Mary?", ("home",)),)
    assert one.documents == ("Mary went home.",) and (one.id, two.id) == ("line 1", "line 2")


@pytest.mark.parametrize("task", ["locomo", "longmemeval", "memoryagentbench"])
def test_a_meaningful_order_is_kept(task):
    """Bug: --order shuffles a conversation, so that an old fact becomes the newest."""
    made = Task("a", (), ("b", "c"))
    with pytest.raises(BadInput, match=f"--order: the documents of {task}"):
        lay_out(made, Config(task=task, data="x", order=1), list)
    lay_out(made, Config(task=task, data="x"), lambda texts: [1] * len(texts))


def test_the_town_imports_no_readers():
    """Bug: a reader, and what it imports, is loaded for the town."""
    code = (
        "import sys, grpo, tasks; from config import Config; tasks.load_tasks(Config(), 'test', 0)"
    )
    code += "; print({'tasks.qa', 'tasks.formats'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
