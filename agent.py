"""The agent: what it is shown, what it may write, and the episode loop that demonstrations, GRPO and evaluation share.

One turn: the policy sees an observation o_t = {o_env, scratchpad_t, retrieved_t} (eq. 7), rendered afresh every turn, and
writes a response. Tags in the response are operations on the memory, executed in order (eq. 5):

    <create_memory>text</create_memory>        append an entry
    <read_memory>query</read_memory>           set the standing query: its TopK are shown from the next turn on (eq. 6)
    <update_memory>2: text</update_memory>     replace the entry that is shown as number 2
    <delete_memory>2</delete_memory>           remove it
    <scratchpad>text</scratchpad>              rewrite the scratchpad
    <answer>text</answer>                      answer the question asked

Reading: one chunk a turn. A response with a Read and neither Create, Update nor Delete shows the same chunk again, at
most `max_reads` times in a row. Answering: one question a turn. An answer is scored; a Read without an answer shows the
question again, at most `max_reads` times; anything else scores 0. So an episode ends after at most
(chunks + questions) * (1 + max_reads) turns, whatever the policy writes.

A malformed, switched-off or impossible operation is a counted no-op; it never stops the operations after it.
"""

import itertools
import random
import re
from collections import deque
from dataclasses import dataclass, field

from config import OPERATIONS, BadInput
from memory import Memory

# The one place that knows the names of the tags. Mind that update_memory means different things in the two dialects.
TAGS = {
    "paper": {"create": "create_memory", "read": "read_memory", "update": "update_memory", "delete": "delete_memory",
              "scratchpad": "scratchpad", "answer": "answer"},
    "released": {"create": "add_memory", "read": "update_query", "update": "modify_memory", "delete": "delete_memory",
                 "scratchpad": "update_memory", "answer": "final_answer"},
}


# --- records -------------------------------------------------------------------------------------------------------


@dataclass
class Operation:
    """One operation of a response. `error` says why it was not executed, and is empty when it was."""

    kind: str  # a key of TAGS[dialect], or "unknown"
    text: str = ""  # entry text, query, scratchpad or answer
    number: int = 0  # Update, Delete: position in the list shown, from 1
    id: int | None = None  # the entry that was created, updated or deleted
    error: str = ""


@dataclass
class Observation:
    """What the policy is shown. Reading: `chunk` is set. Answering: `question` is set (and `chunk`, if the task shows a text beside)."""

    questions: tuple  # the texts of all the task's questions
    scratchpad: str
    query: str  # the standing query; "" before the first Read
    entries: list  # of memory.Entry, retrieved for the query; entries[i - 1] is shown as number i
    chunk: str | None = None
    question: str | None = None


@dataclass
class Response:
    """What the policy wrote. A scripted policy gives the text alone; one behind a server, no ids."""

    text: str
    tokens: int = 0  # how many were sampled, the end token included; 0: the text is a script's
    prompt_ids: list = field(default_factory=list)  # the very ids that were sampled from
    ids: list = field(default_factory=list)  # the very ids that were sampled, the end token included when it was
    logprobs: list = field(default_factory=list)  # of each of `ids`, under the distribution that was sampled
    truncated: bool = False  # stopped by the token limit


@dataclass
class Turn:
    observation: Observation
    response: Response
    operations: list  # of Operation
    position: int  # of the chunk or question, as in Episode


@dataclass
class Episode:
    """One task's way through the agent loop. `answers` and `scores` stand in the order of `task.questions`."""

    task: object  # tasks.Task
    memory: Memory
    turns: list = field(default_factory=list)
    answers: list = field(default_factory=list)  # None where no answer was given
    scores: list = field(default_factory=list)
    query: str = ""
    query_vector: object = None  # (d,)
    position: int = 0  # chunks read and questions dealt with so far
    reads: int = 0  # how often a Read has shown the present chunk or question again

    @property
    def done(self):
        return self.position == len(self.task.chunks) + len(self.task.questions)

    @property
    def answered(self):
        """[(answer, question)] of the questions that got one."""
        return [(answer, question) for answer, question in zip(self.answers, self.task.questions) if answer is not None]

    @property
    def reward(self):
        """The mean score over all the task's questions, within [0, 1]."""
        return sum(self.scores) / len(self.task.questions)


# --- prompts -------------------------------------------------------------------------------------------------------

DESCRIPTIONS = {
    "create": "<{tag}>a fact</{tag}> adds an entry to the memory.",
    "read": "<{tag}>what to look for</{tag}> searches the memory. The entries that fit best are shown from the next turn "
            "on, until you search for something else. If you add, change or remove nothing in the same turn, you see the "
            "present text or question once more, with what was found beside it.",
    "update": "<{tag}>{number}: new text</{tag}> replaces the entry that is shown as number 2. Use it when the text "
              "brings a newer truth about something you already hold.",
    "delete": "<{tag}>{number}</{tag}> removes the entry that is shown as number 2, when it is no longer true or of no use.",
    "scratchpad": "<{tag}>text</{tag}> rewrites your scratchpad, a short note that is always shown. What you do not "
                  "repeat in it is lost.",
    "answer": "<{tag}>{answer}</{tag}> answers the question. Write only the answer itself, a few words at most.",
}


