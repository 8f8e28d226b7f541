"""Questions about a text of your own, answered by a trained agent from the memory that it makes while it reads.

    python evaluate.py --ask "Where does Anna live?" --file notes.txt --model runs/mine/grpo
    python evaluate.py --ask "Where does Anna live?" --ask "Who is Ben?" --file notes.txt --model runs/mine/grpo --memory notes.memory
    python evaluate.py --ask "What is Anna's job?" --model runs/mine/grpo --memory notes.memory              without reading again

A .jsonl file is read as one text a line, the line itself or its "text"; any other file as it is. Under each answer stand the entries that
were shown when it was given, each with the chunk and the lines of the file from which it was created or last updated.
"""

import bisect
import json
import re
from itertools import accumulate, pairwise
from pathlib import Path

from tqdm import tqdm

from agent import Episode, run_episodes
from config import BadInput, check_new_file
from memory import Memory
from policy import evaluating
from run import replace_file
from show import printable
from tasks import Question, Task, split_chunks


def answer_questions(questions, file, saved, policy, embed, config):
    """Read `file`, or take up the memory `saved`, and print the answers. With both, the memory is saved as it is after reading.

    BadInput, before anything is read, if there is neither, or `saved` cannot be written or does not fit the settings.
    """
    if not (file or saved):
        raise BadInput("--ask needs a --file to read, or the --memory that an earlier reading saved")
    if file and saved:
        check_new_file("--memory", saved, config.overwrite)
    chunks, lines, memory, origins, query = (), [], Memory(config.capacity), {}, ""
    if file:
        chunks, lines = read_chunks(Path(file), config, policy.count)
    else:
        memory, origins, query = load_memory(saved, config)
    task, after = Task("ask", tuple(Question(text, ("",)) for text in questions), chunks, chunks), {}

    class Watched:  # the policy, and a look at the memory when the first question is asked
        def respond(self, observations):
            if observations[0].question and not after:
                after.update(memory=memory.state(), query=observations[0].query)
            return policy.respond(observations)

    vector = embed([query], query=True)[0] if query else None
    with evaluating(policy, config), tqdm(total=len(chunks) + len(questions), unit="turn", disable=None, leave=False) as bar:
        [episode] = run_episodes([task], Watched(), config, embed, lambda answer, question: 0.0, lambda *_: bar.update(),
                                 lambda task: Episode(task, memory, query=query, query_vector=vector))
    reading = [turn for turn in episode.turns if turn.position < len(chunks)]
    for turn in reading:
        note_origins(turn, f"chunk {turn.position + 1}, {lines[turn.position]} of {file}", origins)
    if file and saved:
        replace_file(Path(saved), json.dumps({"embedder": config.embedder, "origins": origins, **after}))
    for number, question in enumerate(questions, start=len(chunks)):
        turns = [turn for turn in episode.turns if turn.position == number]
        for turn in turns[:-1]:
            note_origins(turn, "written while answering", origins)
        show_answer(question, episode.answers[number - len(chunks)], turns[-1].observation, origins)
        note_origins(turns[-1], "written while answering", origins)
    if file and saved:
        print(f"\n{len(after['memory']['entries'])} entries saved as {saved}")


def note_origins(turn, place, origins):
    """Write into `origins`, {id: place}, what a turn created or updated."""
    origins |= {str(operation.id): place for operation in turn.operations if operation.kind in ("create", "update") and not operation.error}


def show_answer(question, answer, observation, origins):
    """Print an answer, and what was shown when it was given."""
    lines = [f"\n{question}", f"  {answer or '(no answer)'}"]
    lines += [f"    [{entry.id}] {entry.text}    ({origins[str(entry.id)]})" for entry in observation.entries]
    print(printable("\n".join(lines + [f"    scratchpad: {observation.scratchpad}"] * bool(observation.scratchpad))))


def read_chunks(path, config, count):
    """(chunks, the lines that each one comes from, such as "lines 1-20")."""
    if not path.is_file():
        raise BadInput(f"--file {path}: no such file")
    try:
        pieces = re.findall(r"[^\n]*\n|[^\n]+", path.read_text(encoding="utf-8"))  # texts hold other line separators, which are none here
        if path.suffix == ".jsonl":
            rows = [json.loads(piece) if piece.strip() else "" for piece in pieces]
            pieces = [(row if isinstance(row, str) else row["text"]) + "\n" for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--file {path}: cannot be read as {path.suffix or 'text'}: {error!r}") from error
    if not "".join(pieces).strip():
        raise BadInput(f"--file {path}: there is no text in it")
    # --chunk_tokens is for documents: the town's reader knows chunks of two sentences, of seven tokens each with their full stops.
    chunks = split_chunks(pieces, 14 if config.task == "town" else config.chunk_tokens, count)
    ends = list(accumulate(map(len, pieces)))  # the character after each line
    borders = [0, *accumulate(map(len, chunks))]
    first_last = [(bisect.bisect_right(ends, start) + 1, bisect.bisect_left(ends, end) + 1) for start, end in pairwise(borders)]
    return chunks, [f"line {first}" if first == last else f"lines {first}-{last}" for first, last in first_last]


def load_memory(path, config):
    """(Memory, {id: where its text comes from}, standing query) of a saved file."""
    if not Path(path).is_file():
        raise BadInput(f"--memory {path}: no such file; with a --file to read, it is made")
    try:
        state = json.loads(Path(path).read_text())
        memory, embedder, origins, query = Memory.from_state(state["memory"]), state["embedder"], dict(state["origins"]), str(state["query"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--memory {path} is not a saved memory: {error!r}") from error
    if embedder != config.embedder:
        raise BadInput(f"--memory {path} was made with --embedder {embedder}, not {config.embedder}: their vectors do not compare")
    return memory, origins, query
