"""Ask about your own text: a trained agent reads it and answers from its memory.

    python -m tools.ask "Where does Anna live?" --file notes.txt --memory notes.memory
    python -m tools.ask "Which pet does Anna have?" --memory notes.memory  without reading again

The run of --from or --name answers. Each answer is printed with the entries that were shown when it
was given, and the lines of the file that they come from.
"""

import json
import random
import re
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from agent import Episode, Observation, Policy, continue_episodes
from config import BadInput, Config, check_new_file, need, parse_args
from evaluate import chosen_runs, open_contestants
from memory import Embedder, Memory, load_embedder
from tasks import Count, Question, Task
from tasks.qa import split_chunks
from tools.view import printable
from training.checkpoint import replace_file


def answer_questions(questions, file, saved, policy: Policy, embed: Embedder, config: Config):
    """Read `file`, or load the memory `saved`, and print the answers.

    If both are given, it saves the memory after reading. Raises BadInput, before anything is read,
    if neither is given, or if `saved` cannot be written or does not fit the settings.
    """
    need(file or saved, "give a --file to read, or the --memory that an earlier reading saved")
    if file and saved:
        check_new_file("--memory", saved, config.overwrite)
    chunks, lines = read_chunks(Path(file), config, policy.count) if file else ((), [])
    memory, origins, query = Memory(config.capacity), {}, ""
    if not file:
        memory, origins, query = load_memory(saved, config, embed)
    task = Task("ask", tuple(Question(text, ("",)) for text in questions), chunks, chunks)
    episode = Episode(task, memory, random.Random(config.seed), query=query)
    if query:
        episode.query_vector = embed([query], query=True)[0]

    def after_turn(_):
        bar.update()
        turn = episode.turns[-1]
        finished = turn.position < episode.position
        place = "written while answering"
        if turn.position < len(chunks):
            place = f"chunk {turn.position + 1}, {lines[turn.position]} of {file}"
        elif finished:
            tqdm.write(answer_text(turn.observation, episode.answers[-1], origins))
        for operation in turn.operations:
            if operation.kind in ("create", "update") and not operation.error:
                origins[str(operation.id)] = place
        if saved and finished and episode.position == len(chunks):
            content = {"entries": list(memory.texts.items()), "next_id": memory.next_id}
            content |= {"scratchpad": memory.scratchpad, "query": episode.query}
            content |= {"embedder": config.embedder, "origins": origins}
            replace_file(Path(saved), json.dumps(content))
            tqdm.write(f"{len(memory)} entries saved as {saved}")

    with tqdm(total=len(chunks) + len(questions), unit="turn", disable=None, leave=False) as bar:
        continue_episodes([episode], policy, config, embed, lambda *_: 0.0, after_turn)


def answer_text(shown: Observation, answer: str | None, origins: dict[str, str]) -> str:
    """An answer, and what was shown when it was given. origins: {id: where its text comes from}."""
    lines = [f"\n{shown.question}", f"  {answer or '(no answer)'}"]
    for entry in shown.entries:
        lines.append(f"    [{entry.id}] {entry.text}    ({origins[str(entry.id)]})")
    if shown.scratchpad:
        lines.append(f"    scratchpad: {shown.scratchpad}")
    return printable("\n".join(lines))


def read_chunks(path: Path, config: Config, count: Count) -> tuple[tuple[str, ...], list[str]]:
    """(chunks, the lines that each one comes from, such as "lines 1-20")."""
    need(path.is_file(), f"--file {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"--file {path} cannot be read as text: {error}") from error
    need(text.strip(), f"--file {path}: there is no text in it")
    # A piece is a line, and in the town also a sentence. Other line separators are text.
    town = config.task == "town"
    pieces = re.findall(r"[^\n.]*(?:\n|\. *)|[^\n.]+" if town else r"[^\n]*\n|[^\n]+", text)
    # The town's model was trained on chunks of two sentences, of at most seven tokens each.
    chunks = split_chunks(pieces, 14 if town else config.chunk_tokens, count)
    lines, first = [], 1
    for chunk in chunks:
        last = first + chunk.removesuffix("\n").count("\n")
        lines.append(f"line {first}" if first == last else f"lines {first}-{last}")
        first += chunk.count("\n")
    return chunks, lines


def load_memory(path: str, config: Config, embed: Embedder) -> tuple[Memory, dict[str, str], str]:
    """(memory, {id: where its text comes from}, standing query) of a saved file."""
    need(Path(path).is_file(), f"--memory {path}: no such file; with a --file to read, it is made")
    memory = Memory()
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = [(int(id), str(text)) for id, text in state["entries"]]
        next_id, memory.scratchpad = int(state["next_id"]), str(state["scratchpad"])
        origins, query, made_with = dict(state["origins"]), str(state["query"]), state["embedder"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--memory {path} is not a saved memory: {error!r}") from error
    same = made_with == config.embedder
    need(same, f"--memory {path} was made with --embedder {made_with}, not {config.embedder}")
    for (id, text), vector in zip(entries, embed([text for _, text in entries])):
        memory.next_id = id
        memory.create(text, vector)
    memory.next_id, memory.capacity = next_id, config.capacity
    return memory, origins, query


FLAGS = [
    ("question", dict(nargs="+", metavar="QUESTION", help="questions about the text")),
    ("--file", dict(help="the text to read, in UTF-8")),
    ("--memory", dict(metavar="FILE", help="save the memory here; without --file: load it")),
]


def main():
    config, args = parse_args("Questions about your text.", FLAGS, default_runs=("grpo", "sft"))
    device = Accelerator(cpu=config.cpu).device
    [contestant] = open_contestants(config, chosen_runs(config, args.start)[-1:], device)
    policy = contestant.policy([], config)
    embed = load_embedder(config.embedder, device)
    answer_questions(args.question, args.file, args.memory, policy, embed, config)


if __name__ == "__main__":
    main()
