"""Demonstrations for supervised fine-tuning: scripted demonstrators, a stronger model as the teacher, and their file.

In the town scripts play a mixture of workflows, one per episode, most of them poor: SFT learns the mixture, and GRPO has to find
what pays. On a QA file a script is helped by the gold facts. A teacher is any model, or any server, that plays the tasks itself:

    python sft.py --teacher Qwen/Qwen3-32B --demonstrations teacher.jsonl --task hotpotqa --data hotpot_train.json
    python sft.py --demonstrations teacher.jsonl --model Qwen/Qwen3-0.6B --task hotpotqa --data hotpot_train.json

Each line of that file is an episode; those with a score below --keep_score are there by id and score alone:

    {"task": "hotpotqa-train-0", "score": 1.0, "turns": [{"prompt": "Questions: ...", "response": "<create_memory>..."}]}
"""

import json
import math
import random
import re
from pathlib import Path

from tqdm import tqdm

import town
from agent import TAGS, Response, fit, render, run_episodes
from config import BadInput
from endpoint import kept_rows
from scoring import scorer
from town import sentence

# --- the town's demonstrator ---------------------------------------------------------------------------------------

NAME = "(?P<name>" + "|".join(town.NAMES) + ")"
PATTERNS = [(kind, re.compile(template.format(name=NAME, value=r"(?P<value>\w+)"))) for kind, template in town.SENTENCES.items()]
PATTERNS.append(("pet", re.compile(town.RETRACTION.format(name=NAME))))

# Which share of the demonstrations each workflow has, as long as the operations that it needs are switched on.
WORKFLOWS = {
    "full": 0.4,  # Reads the asked person's name first; Updates and Deletes the entries that this brings into view
    "append": 0.2,  # never Reads while reading: old and new facts stand side by side
    "lazy": 0.4,  # like append, and stores nothing about people whom no question names
}  # and "notes", everything in the scratchpad, rewritten at each chunk (MemAgent's workflow), where there is no store


def facts_in(text):
    """[(kind, name, value)] of the town's sentences in `text`; value is None for a retraction, "" for an event."""
    found = []
    for part in text.split("."):
        for kind, pattern in PATTERNS:
            if match := pattern.fullmatch(part.strip()):
                value = match.groupdict().get("value", "" if kind == "market" else None)
                found.append((kind, match["name"], value))
    return found


class Demonstrator:
    """A scripted policy. `read` and `answer` write the response to one observation."""

    def __init__(self, config):
        self.config = config

    def respond(self, observations):
        return [Response(self.read(o) if o.question is None else self.answer(o)) for o in observations]

    def write(self, kind, text):
        """The operation as text, in the words of the configured dialect."""
        if self.config.dialect == "released":
            text = {"answer": f"\\boxed{{{text}}}", "update": f"Memory {text}", "delete": f"Memory {text}"}.get(kind, text)
        tag = TAGS[self.config.dialect][kind]
        return f"<{tag}>{text}</{tag}>"


