"""Questions about a text of your own, answered by a trained agent from the memory that it makes while it reads.

    python evaluate.py --ask "Where does Anna live?" --file notes.txt --model runs/mine/grpo
    python evaluate.py --ask "Where does Anna live?" --ask "Who is Ben?" --file notes.txt --model runs/mine/grpo --memory notes.memory
    python evaluate.py --ask "What is Anna's job?" --model runs/mine/grpo --memory notes.memory              without reading again

A .jsonl file is read as one text a line, the line itself or its "text"; any other file as it is. Under each answer stand the entries that
were shown when it was given, each with the chunk and the lines of the file from which it was created or last updated.
"""

import bisect
import itertools
import json
from pathlib import Path

from tqdm import tqdm

from agent import run_episodes
from config import BadInput
from memory import Memory
from policy import evaluating
from show import printable
from tasks import Question, Task, split_chunks


def answer_questions(questions, file, saved, policy, embed, config):
    """Read `file`, or take up the memory `saved`, and print the answers. With both, the memory is saved after reading.

    BadInput, before anything is read, if there is neither, or `saved` would be overwritten or does not fit the settings.
    """
    if not (file or saved):
        raise BadInput("--ask needs a --file to read, or the --memory that an earlier reading saved")
    if file and saved and Path(saved).exists() and not config.overwrite:
        raise BadInput(f"{saved} exists: leave --file out to ask it, choose another --memory, or replace it with --overwrite")
    chunks, lines, memory, origins = (), [], Memory(config.capacity), {}
    if file:
        chunks, lines = read_chunks(Path(file), config, policy.count)
    else:
        memory, origins = load_memory(saved, config)
    task = Task("ask", tuple(Question(text, ("",)) for text in questions), chunks, chunks)
    with evaluating(policy, config), tqdm(total=len(chunks) + len(questions), unit="turn", disable=None, leave=False) as bar:
        [episode] = run_episodes([task], policy, config, embed, lambda answer, question: 0.0, lambda *_: bar.update(),
                                 make_memory=lambda: memory)
    for turn in episode.turns:
        for operation in turn.operations:
            if operation.kind in ("create", "update") and not operation.error:
                read = turn.position < len(chunks)
                origins[str(operation.id)] = (f"chunk {turn.position + 1}, {lines[turn.position]} of {file}" if read else "written while answering")
    for number, question in enumerate(questions):
        *_, turn = (turn for turn in episode.turns if turn.position == len(chunks) + number)
        print(printable(f"\n{question}\n  {episode.answers[number] or '(no answer)'}"))
        for entry in turn.observation.entries:
            print(printable(f"    [{entry.id}] {entry.text}    ({origins[str(entry.id)]})"))
        if turn.observation.scratchpad:
            print(printable(f"    scratchpad: {turn.observation.scratchpad}"))
    if file and saved:
        state = {"embedder": config.embedder, "origins": origins, "memory": episode.memory.state()}
        Path(saved).write_text(json.dumps(state))
        print(f"\n{len(episode.memory)} entries saved as {saved}")


def read_chunks(path, config, count):
    """(chunks, the lines that each one comes from, such as "lines 1-20")."""
    try:
        pieces = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if path.suffix == ".jsonl":
            rows = [json.loads(piece) for piece in pieces]
            pieces = [(row if isinstance(row, str) else row["text"]) + "\n" for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--file {path}: cannot be read as {path.suffix or 'text'}: {error!r}") from error
    if not "".join(pieces).strip():
        raise BadInput(f"--file {path}: there is no text in it")
    chunks = split_chunks(pieces, config.chunk_tokens, count)
    ends = list(itertools.accumulate(map(len, pieces)))  # the character after each line
    borders = [0, *itertools.accumulate(map(len, chunks))]
    first_last = [(bisect.bisect_right(ends, start) + 1, bisect.bisect_left(ends, end) + 1) for start, end in itertools.pairwise(borders)]
    return chunks, [f"line {first}" if first == last else f"lines {first}-{last}" for first, last in first_last]


def load_memory(path, config):
    """(Memory, {id: where its text comes from}) of a saved file."""
    try:
        state = json.loads(Path(path).read_text())
        memory, embedder = Memory.from_state(state["memory"]), state["embedder"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--memory {path} is not a saved memory: {error!r}") from error
    if embedder != config.embedder:
        raise BadInput(f"--memory {path} was made with --embedder {embedder}, not {config.embedder}: their vectors do not compare")
    return memory, state["origins"]
