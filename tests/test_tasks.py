import json
import random
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from conftest import DATA

from config import Config
from tasks import (QATasks, Question, Rows, elements, held_out_tasks, load_tasks, read_rows, save_tasks, split_chunks,
                   town_task)
from town import NAMES, texts

FILES = {"hotpotqa": "hotpotqa.json", "2wikimultihopqa": "2wikimultihopqa.json", "musique": "musique.jsonl"}


def count(texts):
    return [len(text.split()) for text in texts]


def qa_config(task, **settings):
    return Config(**{"task": task, "data": str(DATA / FILES[task]), "documents": 30, "questions": 2, "max_prompt_tokens": 2000, **settings})


# --- the town ---


def replay(task):
    """{question: answer} by reading the story again from its text, with no help from the generator."""
    state, markets = {}, Counter()
    for sentence in " ".join(task.chunks).split("."):
        if match := re.match(r" *(\w+) (lives in|is a|has a|has no|works for|went to) (\w+)", sentence):
            name, verb, value = match.groups()
            if verb == "went to":
                markets[name] += 1
            elif verb == "has no":
                state.pop((name, "has a"), None)
            else:
                state[name, verb] = value
    answers = {}
    for question in task.questions:
        text, name = question.text, next(word for word in re.findall(r"\w+", question.text) if word in NAMES)
        who = state.get((name, "works for")) if "boss" in text else name
        verb = "lives in" if "live" in text else "is a" if "job" in text else "has a"
        answers[text] = str(markets[name]) if "market" in text else state.get((who, verb), "none")
    return answers


@pytest.mark.parametrize("length", [1, 4])
def test_town_answers_follow_from_the_text(length):
    """Bug: the gold answer is not the last truth told, or is told of a distractor."""
    config = Config(length=length, questions=4)
    kinds, changed, retracted = Counter(), 0, 0
    for index in range(300):
        task = town_task(index, "train", config)
        assert {q.text: q.answers[0] for q in task.questions} == replay(task)
        assert sum(len(chunk.split(".")) - 1 for chunk in task.chunks) >= 14 * length
        kinds.update(re.sub("|".join(NAMES), "X", q.text) for q in task.questions)
        retracted += any(q.answers == ("none",) for q in task.questions)
        homes = [re.search(r"(\w+) lives in", s)[1] for s in " ".join(task.chunks).split(".") if "lives in" in s]
        changed += len(set(homes)) < len(homes)
    assert len(kinds) == 7 and min(kinds.values()) > 50  # every question kind is asked
    assert changed > 100 and retracted > 20


def test_town_streams_are_deterministic_and_disjoint():
    """Bug: test stories are among the training stories, or change with the training seed or the process."""
    streams = {(split, seed): [town_task(i, split, Config(seed=seed)) for i in range(200)]
               for split in ("train", "dev", "test") for seed in (1, 2)}
    assert streams["test", 1] == streams["test", 2] and streams["dev", 1] == streams["dev", 2]
    assert streams["train", 1] != streams["train", 2]
    texts = [{task.chunks for task in streams[key]} for key in (("train", 1), ("train", 2), ("dev", 1), ("test", 1))]
    assert len(set.union(*texts)) == sum(map(len, texts))
    assert town_task(0, "test", Config()).chunks[0] == FIRST_TEST_CHUNK


FIRST_TEST_CHUNK = "Felix has a rabbit. Anna works for Clara."


def test_town_vocabulary_is_complete():
    """Bug: a word of a story is unknown to the word-level tokenizer, so that two different values look alike."""
    known = set(re.findall(r"\w+", " ".join(texts())))
    for index in range(100):
        task = town_task(index, "test", Config())
        for text in (*task.chunks, *(q.text for q in task.questions), *(q.answers[0] for q in task.questions)):
            assert set(re.findall(r"\w+", text)) <= known


# --- the QA files ---


