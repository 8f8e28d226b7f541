import pytest
from conftest import Scripted

from config import BadInput, Config
from tools.ask import answer_questions, read_chunks

NOTES = "Anna lives in Rome.\nBen is a baker.\n\nAnna has a cat.\nAnna lives in Oslo.\n"
WHERE, PET = "Where does Anna live?", "Which pet does Anna have?"


class Reader(Scripted):
    """A script for one question about a text, which counts words as tokens."""

    def __init__(self, script):
        super().__init__({WHERE: script})

    def count(self, texts):
        return [len(text.split()) for text in texts]


def settings(chunk_tokens, **more):
    return Config(
        task="saved", data="none", chunk_tokens=chunk_tokens, max_prompt_tokens=2000, **more
    )


@pytest.fixture
def read(tmp_path, capsys, embed):
    """Reads NOTES, saves the memory, and returns (the text file, the memory file, the output)."""
    file, saved = tmp_path / "notes.md", tmp_path / "notes.memory"
    file.write_text(NOTES)
    script = [
        "<read_memory>Anna</read_memory>",
        "<create_memory>Anna lives in Rome</create_memory>",
        "<create_memory>Anna has a cat</create_memory>"
        "<update_memory>1: Anna lives in Oslo</update_memory>",
        "<answer>Oslo</answer><update_memory>2: Anna lives in Bonn</update_memory>",
        "<answer>a cat \x1b[2J</answer>",
    ]
    answer_questions([WHERE, PET], file, saved, Reader(script), embed, settings(8))
    return file, saved, capsys.readouterr().out


def test_an_answer_shows_its_entries_and_their_lines(read):
    """Bug: an entry is shown with other lines than it came from, or with later changes."""
    file, saved, out = read
    first, second = out.split(f"{PET}\n")
    assert f"{WHERE}\n  Oslo\n" in first and "a cat \\x1b[2J" in second
    assert f"[0] Anna lives in Oslo    (chunk 2, lines 4-5 of {file})" in first
    assert f"[1] Anna has a cat    (chunk 2, lines 4-5 of {file})" in second
    assert "[0] Anna lives in Bonn    (written while answering)" in second and "Bonn" not in first
    assert f"2 entries saved as {saved}" in out and file.read_text() == NOTES


def test_a_saved_memory_is_that_after_reading(read, capsys, embed):
    """Bug: a saved memory holds what answering changed, or lost its query or its line numbers."""
    file, saved, _ = read
    policy = Reader(["<answer>Oslo</answer>"])
    answer_questions([WHERE], None, saved, policy, embed, settings(8))
    again = capsys.readouterr().out
    assert "  Oslo\n" in again and "Bonn" not in again and "saved as" not in again
    assert f"[0] Anna lives in Oslo    (chunk 2, lines 4-5 of {file})" in again
    assert policy.seen[WHERE][0].query == "Anna"


def test_a_saved_memory_is_not_misused(read, embed):
    """Bug: a memory is overwritten, or searched with the vectors of another embedder."""
    file, saved, _ = read
    with pytest.raises(BadInput, match="notes.memory exists"):
        answer_questions([WHERE], file, saved, Reader([]), embed, settings(8))
    other = settings(8, embedder="another")
    with pytest.raises(BadInput, match="made with --embedder hashed, not another"):
        answer_questions([WHERE], None, saved, Reader([]), embed, other)


def test_lines_of_long_and_short_texts(tmp_path, capsys, embed):
    """Bug: a line longer than a chunk, or an empty one, shifts all later lines."""
    file = tmp_path / "notes.txt"
    file.write_text("one two\nthree\n\nfour five six seven eight\nnine")
    script = [f"<create_memory>Anna {number}</create_memory>" for number in (1, 2, 3)]
    script += ["<read_memory>Anna</read_memory>", "<answer>x</answer>"]
    answer_questions([WHERE], file, None, Reader(script), embed, settings(4))
    out = capsys.readouterr().out
    for number, lines in ((1, "lines 1-3"), (2, "line 4"), (3, "lines 4-5")):
        assert f"Anna {number}    (chunk {number}, {lines} of" in out


def test_lines_are_those_of_an_editor(tmp_path):
    """Bug: a form feed or a line separator in the text ends a line."""

    def four(texts):
        return [4 for _ in texts]

    (tmp_path / "a.txt").write_text("one\x0cone\ntwo\u2028two\nthree", encoding="utf-8")
    _, lines = read_chunks(tmp_path / "a.txt", settings(4), four)
    assert lines == ["line 1", "line 2", "line 3"]


def test_the_towns_sentences_are_never_cut(tmp_path):
    """Bug: a line of four sentences is cut in the middle of the third, so its fact is lost."""

    def words(texts):
        return [len(text.replace(".", " .").split()) for text in texts]

    line = "Anna lives in Rome. Anna has a cat. Anna is a baker. Ben works for Anna.\n"
    line += "  Ben lives in a big house"
    (tmp_path / "a.txt").write_text(line)
    chunks, lines = read_chunks(tmp_path / "a.txt", Config(), words)
    assert "".join(chunks) == line
    assert [chunk.strip() for chunk in chunks] == [
        "Anna lives in Rome. Anna has a cat.",
        "Anna is a baker. Ben works for Anna.",
        "Ben lives in a big house",
    ]
    assert lines == ["line 1", "line 1", "line 2"]


def test_a_memory_that_cannot_be_written(tmp_path, embed, config):
    """Bug: a long text is read before it turns out that its memory cannot be saved."""
    (tmp_path / "a.txt").write_text(NOTES)
    with pytest.raises(BadInput, match="there is no folder"):
        saved = tmp_path / "no" / "memory"
        answer_questions(["Who?"], tmp_path / "a.txt", saved, Reader([]), embed, config)


@pytest.mark.parametrize(
    "name, content",
    [
        ("none.txt", None),
        ("a.txt", b" \n"),
        ("a.txt", b"\xff\xfe"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, embed, config, name, content):
    """Bug: a mistyped name or an empty or binary file ends in a traceback, or in empty answers."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"--file .*{name}"):
        answer_questions(["Who?"], tmp_path / name, None, Reader([]), embed, config)


def test_a_bad_memory_is_one_sentence(tmp_path, embed, config):
    """Bug: a file that is not a memory, or neither file nor memory, ends in a traceback."""
    (tmp_path / "m").write_text("{}")
    with pytest.raises(BadInput, match="not a saved memory"):
        answer_questions(["Who?"], None, tmp_path / "m", Reader([]), embed, config)
    with pytest.raises(BadInput, match="give a --file"):
        answer_questions(["Who?"], None, None, Reader([]), embed, config)
