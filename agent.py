"""The agent: what it sees, what it may write, and the episode loop that every rollout goes through.

One turn: the policy sees an observation o_t = {o_env, scratchpad_t, retrieved_t} (eq. 7), rendered
afresh each turn, and writes a response. The tags in the response are operations on the memory,
executed in order (eq. 5). A malformed, disabled or impossible one is counted and skipped.

    <create_memory>text</create_memory>      append an entry
    <read_memory>query</read_memory>         set the query; show its top-k from now on (eq. 6)
    <update_memory>2: text</update_memory>   replace the entry shown as number 2
    <delete_memory>2</delete_memory>         remove it
    <scratchpad>text</scratchpad>            rewrite the scratchpad
    <answer>text</answer>                    answer the question asked

Reading: one chunk per turn. A Read without a Create, Update or Delete shows the chunk again, at
most `max_reads` times in a row. Answering: one question per turn. A Read without an answer shows
the question again, as often. Any other response without an answer scores 0. So an episode ends
after at most (chunks + questions) * (1 + max_reads) turns.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from config import Config
from memory import Embedder, Entry, Memory
from tasks import Question, Task

Score = Callable[[str, Question], float]  # score(answer, question), within [0, 1]
# The only list of the tags. update_memory is Update in one dialect and the scratchpad in the other.
KINDS = ("create", "read", "update", "delete", "scratchpad", "answer")
PAPER = "create_memory read_memory update_memory delete_memory scratchpad answer"
RELEASED = "add_memory update_query modify_memory delete_memory update_memory final_answer"
FORMS = {"paper": ("2", "text"), "released": ("Memory 2", r"\boxed{text}")}  # entry, answer
TAGS = {"paper": dict(zip(KINDS, PAPER.split())), "released": dict(zip(KINDS, RELEASED.split()))}


# --- records --------------------------------------------------------------------------------------
@dataclass
class Operation:
    """One operation of a response. `error` says why it was not executed; empty if it was."""

    kind: str  # a key of TAGS[dialect], or "unknown"
    text: str = ""  # entry text, query, scratchpad or answer
    number: int = 0  # Update, Delete: position in the list shown, from 1
    id: int | None = None  # Create, Update, Delete: the entry
    error: str = ""


@dataclass(frozen=True)
class Observation:
    """What the policy sees. `chunk` is set while reading, `question` (or both) while answering."""

    questions: tuple[str, ...]  # all the task's questions; shown only while reading
    scratchpad: str
    query: str  # the standing query; "" before the first Read
    entries: tuple[Entry, ...]  # retrieved for the query; entries[i - 1] is shown as number i
    chunk: str | None = None
    question: str | None = None
    # Not shown: which task this is (for scripts), and the generator that the episode draws from.
    task_id: str = ""
    rng: random.Random = field(default_factory=lambda: random.Random(0), compare=False)


@dataclass
class Response:
    """What the policy wrote. A script sets only the text. A server gives no token ids."""

    text: str
    tokens: int = 0  # number of sampled tokens, the end token included; 0: written by a script
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # exactly as sampled, the end token included
    logprobs: list[float] = field(default_factory=list)  # of `ids`, under the sampling distribution
    truncated: bool = False  # stopped by the token limit
    observation: Observation | None = None  # as the policy saw it; None: as given


@dataclass
class Turn:
    observation: Observation
    response: Response
    operations: list[Operation]
    position: int  # index of the chunk or question, as in Episode


@dataclass
class Episode:
    """One pass through a task. `answers` and `scores` are in the order of `task.questions`."""

    task: Task
    memory: Memory = field(default_factory=Memory)
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    turns: list[Turn] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)  # None: no answer was given
    scores: list[float] = field(default_factory=list)
    query: str = ""
    query_vector: np.ndarray | None = None  # (d,)
    position: int = 0  # chunks and questions that are over
    reads: int = 0  # how often a Read has shown the current chunk or question again

    @property
    def done(self) -> bool:
        return self.position == len(self.task.chunks) + len(self.task.questions)

    @property
    def reward(self) -> float:
        """The mean score over all the task's questions, within [0, 1]."""
        return sum(self.scores) / len(self.task.questions)


class Policy(Protocol):
    """A script, a server or a language model. It returns one response per observation."""

    def respond(self, observations: list[Observation]) -> list[Response]: ...


# --- prompts --------------------------------------------------------------------------------------
USAGE = {
    "create": "<{tag}>fact</{tag}> adds an entry",
    "read": "<{tag}>query</{tag}> shows similar entries from now on",
    "update": "<{tag}>{number}: text</{tag}> replaces entry #2",
    "delete": "<{tag}>{number}</{tag}> removes entry #2",
    "scratchpad": "<{tag}>note</{tag}> rewrites your notes, always shown",
    "answer": "<{tag}>{answer}</{tag}> answers the Question briefly",
}