def instruction(config):
    """The system message for pretrained models. An operation that is switched off is not mentioned, nor, without any, a memory."""
    released = config.dialect == "released"
    lines = []
    for kind, tag in TAGS[config.dialect].items():
        if kind == "answer" or config.enabled(kind):
            lines.append("- " + DESCRIPTIONS[kind].format(tag=tag, number="Memory 2" if released else "2",
                                                          answer=r"\boxed{text}" if released else "text"))
    if not any(map(config.enabled, OPERATIONS)):
        return f"You are asked a question. You may be shown a text, or parts of one, with it.\n{lines[0]}\nWrite nothing but that."
    return ("You read a long text piece by piece, and answer questions about it afterwards, when the text is gone: only "
            "your memory and your scratchpad are left then. First you are shown the questions and one piece of the text "
            "each turn; keep what the answers will need. Later you are shown one question at a time, without the text.\n"
            "In each turn, write any of these, in the order in which they shall happen:\n" + "\n".join(lines) + "\n"
            "Write nothing but that; where a piece of text holds nothing of use, write nothing at all.")


def render(observation):
    """The observation as text: the same block for every model.

    Two things help a small model. The standing query, with which it compares the names that it has just read, stands last,
    next to its response. And an entry's number is written in another way than Update writes it: after "1: Anna lives in"
    a copying head would go on with the old value.
    """
    lines = [f"Question: {observation.question}" if observation.question else "Questions: " + " ".join(observation.questions)]
    if observation.chunk is not None:
        lines.append(f"Text: {observation.chunk}")
    lines.append(f"Scratchpad: {observation.scratchpad}")
    lines += [f"#{number} {entry.text}" for number, entry in enumerate(observation.entries, start=1)]
    return "\n".join([*lines, f"Query: {observation.query}"])