class TownDemonstrator(Demonstrator):
    """Plays one workflow, from the observation alone. With probability `noise` it overlooks a sentence."""

    def __init__(self, workflow, config, noise=0.02, seed=""):
        super().__init__(config)
        self.workflow, self.noise, self.rng = workflow, noise, random.Random(f"{workflow} {config.seed} {seed}")

    def read(self, o):
        asked = " ".join(o.questions)
        person = re.search(NAME, asked)[0]
        if self.workflow == "full" and not o.query:
            return self.write("read", person)
        news, visits = {}, 0  # of two sentences about the same thing in one chunk, the later one counts
        for kind, name, value in facts_in(o.chunk):
            if self.rng.random() < self.noise:
                continue
            if kind == "market":
                visits += name == person
            elif name == person or ("boss" in asked and kind != "boss" and self.workflow != "lazy"):
                news[kind, name] = value  # whoever turns out to be the boss, these facts may be asked for
        if self.workflow == "notes":
            return self.rewrite_notes(o, asked, news, visits)
        operations = [self.record(o, kind, name, value) for (kind, name), value in news.items()]
        if visits and "market" in asked:
            if self.config.enabled("scratchpad"):
                operations.append(self.write("scratchpad", int(o.scratchpad or 0) + visits))
            else:
                operations += [self.write("create", sentence("market", person, ""))] * visits
        return "".join(operations)

    def record(self, o, kind, name, value):
        """The operations that bring one fact into the store."""
        shown = {fact[:2]: number for number, entry in enumerate(o.entries, 1) for fact in facts_in(entry.text)}
        number, text = shown.get((kind, name)), sentence(kind, name, value)
        if self.workflow != "full":
            return self.write("create", text)
        if number and value is None and self.config.enabled("delete"):
            return self.write("delete", number)
        if number and self.config.enabled("update"):
            return self.write("update", f"{number}: {text}")
        if number and self.config.enabled("delete"):
            return self.write("delete", number) + self.write("create", text)
        return self.write("create", text) if value is not None else ""

    def rewrite_notes(self, o, asked, news, visits):
        """The scratchpad with the news worked in: what is asked of the person, and of the boss once that is known."""
        person, notes = re.search(NAME, asked)[0], {fact[:2]: fact[2] for fact in facts_in(o.scratchpad)}
        count = re.search(r"market (\d+)", o.scratchpad)
        count = int(count[1] if count else 0) + (visits if "market" in asked else 0)
        news = {**notes, **news}
        boss = news.get(("boss", person))
        kept = {key: value for key, value in news.items() if value is not None and key[1] in (person, boss)}
        text = ". ".join([sentence(*key, value) for key, value in kept.items()][:3] + [f"market {count}"] * (count > 0))
        return self.write("scratchpad", text) if text != o.scratchpad.replace(" .", ".") else ""

    def answer(self, o):
        person = re.search(NAME, o.question)[0]
        kind = next(kind for kind, text in town.QUESTIONS.items() if text.format(name=person) == o.question)
        facts = [fact for text in [o.scratchpad, *(entry.text for entry in o.entries)] for fact in facts_in(text)]
        if kind == "market" and self.config.enabled("scratchpad"):
            return self.write("answer", re.sub(r".*\D", "", o.scratchpad) or "0")
        if kind == "market":
            return self.look_up(o, "market", person, [str(facts.count(("market", person, "")))] if "market" in o.query else [])
        *hop, kind = kind.split()
        if hop:
            bosses = [value for k, name, value in facts if (k, name) == ("boss", person)]
            second = [name for name in town.NAMES if o.query == query_for(kind, name) and name != person]
            if not bosses and not second:
                return self.look_up(o, "boss", person, [])
            person = second[0] if second else self.rng.choice(bosses)
        return self.look_up(o, kind, person, [value for k, name, value in facts if (k, name) == (kind, person)])

    def look_up(self, o, kind, name, values):
        """Answer with one of `values`; if there is none, Read for it once, then give in."""
        if not values and self.config.enabled("read") and o.query != query_for(kind, name):
            return self.write("read", query_for(kind, name))
        return self.write("answer", (values and self.rng.choice(values)) or "none")


def query_for(kind, name):
    """The words that the sentences of one kind about one person share, without the fillers: 'Anna lives'."""
    return " ".join(sentence(kind, name, "").split()[:2])


# --- the demonstrator for QA files ---------------------------------------------------------------------------------


class GoldDemonstrator(Demonstrator):
    """Plays QA tasks with the help of the file's gold facts, so that no paid teacher is needed.

    Reading: it Creates an entry for each supporting sentence in the chunk (or, without Create, adds it to the scratchpad).
    Answering: it Reads by the question's words, then by these and what they brought; it gives the gold answer if all the
    supporting sentences are in view, else none. count(texts) gives the number of tokens of each.
    """

    def __init__(self, tasks, config, count):
        super().__init__(config)
        self.questions, self.count = {question.text: question for task in tasks for question in task.questions}, count

    def respond(self, observations):
        for o in observations:  # it sees no more than fits a prompt
            fit(o, lambda o: self.count([render(o)])[0], self.config.max_prompt_tokens)
        return super().respond(observations)

    def read(self, o):
        response, notes = "", o.scratchpad
        for support in dict.fromkeys(fact for text in o.questions for fact in self.questions[text].support):
            fact = ": ".join(support)
            if support[1] not in o.chunk or fact in notes:
                continue
            if self.config.enabled("create") and self.fits(response + self.write("create", fact)):
                response += self.write("create", fact)
            elif not self.config.enabled("create") and self.fits(self.write("scratchpad", f"{notes} {fact}")):
                notes = f"{notes} {fact}".strip()
        return response if notes == o.scratchpad else self.write("scratchpad", notes)

    def answer(self, o):
        question = self.questions[o.question]
        shown = "\n".join([o.chunk or "", o.scratchpad, *(entry.text for entry in o.entries)])
        found = [": ".join(support) for support in question.support if support[1] in shown]
        if found and len(found) == len(question.support):
            return self.write("answer", question.answers[0])
        query = " ".join([question.text, *found])
        return self.write("read", query) if query != o.query and self.fits(self.write("read", query)) else ""

    def fits(self, response):
        return self.count([response], written=True)[0] < self.config.max_response_tokens  # below: the end token comes on top


# --- a teacher's demonstrations ------------------------------------------------------------------------------------

# What has to be the same in all of a file's episodes; and, the first five, in the training on them.
RECORDED = ("task", "disable", "dialect", "chunk_tokens", "top_k", "data", "questions", "length", "documents", "order", "capacity", "embedder",
            "retrieval", "max_reads", "max_prompt_tokens", "max_response_tokens", "temperature", "keep_score", "seed")