def instruction(config: Config) -> str:
    """The system message for pretrained models. Operations that are disabled are not mentioned."""
    number, answer = FORMS[config.dialect]
    tags = TAGS[config.dialect]
    kinds = [kind for kind in tags if kind == "answer" or config.enabled(kind)]
    usage = [USAGE[kind].format(tag=tags[kind], number=number, answer=answer) for kind in kinds]
    if len(usage) == 1:
        return f"You are asked a question, with or without a text. Write only this:\n{usage[0]}"
    task = "You read a text in parts, then answer questions from memory. Store what they need."
    return f"{task} You may write:\n" + "\n".join(usage)


def render(observation: Observation) -> str:
    """The observation as text, the same for every model.

    Two details help a small model. The standing query comes last, next to the response, because it
    is compared with the text. Entries are numbered "#1", but Update writes "1: ". If both were the
    same, a model that copies would continue with the old text.
    """
    if observation.question:
        lines = [f"Question: {observation.question}"]
    else:
        lines = ["Questions: " + " ".join(observation.questions)]
    if observation.chunk is not None:
        lines.append(f"Text: {observation.chunk}")
    lines.append(f"Scratchpad: {observation.scratchpad}")
    lines += [f"#{number} {entry.text}" for number, entry in enumerate(observation.entries, 1)]
    lines.append(f"Query: {observation.query}")
    return "\n".join(lines).strip()  # many chat templates strip it


# --- the grammar ----------------------------------------------------------------------------------
# Capitals and attributes are accepted. Everything is bounded, so matching is linear in the text.
TAG = re.compile(r"<(\s?/?\s?)(\w{1,24})([^<>]{0,200})(>?)")
ENTRY = r"(?i:memory|entry)?\s*[#\[]?([0-9]{1,6})\]?"  # 2, #2, [2], Memory 2
NUMBERED = {"update": re.compile(rf"(?s){ENTRY}\s*:\s*(.+)"), "delete": re.compile(ENTRY + "()")}
BOXED = re.compile(r"\\boxed(?:\{((?:[^{}]|\{[^{}]*\})*)\}| ([^$]*))")


def parse(text: str, config: Config) -> list[Operation]:
    """The operations that a response asks for, in order. Invalid ones carry an `error`.

    Thoughts and text outside tags are ignored. Tags do not nest: an operation ends at its own
    closing tag. If another tag opens before that, the first one is invalid.
    """
    text = without_thoughts(text)
    kinds = {tag: kind for kind, tag in TAGS[config.dialect].items()}
    operations, kind, start = [], None, 0  # the open tag; where its content starts
    for match in TAG.finditer(text):
        slash, name, rest, end = match.groups()
        exact = not rest or rest[0].isspace()  # attributes are ignored: <create_memory id="1">
        closing = "/" in slash
        found = kinds.get(name.lower(), "unknown") if exact else "unknown"
        if found == "unknown" and (not end or slash[:1].isspace()):
            continue  # a less-than sign
        if closing and end and found == kind:
            operations.append(build(kind, text[start : match.start()].strip(), config))
            kind = None
        elif found != "unknown" and end and not closing:
            if kind is not None:
                operations.append(Operation(kind, error="never closed"))
            kind, start = found, match.end()
        elif kind is None:
            operations.append(Operation(found, match[0], error="unknown tag, or only half of one"))
    if kind is not None:
        operations.append(Operation(kind, error="never closed"))
    return operations


def without_thoughts(text: str) -> str:
    """What follows the last </think>. A template may have opened <think> in the prompt."""
    return text.rpartition("</think>")[2].partition("<think>")[0]  # also drops an unclosed thought


def build(kind: str, content: str, config: Config) -> Operation:
    """The operation of one tag and its content. Its `error` is set if it is invalid."""
    operation = Operation(kind, content)
    if kind != "answer" and not config.enabled(kind):
        operation.error = "switched off"
    elif kind in NUMBERED:
        if match := NUMBERED[kind].fullmatch(content):
            operation.number, operation.text = int(match[1]), match[2]
        else:
            operation.error = "no entry number" if kind == "delete" else "no entry number and text"
    elif kind == "answer" and config.dialect == "released":
        operation.text = unbox(content)
        operation.error = "" if operation.text else r"no \boxed{text}"
    if kind in ("create", "read", "answer") and not operation.text and not operation.error:
        operation.error = "empty text"
    return operation


def unbox(text: str) -> str:
    r"""The content of the last `\boxed{...}` (with braces in it) or bare `\boxed ...`, else ""."""
    found = BOXED.findall(text)
    return "".join(found[-1]).strip() if found else ""