@pytest.mark.parametrize("task", FILES)
def test_qa_tasks_lose_nothing(task):
    """Bug: text lost at chunk borders, gold paragraphs missing, documents repeated, or a wrong number of them."""
    config = qa_config(task, chunk_tokens=150)
    stream = load_tasks(config, "test", count)
    for index in range(20):
        built = stream(index)
        text = "".join(built.chunks)
        titles = re.findall(r"^Document (\d+): ", text, flags=re.M)
        assert titles == [str(n) for n in range(1, 31)]
        bodies = re.split(r"^Document \d+: ", text, flags=re.M)[1:]
        assert len(set(bodies)) == 30
        assert all(size <= 150 for size in count(built.chunks))
        flat = " ".join(text.split())
        for question in built.questions:
            assert question.support
            for support in question.support:
                assert " ".join(support[1].split()) in flat


def test_qa_tasks_have_their_own_shuffle():
    """Bug: every task shuffled with the same constant seed: gold documents always land in the same slots."""
    stream = load_tasks(qa_config("hotpotqa", questions=1), "test", count)
    slots = Counter()
    for index in range(200):
        task = stream(index)
        documents = re.split(r"^Document \d+: ", "".join(task.chunks), flags=re.M)[1:]
        support = task.questions[0].support[0][1]
        slots[next(n for n, d in enumerate(documents) if " ".join(support.split()) in " ".join(d.split()))] += 1
    assert len(slots) > 20 and max(slots.values()) < 30
    assert stream(3) == load_tasks(qa_config("hotpotqa", questions=1), "test", count)(3)


def test_questions_per_task_follow_the_distribution():
    """Bug: --questions 0 never asks ten, or asks one in all tasks."""
    stream = load_tasks(qa_config("hotpotqa", questions=0, documents=45), "test", count)
    numbers = Counter(len(stream(index).questions) for index in range(300))
    assert 110 < numbers[1] < 190 and max(numbers) == 10 and min(numbers) == 1


def test_training_and_dev_questions_are_disjoint():
    """Bug: the held-out score during training is taken on training questions."""
    train, dev = (set(QATasks(qa_config("hotpotqa"), split).numbers) for split in ("train", "dev"))
    assert not train & dev and len(train | dev) == len(read_rows(str(DATA / FILES["hotpotqa"]), "hotpotqa"))
    assert len(QATasks(qa_config("hotpotqa", questions=0, documents=50), "dev").numbers) >= 10  # though the file is small


def test_held_out_qa_tasks_do_not_change_with_the_seed():
    """Bug: runs with different seeds are compared on different questions."""
    for split, same in (("train", False), ("dev", True), ("test", True)):
        one, two = (load_tasks(qa_config("hotpotqa", seed=seed), split, count)(0) for seed in (1, 2))
        assert (one == two) == same


def test_chunks_rejoin_to_the_text():
    """Bug: a document that is longer than a chunk loses its end, or never ends the loop."""
    rng = random.Random(0)
    for _ in range(200):
        texts = ["".join(rng.choice(["ab ", "c", "\n", "de f "]) for _ in range(rng.randint(0, 60))) for _ in range(5)]
        chunks = split_chunks(texts, rng.randint(1, 20), lambda texts: list(map(len, texts)))
        assert "".join(chunks) == "".join(texts) and all(chunks)


def test_a_long_text_is_cut_in_linear_time():
    """Bug: the whole rest of a book without documents is counted again for every chunk, which takes minutes."""
    counted = []

    def count(texts):
        counted.extend(map(len, texts))
        return [len(text.split()) for text in texts]

    text = "a bc def ghij " * 5000
    chunks = split_chunks([text], 50, count)
    assert "".join(chunks) == text and max(count(chunks)) == 50 and len(chunks) < 1.1 * 20_000 / 50
    assert sum(counted) < 20 * len(text)


