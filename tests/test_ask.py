import json

import pytest
from conftest import Scripted

from ask import answer_questions
from config import BadInput, Config

NOTES = "Anna lives in Rome.\nBen is a baker.\n\nAnna has a cat.\nAnna lives in Oslo.\n"


def count(texts):
    return [len(text.split()) for text in texts]


def policy(script, config):
    one = Scripted({"Where does Anna live?": script})
    one.count, one.config = count, config
    return one


def test_a_file_is_read_asked_and_asked_again(tmp_path, capsys, embed):
    """Bug: an entry is shown with other lines than it came from, or a saved memory answers in another way than the fresh one."""
    config, file, saved = Config(chunk_tokens=8), tmp_path / "notes.md", tmp_path / "notes.memory"
    file.write_text(NOTES)
    script = ["<read_memory>Anna</read_memory>", "<create_memory>Anna lives in Rome</create_memory>",
              "<create_memory>Anna has a cat</create_memory><update_memory>1: Anna lives in Oslo</update_memory>",
              "<answer>Oslo</answer>", "<answer>a cat \x1b[2J</answer>"]
    questions = ["Where does Anna live?", "Which pet does Anna have?"]
    answer_questions(questions, file, saved, policy(script, config), embed, config)
    out = capsys.readouterr().out
    assert "Where does Anna live?\n  Oslo\n" in out and "a cat \\x1b[2J" in out
    assert f"[0] Anna lives in Oslo    (chunk 2, lines 4-5 of {file})" in out and f"[1] Anna has a cat    (chunk 2, lines 4-5 of {file})" in out
    with pytest.raises(BadInput, match="notes.memory exists"):
        answer_questions(questions, file, saved, policy(script, config), embed, config)
    answer_questions(["Where does Anna live?"], None, saved, policy(["<read_memory>Anna</read_memory>", "<answer>Oslo</answer>"], config), embed, config)
    again = capsys.readouterr().out
    assert "  Oslo\n" in again and f"[0] Anna lives in Oslo    (chunk 2, lines 4-5 of {file})" in again and file.read_text() == NOTES
    other = Config(embedder="another")
    with pytest.raises(BadInput, match="made with --embedder hashed, not another"):
        answer_questions(questions, None, saved, policy([], other), embed, other)


def test_lines_of_long_and_short_texts(tmp_path, capsys, embed):
    """Bug: a JSONL row of several lines, or a line longer than a chunk, shifts all the line numbers after it."""
    config, file = Config(chunk_tokens=4), tmp_path / "notes.jsonl"
    file.write_text(json.dumps({"text": "one two\nthree"}) + "\n" + json.dumps("four five six seven eight") + "\n" + json.dumps("nine") + "\n")
    write = "<create_memory>{}</create_memory>"
    script = [write.format("Anna 1"), write.format("Anna 2"), write.format("Anna 3"), "<read_memory>Anna</read_memory>", "<answer>x</answer>"]
    answer_questions(["Where does Anna live?"], file, None, policy(script, config), embed, config)
    out = capsys.readouterr().out
    for number, lines in ((1, "line 1"), (2, "line 2"), (3, "lines 2-3")):
        assert f"Anna {number}    (chunk {number}, {lines} of" in out


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
