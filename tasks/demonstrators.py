"""Demonstrators: the policies that SFT learns from, and the file of a teacher's demonstrations.

In the town, scripts play a mixture of workflows, one per episode, most of them poor. SFT learns the
mixture, and GRPO finds the best workflow. On a QA file, a script uses the gold facts. Any other
model can be a teacher: tools/teach.py writes its demonstrations to a file, one episode per line
after a first line with the settings, at least those in SAME:

    {"settings": {"task": "hotpotqa", "disable": [], "dialect": "paper", ...}}
    {"task": "hotpotqa-train-0", "score": 1.0, "turns": [{"prompt": "...", "response": "<..."}]}
"""

import json
import math
import os
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from agent import FORMS, TAGS, Episode, Observation, Response, run_episodes
from config import BadInput, Config, need
from memory import Embedder
from tasks import Stream, Task, town
from tasks.scoring import score_function
from tasks.town import sentence

# The share of the demonstrations that each workflow plays, if its operations are switched on.
WORKFLOWS = {
    "full": 0.4,  # Reads the asked person's name first; Updates and Deletes the entries shown
    "append": 0.2,  # never Reads while reading: old and new facts are stored side by side
    "lazy": 0.4,  # like append, but stores nothing about people whom no question names
}  # and "notes", if there is no store: all is kept in the scratchpad, as MemAgent does
BLOCK = 200  # tasks that are demonstrated together, each time the trainer needs more samples
# RECORDED: settings that all episodes of a file share. SAME: those that training must share, too.
SAME = ("task", "disable", "dialect", "chunk_tokens", "top_k")
RECORDED = SAME + tuple(
    "data questions length documents order capacity embedder retrieval max_reads seed "
    "max_prompt_tokens max_response_tokens temperature keep_score scorer instruction".split()
)
NAME = "(?P<name>" + "|".join(town.NAMES) + ")"
PATTERNS = [("pet", re.compile(town.RETRACTION.format(name=NAME)))]
for kind, template in town.SENTENCES.items():
    PATTERNS.append((kind, re.compile(template.format(name=NAME, value=r"(?P<value>\w+)"))))


class Demonstrator:
    """A scripted policy. `read` and `answer` write the response to one observation."""

    def __init__(self, config: Config):
        self.config = config

    def respond(self, observations: list[Observation]) -> list[Response]:
        methods = [self.read if one.question is None else self.answer for one in observations]
        return [Response(method(one)) for method, one in zip(methods, observations)]

    def write(self, kind: str, text: object) -> str:
        """The operation as text, in the tags of the configured dialect."""
        number, answer = FORMS[self.config.dialect]  # such as "Memory 2" and \boxed{text}
        if kind == "answer":
            text = answer.replace("text", str(text))
        elif kind in ("update", "delete"):
            text = number.replace("2", str(text))
        tag = TAGS[self.config.dialect][kind]
        return f"<{tag}>{text}</{tag}>"


# --- the town -------------------------------------------------------------------------------------
def facts_in(text: str) -> list[tuple[str, str, str | None]]:
    """[(kind, name, value)] of the town's sentences. value: None if retracted, "" for an event."""
    found = []
    for part in text.split("."):
        for kind, pattern in PATTERNS:
            if match := pattern.fullmatch(part.strip()):
                value = match.groupdict().get("value", "" if kind == "market" else None)
                found.append((kind, match["name"], value))
    return found


def query_for(kind: str, name: str) -> str:
    """The first words of all sentences of one kind about one person, such as 'Anna lives'."""
    return " ".join(sentence(kind, name, "").split()[:2])