def fit(observation, size, limit):
    """Shorten an observation until size(observation), the tokens of its prompt, is within `limit`.

    A text beside a question loses its end; entries are left out, the least similar first; then the policy's own scratchpad and
    query are cut short. BadInput when the task alone is too long.
    """
    while (tokens := size(observation)) > limit:
        if observation.question and observation.chunk:
            observation.chunk = observation.chunk[: len(observation.chunk) * limit // tokens * 99 // 100]
        elif observation.entries:
            observation.entries.pop()
        elif longer := max(observation.scratchpad, observation.query, key=len):
            name = "scratchpad" if observation.scratchpad == longer else "query"
            setattr(observation, name, longer[: len(longer) // 2])
        else:
            raise BadInput(f"a prompt of {tokens} tokens, of text and questions alone, is over --max_prompt_tokens {limit}: "
                           "raise it, or lower --chunk_tokens or --questions")


# --- the grammar ---------------------------------------------------------------------------------------------------

TAG = re.compile(r"<(/?)([a-z_]{1,24})>")  # bounded, so that matching is linear in the text
NUMBER = re.compile(r"(?:Memory\s+)?([0-9]{1,6})\s*(?::\s*(.*))?", re.DOTALL)


def parse(text, config):
    """The operations that a response asks for, in order; those that cannot be executed carry an `error`.

    Text outside tags is ignored. A tag that never closes ends where the next one opens. Tags are not nested: inside an
    operation only its own closing tag, or the opening of another operation, means anything.
    """
    kinds = {tag: kind for kind, tag in TAGS[config.dialect].items()}
    operations, opened = [], None  # opened: (kind, where its content starts)
    for match in TAG.finditer(text):
        closing, kind = match[1] == "/", kinds.get(match[2], "unknown")
        if closing and opened and kind == opened[0]:
            operations.append(build(kind, text[opened[1] : match.start()].strip(), config))
            opened = None
        elif closing or kind == "unknown":
            if not opened:
                operations.append(Operation(kind, match[0], error="a closing tag alone" if closing else "unknown tag"))
        else:
            if opened:
                operations.append(Operation(opened[0], error="never closed"))
            opened = kind, match.end()
    if opened:
        operations.append(Operation(opened[0], error="never closed"))
    return operations


def build(kind, content, config):
    """The operation that one tag and its content make."""
    operation = Operation(kind, content)
    if kind != "answer" and not config.enabled(kind):
        operation.error = "switched off"
    elif kind in ("update", "delete"):
        match = NUMBER.fullmatch(content)
        operation.number = int(match[1]) if match else 0
        operation.text = (match[2] or "").strip() if match else ""
        if not match:
            operation.error = "no entry number"
        elif kind == "update" and not operation.text:
            operation.error = "empty text"
        elif kind == "delete" and operation.text:
            operation.error = "text after the entry number"
    elif kind == "answer" and config.dialect == "released":
        operation.text = unbox(content)
    if not operation.error and not operation.text and kind not in ("delete", "scratchpad"):  # a note may be wiped
        operation.error = "empty text"
    return operation


def unbox(text):
    r"""What stands in the last `\boxed{...}` of `text`, braces balanced, or after a bare `\boxed `; "" without either.

    >>> unbox(r"so it is \boxed{f_{1}}.")
    'f_{1}'
    """
    _, _, rest = text.rpartition(r"\boxed")
    if rest.startswith(" "):
        return rest.partition("$")[0].strip()
    depth = 0
    for end, character in enumerate(rest if rest.startswith("{") else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:end].strip()
    return ""


# --- the episode loop ----------------------------------------------------------------------------------------------


def run_episodes(tasks, policy, config, embed, score, progress=lambda turns, done: None, begin=None, seed=0):
    """Run one episode for each task, all side by side, and return them in the order of `tasks`.

    policy: has respond(observations) -> responses, one for each; or, so that episodes go on by themselves, serve(waiting), as
    `waves` below. embed(texts, query=False) -> (B, d) unit vectors, for as many texts at once as there are. score(answer, question)
    -> a number in [0, 1]. `progress` is told how many turns were taken, now and then, and how many episodes are done. begin(task)
    makes the Episode, if not one with an empty memory.

    What an episode draws at random hangs on config.seed, `seed`, its task's id and how many episodes of that task come before it,
    and not on what else is played beside it; but tokens of a server and of transformers' continuous batching are drawn there.
    """
    episodes = [begin(task) if begin else Episode(task, Memory(config.capacity)) for task in tasks]
    times = {task.id: itertools.count() for task in tasks}
    chances = [random.Random(f"{config.seed} {seed} {task.id} {next(times[task.id])}") for task in tasks]

    def turn(number):
        return number, observe(episodes[number], config, chances[number]), chances[number]

    waiting = deque(turn(number) for number, episode in enumerate(episodes) if not episode.done)
    for answered in policy.serve(waiting) if hasattr(policy, "serve") else waves(policy, waiting):
        parsed = [parse(response.text, config) for _, response in answered]
        vectors = embed_all([operation for operations in parsed for operation in operations], embed)
        for ((number, observation, _), response), operations in zip(answered, parsed):
            take_turn(episodes[number], observation, response, operations, vectors, config, score)
            if not episodes[number].done:
                waiting.append(turn(number))
        progress(len(answered), sum(episode.done for episode in episodes))
    return episodes


def waves(policy, waiting):
    """Yields [(item, its Response)], some at a time, until the deque `waiting`, to which the caller appends between two yields, is empty.

    An item is (the episode's number, observation, the episode's random.Random). Here all that waits is answered together.
    """
    while items := list(waiting):
        waiting.clear()
        yield list(zip(items, policy.respond([observation for _, observation, _ in items])))


def observe(episode, config, rng):
    """o_t of eq. 7. The search is done anew each turn: the query stands, but the entries change."""
    entries = []
    if episode.query and config.retrieval == "random":
        entries = episode.memory.sample(rng, config.top_k)
    elif episode.query:
        entries = episode.memory.search(episode.query_vector, config.top_k)
    questions = tuple(question.text for question in episode.task.questions)
    observation = Observation(questions, episode.memory.scratchpad, episode.query, entries)
    asked = episode.position - len(episode.task.chunks)
    if asked < 0:
        observation.chunk = episode.task.chunks[episode.position]
    else:
        observation.question, observation.chunk = questions[asked], episode.task.beside or None
    return observation


def embed_all(operations, embed):
    """{(text, is it a query?): vector} for everything that the operations store or look for; two calls at most."""
    vectors = {}
    for query, kinds in ((False, ("create", "update")), (True, ("read",))):
        texts = list(dict.fromkeys(o.text for o in operations if o.kind in kinds and not o.error))
        if texts:
            vectors |= {(text, query): vector for text, vector in zip(texts, embed(texts, query=query))}
    return vectors


def take_turn(episode, observation, response, operations, vectors, config, score):
    """Execute one response and move on, by the turn rules at the top of this file."""
    asked = episode.position - len(episode.task.chunks)  # which question; negative while reading
    answer = None
    for operation in operations:
        if operation.error:
            continue
        if operation.kind != "answer":
            execute(operation, episode, observation, vectors)
        elif asked < 0:
            operation.error = "an answer while reading"
        else:
            answer = operation.text
    episode.turns.append(Turn(observation, response, operations, episode.position))
    done = {operation.kind for operation in operations if not operation.error}
    look_again = "read" in done and (answer is None if asked >= 0 else not done & {"create", "update", "delete"})
    if look_again and episode.reads < config.max_reads:
        episode.reads += 1
        return
    episode.reads = 0
    episode.position += 1
    if asked >= 0:
        episode.answers.append(answer)
        episode.scores.append(0.0 if answer is None else score(answer, episode.task.questions[asked]))


def execute(operation, episode, observation, vectors):
    """Apply a_k of eq. 5, one well-formed operation, to the episode's memory; set its id, or its error."""
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
        operation.error = "no entry of that number is shown"
    else:
        operation.id = observation.entries[operation.number - 1].id
        done = (memory.delete(operation.id) if operation.kind == "delete"
                else memory.update(operation.id, operation.text, vectors[operation.text, False]))
        if not done:
            operation.error = "that entry has been deleted in this turn"