def record(teacher, name, stream, config, embed):
    """Let `teacher`, a policy, play the first config.sft_tasks training tasks, and write its episodes to config.demonstrations.

    Episodes that the file already holds are not played again. Returns the scores of all that it holds then. BadInput if it was made
    with other settings, or is something else.
    """
    path, lines = Path(config.demonstrations), []
    settings = {"teacher": name, **{name: getattr(config, name) for name in RECORDED}}
    if path.exists():
        before, lines = read_file(path)
        if before != settings:
            differing = [name for name in settings if before.get(name) != settings[name]]
            raise BadInput(f"{path} was begun with another {', '.join(differing)}: give the same again, or another file")
    else:
        path.write_text(json.dumps({"settings": settings}) + "\n")
    scores, block = {line["task"]: line["score"] for line in lines}, config.in_flight if config.endpoint else config.sample_rows
    with open(path, "a", encoding="utf-8") as file, tqdm(total=config.sft_tasks, desc="teacher", disable=None, unit="episode") as bar:
        for start in range(0, config.sft_tasks, block):
            tasks = [stream(index) for index in range(start, min(start + block, config.sft_tasks))]
            for episode in run_episodes([task for task in tasks if task.id not in scores], teacher, config, embed, scorer(config)):
                turns = [{"prompt": render(turn.observation), "response": turn.response.text} for turn in episode.turns
                         if episode.reward >= config.keep_score and not turn.response.truncated]
                scores[episode.task.id] = episode.reward
                file.write(json.dumps({"task": episode.task.id, "score": episode.reward, "turns": turns}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(tasks))
    return list(scores.values())


def read_file(path):
    """(settings, [line]) of a file of demonstrations. BadInput names the line that is none."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; sft.py --teacher makes one")
    if not (rows := kept_rows(path, "settings")):
        raise BadInput(f"{path}: the file is empty")
    settings, *lines = rows
    for number, line in enumerate(lines, start=2):
        try:
            str(line["task"]), float(line["score"]), [turn["prompt"] + turn["response"] for turn in line["turns"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: line {number} is no demonstration: {error!r}") from error
    return settings["settings"], lines


def recorded(config):
    """[(prompt text, response text)] of the turns in the file config.demonstrations whose episode reached config.keep_score."""
    settings, lines = read_file(config.demonstrations)
    for name in RECORDED[:5]:
        if settings.get(name) != getattr(config, name):
            raise BadInput(f"{config.demonstrations} was made with --{name} {settings.get(name)}, not {getattr(config, name)}")
    return [(turn["prompt"], turn["response"]) for line in lines if line["score"] >= config.keep_score for turn in line["turns"]]


# --- scripted demonstrations -----------------------------------------------------------------------------------

BLOCK = 200  # tasks that are demonstrated together, when the trainer needs more rows


def workflow_shares(config):
    """{workflow: share} of the demonstrations. Where the full one is impossible, the best of the others plays them all."""
    if not config.enabled("create"):
        return {"notes": 1.0}
    if not config.enabled("read") or not (config.enabled("update") or config.enabled("delete")):
        return {"append": 1.0}
    return WORKFLOWS


def demonstrate(tasks, config, embed, count, quiet=False):
    """Demonstrated episodes of `tasks`, unfiltered; which workflow plays a task of the town is drawn from the shares.

    quiet: without a progress bar.
    """
    if config.task != "town":
        groups = [(GoldDemonstrator(tasks, config, count), tasks)]
    else:
        shares, seed = workflow_shares(config), tasks[0].id
        drawn = random.Random(f"{config.seed} {seed}").choices(list(shares), list(shares.values()), k=len(tasks))
        groups = [(TownDemonstrator(name, config, seed=seed), [task for task, one in zip(tasks, drawn) if one == name]) for name in shares]
    episodes = []
    with tqdm(total=len(tasks), desc="demonstrations", disable=quiet or None, unit="episode", leave=False, delay=2) as bar:
        for demonstrator, tasks in groups:
            episodes += run_episodes(tasks, demonstrator, config, embed, scorer(config), lambda turns, done: bar.update(done - bar.n))
    return episodes


def lessons(config, stream):
    """[(share of the steps, its tasks in blocks)]: in the town, stories without two-hop questions come first.

    In those every sentence about somebody else is to be passed over, so they teach the comparison of names, on which
    all else rests, several times as fast as the full mixture does.
    """
    def blocks(first, last, **kind):
        for start in range(first, last, BLOCK):
            yield [stream(index, **kind) for index in range(start, min(start + BLOCK, last))]

    if config.task != "town" or not config.easy_share:
        return [(1.0, blocks(0, config.sft_tasks))]
    easy = math.ceil(config.easy_share * config.sft_tasks)
    return [(config.easy_share, blocks(0, easy, hops=False)), (1 - config.easy_share, blocks(easy, config.sft_tasks))]