class TownDemonstrator(Demonstrator):
    """Plays one workflow, from the observation alone. `noise`: how often it misses a sentence."""

    def __init__(self, workflow: str, config: Config, noise: float = 0.02, seed: str = ""):
        super().__init__(config)
        self.workflow, self.noise = workflow, noise
        self.rng = random.Random(f"{workflow} {config.seed} {seed}")

    def read(self, shown: Observation) -> str:
        asked = " ".join(shown.questions)
        person = re.search(NAME, asked)[0]
        if self.workflow == "full" and not shown.query:
            return self.write("read", person)
        others = "boss" in asked and self.workflow != "lazy"  # any of them may become the boss
        facts = [fact for fact in facts_in(shown.chunk) if self.rng.random() >= self.noise]
        visits = facts.count(("market", person, "")) if "market" in asked else 0
        news = {}  # in one chunk, a later sentence about the same thing replaces it
        for kind, name, value in facts:
            if kind != "market" and (name == person or (others and kind != "boss")):
                news[kind, name] = value
        if self.workflow == "notes":
            return self.rewrite_notes(shown, person, news, visits)
        operations = [self.store(shown, *fact, value) for fact, value in news.items()]
        if visits and self.config.enabled("scratchpad"):
            operations.append(self.write("scratchpad", int(shown.scratchpad or 0) + visits))
        else:
            operations += [self.write("create", sentence("market", person, ""))] * visits
        return "".join(operations)

    def store(self, shown: Observation, kind: str, name: str, value: str | None) -> str:
        """The text of the operations that bring one fact into the store."""
        create = self.write("create", sentence(kind, name, value))
        if self.workflow != "full":
            return create
        numbers = {}
        for number, entry in enumerate(shown.entries, 1):
            numbers |= {fact[:2]: number for fact in facts_in(entry.text)}
        number = numbers.get((kind, name))
        replacement = create if value is not None else ""  # a retraction only removes
        update, delete = self.config.enabled("update"), self.config.enabled("delete")
        if number and update and (value is not None or not delete):
            return self.write("update", f"{number}: {sentence(kind, name, value)}")
        return (self.write("delete", number) if number and delete else "") + replacement

    def rewrite_notes(self, shown: Observation, person: str, news: dict, visits: int) -> str:
        """The scratchpad with the news about the person and, once known, the person's boss."""
        facts = {fact[:2]: fact[2] for fact in facts_in(shown.scratchpad)} | news
        count = re.search(r"market (\d+)", shown.scratchpad)
        count = int(count[1] if count else 0) + visits
        people = (person, facts.get(("boss", person)))
        known = [(*key, value) for key, value in facts.items() if value and key[1] in people]
        notes = [sentence(*fact) for fact in known]
        text = ". ".join(notes[:3] + [f"market {count}"] * (count > 0))
        return self.write("scratchpad", text) if text != shown.scratchpad.replace(" .", ".") else ""

    def answer(self, shown: Observation) -> str:
        person = re.search(NAME, shown.question)[0]
        kinds = {text.format(name=person): kind for kind, text in town.QUESTIONS.items()}
        *hop, kind = kinds[shown.question].split()
        facts = facts_in(". ".join([shown.scratchpad, *(entry.text for entry in shown.entries)]))
        if kind == "market" and self.config.enabled("scratchpad"):
            return self.write("answer", re.sub(r".*\D", "", shown.scratchpad) or "0")
        if kind == "market":
            asked = shown.query == query_for(kind, person)  # before that, not all visits are shown
            count = [str(facts.count(("market", person, "")))] if asked else []
            return self.look_up(shown, kind, person, count)
        if hop:
            bosses = [value for *key, value in facts if key == ["boss", person]]
            others = [name for name in town.NAMES if name != person]
            second = [name for name in others if shown.query == query_for(kind, name)]
            if not bosses and not second:
                return self.look_up(shown, "boss", person, [])
            person = second[0] if second else self.rng.choice(bosses)
        values = [value for *key, value in facts if key == [kind, person]]
        return self.look_up(shown, kind, person, values)

    def look_up(self, shown: Observation, kind: str, name: str, values: list) -> str:
        """Answer with one of `values`. If there is none, Read for it once, then give up."""
        query = query_for(kind, name)
        if not values and self.config.enabled("read") and shown.query != query:
            return self.write("read", query)
        return self.write("answer", (self.rng.choice(values) if values else None) or "none")


# --- QA files -------------------------------------------------------------------------------------
class GoldDemonstrator(Demonstrator):
    """Plays QA tasks with the help of the file's gold facts, so that no teacher is needed.

    Reading: it Creates an entry for each supporting sentence in the chunk or, without Create, adds
    it to the scratchpad. Answering: it Reads with the question, then with the question and the
    facts found. It answers if all supporting sentences are shown. `policy` shortens prompts.
    """

    def __init__(self, tasks: list[Task], config: Config, policy):
        super().__init__(config)
        self.policy = policy
        self.questions = {task.id: {one.text: one for one in task.questions} for task in tasks}

    def respond(self, observations: list[Observation]) -> list[Response]:
        shortened = list(map(self.policy.shorten, observations))  # it sees no more than a model
        responses = super().respond(shortened)
        return [Response(one.text, observation=shown) for one, shown in zip(responses, shortened)]

    def read(self, shown: Observation) -> str:
        response, notes = "", shown.scratchpad
        questions = self.questions[shown.task_id].values()
        support = [pair for question in questions for pair in question.support]
        for title, text in dict.fromkeys(support):
            fact = f"{title}: {text}"
            if text not in shown.chunk or fact in notes:
                continue
            create, longer = self.write("create", fact), f"{notes} {fact}".strip()
            if self.config.enabled("create") and self.fits(response + create):
                response += create
            elif not self.config.enabled("create") and self.fits(self.write("scratchpad", longer)):
                notes = longer
        return response if notes == shown.scratchpad else self.write("scratchpad", notes)

    def answer(self, shown: Observation) -> str:
        question = self.questions[shown.task_id][shown.question]
        texts = [shown.chunk or "", shown.scratchpad, *(entry.text for entry in shown.entries)]
        text = "\n".join(texts)
        found = [": ".join(support) for support in question.support if support[1] in text]
        if found and len(found) == len(question.support):
            return self.write("answer", question.answers[0])
        query = " ".join([question.text, *found])
        read = self.write("read", query)
        return read if query != shown.query and self.fits(read) else ""

    def fits(self, response: str) -> bool:
        """Whether the response and its end token are within --max_response_tokens."""
        return self.policy.count([response])[0] < self.config.max_response_tokens


