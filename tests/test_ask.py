import json

import pytest
from conftest import Scripted

from ask import answer_questions, read_chunks
from config import BadInput, Config

NOTES = "Anna lives in Rome.\nBen is a baker.\n\nAnna has a cat.\nAnna lives in Oslo.\n"


def count(texts):
    return [len(text.split()) for text in texts]


def settings(chunk_tokens, **more):
    return Config(task="saved", data="none", chunk_tokens=chunk_tokens, max_prompt_tokens=2000, **more)


def policy(script, config):
    one = Scripted({"Where does Anna live?": script})
    one.count, one.config = count, config
    return one


def test_a_file_is_read_asked_and_asked_again(tmp_path, capsys, embed):
    """Bug: an entry is shown with other lines than it came from, or a saved memory answers in another way than the fresh one."""
    config, file, saved = settings(8), tmp_path / "notes.md", tmp_path / "notes.memory"
    file.write_text(NOTES)
    script = ["<read_memory>Anna</read_memory>", "<create_memory>Anna lives in Rome</create_memory>",
              "<create_memory>Anna has a cat</create_memory><update_memory>1: Anna lives in Oslo</update_memory>",
              "<answer>Oslo</answer><update_memory>2: Anna lives in Bonn</update_memory>", "<answer>a cat \x1b[2J</answer>"]
    questions = ["Where does Anna live?", "Which pet does Anna have?"]
    answer_questions(questions, file, saved, policy(script, config), embed, config)
    out = capsys.readouterr().out
    first, second = out.split("Which pet does Anna have?\n")
    assert "Where does Anna live?\n  Oslo\n" in first and "a cat \\x1b[2J" in second
    assert "[0] Anna lives in Bonn    (written while answering)" in second and "Bonn" not in first
    assert f"[0] Anna lives in Oslo    (chunk 2, lines 4-5 of {file})" in first and f"[1] Anna has a cat    (chunk 2, lines 4-5 of {file})" in second
    with pytest.raises(BadInput, match="notes.memory exists"):
        answer_questions(questions, file, saved, policy(script, config), embed, config)
    answer_questions(["Where does Anna live?"], None, saved, policy(["<answer>Oslo</answer>"], config), embed, config)
    again = capsys.readouterr().out  # the standing query and the store are those after reading
    assert "  Oslo\n" in again and f"[0] Anna lives in Oslo    (chunk 2, lines 4-5 of {file})" in again and file.read_text() == NOTES
    other = settings(8, embedder="another")
    with pytest.raises(BadInput, match="made with --embedder hashed, not another"):
        answer_questions(questions, None, saved, policy([], other), embed, other)


def test_lines_of_long_and_short_texts(tmp_path, capsys, embed):
    """Bug: a JSONL row of several lines, or a line longer than a chunk, shifts all the line numbers after it."""
    config, file = settings(4), tmp_path / "notes.jsonl"
    file.write_text(json.dumps({"text": "one two\nthree"}) + "\n" + json.dumps("four five six seven eight") + "\n" + json.dumps("nine") + "\n")
    write = "<create_memory>{}</create_memory>"
    script = [write.format("Anna 1"), write.format("Anna 2"), write.format("Anna 3"), "<read_memory>Anna</read_memory>", "<answer>x</answer>"]
    answer_questions(["Where does Anna live?"], file, None, policy(script, config), embed, config)
    out = capsys.readouterr().out
    for number, lines in ((1, "line 1"), (2, "line 2"), (3, "lines 2-3")):
        assert f"Anna {number}    (chunk {number}, {lines} of" in out


def test_lines_are_those_of_an_editor(tmp_path):
    """Bug: a form feed or a line separator inside the text counts as a line's end, or breaks a JSONL row in two."""
    (tmp_path / "a.txt").write_text("one\x0cone\ntwo\u2028two\nthree")
    assert read_chunks(tmp_path / "a.txt", settings(4), lambda texts: [4 for _ in texts])[1] == ["line 1", "line 2", "line 3"]
    (tmp_path / "a.jsonl").write_text(json.dumps("one\u2028one", ensure_ascii=False) + "\n\n" + json.dumps("three") + "\n")
    assert read_chunks(tmp_path / "a.jsonl", settings(4), lambda texts: [4 for _ in texts]) == (
        ("one\u2028one\n", "\n", "three\n"), ["line 1", "line 2", "line 3"])


def test_a_memory_that_cannot_be_written(tmp_path, embed, config):
    """Bug: a long text is read, and then there is no place for its memory."""
    (tmp_path / "a.txt").write_text(NOTES)
    with pytest.raises(BadInput, match="there is no folder"):
        answer_questions(["Who?"], tmp_path / "a.txt", tmp_path / "no" / "memory", policy([], config), embed, config)


@pytest.mark.parametrize("name, content", [("none.txt", None), ("a.txt", " \n"), ("a.jsonl", "{}\n"), ("a.jsonl", "no json\n"), ("a.txt", b"\xff\xfe")])
def test_a_bad_file_is_one_sentence(tmp_path, embed, config, name, content):
    """Bug: a mistyped name, an empty or a binary file ends in a traceback, or in answers about nothing."""
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=f"--file .*{name}"):
        answer_questions(["Who?"], tmp_path / name, None, policy([], config), embed, config)


def test_a_bad_memory_is_one_sentence(tmp_path, embed, config):
    """Bug: a file that is no memory ends in a traceback."""
    (tmp_path / "m").write_text("{}")
    with pytest.raises(BadInput, match="not a saved memory"):
        answer_questions(["Who?"], None, tmp_path / "m", policy([], config), embed, config)
    with pytest.raises(BadInput, match="--ask needs a --file"):
        answer_questions(["Who?"], None, None, policy([], config), embed, config)