def test_details_of_the_formats(tmp_path):
    """Bug: 2Wiki sentences glued together; JSONL split at separators inside the text; MuSiQue keyed by repeated titles."""
    row = {"question": "Q?", "answer": "A", "supporting_facts": [["T", 1]], "context": [["T", ["One.", "Two."]], ["U", ["x"]]]}
    (tmp_path / "2wiki.json").write_text(json.dumps([row]))
    [example] = read_rows(tmp_path / "2wiki.json", "2wikimultihopqa")
    assert example.paragraphs[0] == ("T", "One. Two.") and example.question.support == (("T", "Two."),)
    row = {"question": "Q?", "answer": "A", "answer_aliases": ["B"], "question_decomposition": [
        {"answer": "A", "paragraph_support_idx": 7}], "paragraphs": [
        {"idx": 3, "title": "T", "paragraph_text": "Not this.", "is_supporting": False},
        {"idx": 7, "title": "T", "paragraph_text": "First.\u2028The a is here.", "is_supporting": True}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    [example] = read_rows(tmp_path / "m.jsonl", "musique")
    assert example.question == Question("Q?", ("A", "B"), (("T", "The a is here."),)) and example.gold == 1


@pytest.mark.parametrize("block", [40, 64, 2**24])
@pytest.mark.parametrize("style", [dict(), dict(indent=1, ensure_ascii=False), dict(separators=(",", ":"))])
def test_rows_are_found_in_the_file(tmp_path, block, style):
    """Bug: a row's place is counted in characters, or is lost where one block of the file ends, so that another text is read."""
    rows = [{"a": ["é\u2028漢[", 'x"}, {"', n, {"b": "\\"}]} for n in range(30)]
    path = tmp_path / "rows.json"
    path.write_bytes((" \n" + json.dumps(rows, **style) + "\r\n").encode())
    found = list(elements(path, block))
    assert [row for _, _, row in found] == rows
    assert [json.loads(path.read_bytes()[start:end]) for start, end, _ in found] == rows


def test_a_file_is_not_kept_in_memory(tmp_path):
    """Bug: the original files, of more than half a GB, are held as Python objects, which takes several times as much."""
    row = json.loads((DATA / "hotpotqa.json").read_text())[0]
    path = tmp_path / "large.json"
    path.write_text(json.dumps([{**row, "_id": str(n)} for n in range(4000)]))
    tracemalloc.start()
    rows = Rows(path, "hotpotqa")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 4000 and rows[-1] == rows[0]
    assert kept < path.stat().st_size / 20 and peak < 8 * 2**24  # a few blocks of the file


@pytest.mark.slow
@pytest.mark.parametrize("task, rows", [("hotpotqa", 90_447), ("2wikimultihopqa", 167_454), ("musique", 19_938)])
def test_files_of_the_original_size(tmp_path, task, rows):
    """Bug: a file of hundreds of MB does not fit into memory, or half a thousand tasks take an hour. Prints what they take (-s)."""
    text = (DATA / FILES[task]).read_text(encoding="utf-8")
    few = [json.loads(line) for line in text.split("\n") if line] if task == "musique" else json.loads(text)
    path = tmp_path / FILES[task]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            row = json.loads(json.dumps(few[number % len(few)]))
            for paragraph in row.get("paragraphs", []):
                paragraph["paragraph_text"] += f" n{number}"  # so that no paragraph comes twice
            for _, sentences in row.get("context", []):
                sentences[-1] += f" n{number}"
            file.write(("" if task == "musique" else ", " if number else "[") + json.dumps(row) + "\n")
        file.write("" if task == "musique" else "]")
    started = time.perf_counter()
    measured = "import tasks; tasks.main(); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # kB; on Linux
    command = [sys.executable, "-c", measured, "--task", task, "--data", path, "--documents", "800", "--eval_tasks", "500", "--out", tmp_path / "set"]
    done = subprocess.run(list(map(str, command)), check=True, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1]) / 1e6
    print(f"{task}: {path.stat().st_size / 1e6:.0f} MB; 500 tasks of 800 documents in {time.perf_counter() - started:.0f} s and {peak:.2f} GB")
    assert len((tmp_path / "set").read_text(encoding="utf-8").split("\n")) == 501 and peak < 2


def test_tasks_hang_on_their_index_alone():
    """Bug: a task depends on which tasks were built before it, so that another number of workers trains on other tasks."""
    config = qa_config("hotpotqa", questions=0, documents=45)
    forwards, backwards = load_tasks(config, "train", count), load_tasks(config, "train", count)
    assert [forwards(n) for n in range(10)] == [backwards(n) for n in reversed(range(10))][::-1]


@pytest.mark.parametrize("task", FILES)
def test_a_saved_set_loads_back_equal(tmp_path, task):
    """Bug: aliases, supporting facts, documents or their order get lost in a set that is shared."""
    config = qa_config(task, chunk_tokens=150)
    build, stream = QATasks(config, "test"), load_tasks(config, "test", count)
    save_tasks((build(index) for index in range(20)), tmp_path / "set.jsonl")
    saved = Config(**{**vars(config), "task": "saved", "data": str(tmp_path / "set.jsonl"), "eval_tasks": 20})
    loaded = load_tasks(saved, "test", count)
    assert [loaded(index) for index in range(20)] == [stream(index) for index in range(20)]
    train, dev = load_tasks(saved, "train", count), load_tasks(saved, "dev", count)
    assert {train(n).id for n in range(15)} | {dev(n).id for n in range(5)} == {stream(n).id for n in range(20)}
    assert train(15) in [train(n) for n in range(15)]
    assert [len(held_out_tasks(saved, split, 100, count)) for split in ("dev", "test")] == [5, 20]  # no task twice


def test_documents_in_another_order():
    """Bug: --order changes the task itself, or is the same for all tasks, or does nothing."""
    built, other, again = (load_tasks(qa_config("hotpotqa", order=order), "test", count) for order in (0, 1, 2))
    for index in range(5):
        one, two, three = built(index), other(index), again(index)
        assert one.questions == two.questions and one.id == two.id and sorted(one.documents) == sorted(two.documents)
        assert one.documents != two.documents != three.documents
        assert all(f"Document {n}: {text}" in "".join(two.chunks) for n, text in enumerate(two.documents, start=1))
    moved = [[built(index).documents.index(text) for text in other(index).documents] for index in (0, 1)]
    assert moved[0] != moved[1]


@pytest.mark.parametrize("content, task, complaint", [
    ('{"id": 1, "questions": [], "documents": []}', "saved", "lists with something in them"),
    ('{"id": 1, "questions": [{"question": "Q", "answers": []}], "documents": ["a"]}', "saved", "lists with something"),
    ('{"id": 1, "questions": [{"question": "Q", "answers": ["a"]}], "documents": "text"}', "saved", "are lists"),
    ('{"id": 1, "questions": [{"question": "Q", "answers": "Ben"}], "documents": ["a"]}', "saved", "are lists"),
    (None, "hotpotqa", "no such file"),
    ("", "hotpotqa", "empty"),
    ("{not json", "hotpotqa", "no list of rows"),
    ("{not json", "musique", "row 0 is not JSON"),
    ('[{"question": "Q', "hotpotqa", "is the file whole"),
    ("[]", "hotpotqa", "no rows"),
    ('[{"question": "Q?"}]', "hotpotqa", "row 0 is not in the format of hotpotqa"),
    ('{"data": []}', "hotpotqa", "no list of rows"),
    ("3", "2wikimultihopqa", "no list of rows"),
    ("[3]", "hotpotqa", "row 0 is not in the format"),
    ('[{"question": "Q?", "answer": "A", "supporting_facts": [["Gone", 0]], "context": [["T", ["x"]]]}]', "hotpotqa", "fullwiki"),
])
def test_bad_files_get_one_sentence(tmp_path, content, task, complaint):
    """Bug: a wrong file is found out by a traceback deep in training, without the file's name."""
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    read_rows.cache_clear()
    with pytest.raises(ValueError, match="file.json") as error:
        read_rows(path, task)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_binary_file_gets_one_sentence(tmp_path):
    """Bug: a compressed download ends in a UnicodeDecodeError."""
    (tmp_path / "file.json").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(ValueError, match="file.json: not a text file"):
        read_rows(tmp_path / "file.json", "hotpotqa")


@pytest.mark.parametrize("settings, complaint", [
    (dict(documents=5000), "too few for --documents"),
    (dict(documents=2), "cannot hold the gold"),
])
def test_impossible_sizes_get_one_sentence(settings, complaint):
    """Bug: the builder loops for ever looking for paragraphs that the file does not have."""
    with pytest.raises(ValueError, match=complaint):
        load_tasks(qa_config("hotpotqa", **settings), "test", count)