# --- a teacher's file -----------------------------------------------------------------------------
def read_jsonl_log(path: Path, mark: str) -> list[dict]:
    """The rows of a JSONL file that is written line by line. The first row has the key `mark`.

    A stopped process may leave half a line at the end. It is cut off the file. Raises BadInput, and
    changes nothing, if it is another kind of file. tools/server.py uses it for answers.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise BadInput(f"{path} is damaged, or another kind of file: {error}") from error
    marked = rows and isinstance(rows[0], dict) and mark in rows[0]
    need(marked or not (rows or rest), f"{path} is another kind of file: line 1 has no {mark!r}")
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))
    return rows


def read_file(path: str | Path) -> tuple[dict, list[dict]]:
    """(settings, lines) of a file of demonstrations; turns are pairs. BadInput for a bad line."""
    path = Path(path)
    need(path.is_file(), f"{path}: no such file; tools/teach.py writes one")
    rows = read_jsonl_log(path, "settings")
    need(rows, f"{path}: the file is empty")
    lines = []
    for number, line in enumerate(rows[1:], start=2):
        try:
            turns = [(one["prompt"], one["response"]) for one in line["turns"]]
            lines.append({"task": line["task"], "score": float(line["score"]), "turns": turns})
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: line {number} is not a demonstration: {error!r}") from error
    return rows[0]["settings"], lines


def recorded(config: Config) -> list[tuple[str, str]]:
    """(prompt, response) of each turn in --demonstrations whose episode reached --keep_score."""
    settings, lines = read_file(config.demonstrations)
    for name in SAME:
        before, now = settings.get(name), getattr(config, name)
        need(before == now, f"{config.demonstrations} was made with --{name} {before}, not {now}")
    kept = [line for line in lines if line["score"] >= config.keep_score]
    return [turn for line in kept for turn in line["turns"]]


# --- scripted demonstrations ----------------------------------------------------------------------
def workflow_shares(config: Config) -> dict[str, float]:
    """{workflow: share}, the best first. If "full" is impossible, one other plays all episodes."""
    if not config.enabled("create"):
        return {"notes": 1.0}
    full = config.enabled("read") and (config.enabled("update") or config.enabled("delete"))
    return WORKFLOWS if full else {"append": 1.0}


def demonstrate(tasks: list[Task], config: Config, embed: Embedder, policy) -> list[Episode]:
    """The demonstrations of `tasks`, unfiltered, in any order. policy: as in GoldDemonstrator."""
    score = score_function(config)
    if config.task != "town":
        script = GoldDemonstrator(tasks, config, policy)
        return run_episodes(tasks, script, config, embed, score)
    shares, seed, episodes = workflow_shares(config), tasks[0].id, []
    rng = random.Random(f"{config.seed} {seed}")
    drawn = rng.choices(list(shares), list(shares.values()), k=len(tasks))  # a workflow per task
    for name in shares:
        part = [task for task, one in zip(tasks, drawn) if one == name]
        script = TownDemonstrator(name, config, seed=seed)
        episodes += run_episodes(part, script, config, embed, score)
    return episodes


def curriculum(config: Config, stream: Stream) -> list[tuple[float, Iterator]]:
    """[(share of the SFT steps, blocks of tasks)]. In the town, easy stories come first.

    Easy stories have no two-hop questions, so every sentence about somebody else is irrelevant.
    All stories require comparing names. Easy ones teach this several times faster.
    """

    def blocks(make, first, last):
        for start in range(first, last, BLOCK):
            yield [make(index) for index in range(start, min(start + BLOCK, last))]

    easy_story = partial(town.town_task, split="train", config=config, hops=False)
    share = config.easy_share if config.task == "town" else 0.0
    easy, total = math.ceil(share * config.sft_tasks), config.sft_tasks
    parts = [(share, easy_story, 0, easy), (1 - share, stream, easy, total)]
    return [(part, blocks(make, first, last)) for part, make, first, last in parts if first < last]