# --- the episode loop -----------------------------------------------------------------------------
def run_episodes(
    tasks: list[Task],
    policy: Policy,
    config: Config,
    embed: Embedder,
    score: Score,
    seed: int = 0,
    progress: Callable[[list[Episode]], None] = lambda episodes: None,
) -> list[Episode]:
    """Returns one finished episode per task, in order. All advance together, turn by turn.

    progress(episodes) is called after each turn. Each episode has its own generator, seeded by
    config.seed, `seed`, the task id and its index among the episodes of that task. So its random
    draws do not depend on the other episodes.
    """
    seen, episodes = Counter(), []
    for task in tasks:
        rng = random.Random(f"{config.seed} {seed} {task.id} {seen[task.id]}")
        episodes.append(Episode(task, Memory(config.capacity), rng))
        seen[task.id] += 1
    continue_episodes(episodes, policy, config, embed, score, progress)
    return episodes


def continue_episodes(
    episodes: list[Episode],
    policy: Policy,
    config: Config,
    embed: Embedder,
    score: Score,
    progress: Callable[[list[Episode]], None] = lambda episodes: None,
):
    """Play the given episodes to their end, in place. The arguments are those of run_episodes."""
    while active := [episode for episode in episodes if not episode.done]:
        observations = [observe(episode, config) for episode in active]
        responses = policy.respond(observations)
        parsed = [parse(response.text, config) for response in responses]
        vectors = embed_operations([one for operations in parsed for one in operations], embed)
        for episode, shown, response, operations in zip(active, observations, responses, parsed):
            turn = Turn(response.observation or shown, response, operations, episode.position)
            take_turn(episode, turn, vectors, config, score)
        progress(episodes)


def observe(episode: Episode, config: Config) -> Observation:
    """The observation o_t of eq. 7. It searches in every turn, because the entries change."""
    task, memory = episode.task, episode.memory
    entries = []
    if episode.query and config.retrieval == "random":
        entries = memory.random_entries(episode.rng, config.top_k)
    elif episode.query:
        entries = memory.search(episode.query_vector, config.top_k)
    questions = tuple(question.text for question in task.questions)
    common = {"scratchpad": memory.scratchpad, "query": episode.query, "entries": tuple(entries)}
    common |= {"task_id": task.id, "rng": episode.rng}
    if episode.position < len(task.chunks):
        return Observation(questions, chunk=task.chunks[episode.position], **common)
    question = questions[episode.position - len(task.chunks)]
    return Observation(questions, chunk=task.context or None, question=question, **common)


def embed_operations(operations: list[Operation], embed: Embedder) -> dict:
    """{(text, is_query): vector (d,)} of every text to store or search, in at most two calls."""
    vectors = {}
    for is_query, kinds in ((False, ("create", "update")), (True, ("read",))):
        wanted = (one.text for one in operations if one.kind in kinds and not one.error)
        texts = list(dict.fromkeys(wanted))
        for text, vector in zip(texts, embed(texts, query=is_query) if texts else ()):
            vectors[text, is_query] = vector
    return vectors


def take_turn(episode: Episode, turn: Turn, vectors: dict, config: Config, score: Score):
    """Execute one response and advance the episode. The rules are at the top of this file."""
    answering = turn.observation.question is not None
    answer = None
    for operation in turn.operations:
        if operation.error:
            continue
        if operation.kind != "answer":
            execute(operation, episode, turn.observation, vectors)
        elif answering:
            answer = operation.text
        else:
            operation.error = "an answer while reading"
    episode.turns.append(turn)
    executed = {operation.kind for operation in turn.operations if not operation.error}
    finished = answer is not None if answering else executed & {"create", "update", "delete"}
    if "read" in executed and not finished and episode.reads < config.max_reads:
        episode.reads += 1
        return
    if answering:
        question = episode.task.questions[len(episode.answers)]
        episode.answers.append(answer)
        episode.scores.append(0.0 if answer is None else score(answer, question))
    episode.reads = 0
    episode.position += 1


def execute(operation: Operation, episode: Episode, observation: Observation, vectors: dict):
    """Apply one well-formed operation, a_k of eq. 5. Sets its `error` if that is impossible."""
    memory = episode.memory
    if operation.kind == "read":
        episode.query, episode.query_vector = operation.text, vectors[operation.text, True]
    elif operation.kind == "scratchpad":
        memory.scratchpad = operation.text
    elif operation.kind == "create":
        operation.id = memory.create(operation.text, vectors[operation.text, False])
        if operation.id is None:
            operation.error = "the memory is full"
    elif not 1 <= operation.number <= len(observation.entries):
        operation.error = "no entry with that number is shown"
    else:
        operation.id = observation.entries[operation.number - 1].id
        if operation.kind == "delete":
            found = memory.delete(operation.id)
        else:
            found = memory.update(operation.id, operation.text, vectors[operation.text, False])
        if not found:
            operation.error = "that entry was deleted earlier in this response"
