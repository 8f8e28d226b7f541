"""What is asked and how it is scored: the town (built in), and long-context QA from three public data sets.

The town is a generator of short stories about people: where they live, their job, their pet, whom they work for, and how
often they went to the market. A later sentence about the same thing supersedes the earlier one and looks just like it;
some sentences retract ("has no pet any more"); going to the market is an event that only a running count can hold. A
question needs one fact, or two (the home of somebody's boss), or the count.
"""

import functools
import json
import random
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from config import BadInput


@dataclass(frozen=True)
class Question:
    """`answers`: the gold answer first, then its aliases. `support`: QA sets only, (title, sentence) that hold the answer."""

    text: str
    answers: tuple
    support: tuple = ()


@dataclass(frozen=True)
class Task:
    """One episode's work: `chunks` of text to read in order, then `questions` to answer from memory."""

    id: str
    questions: tuple
    chunks: tuple


# --- the town ------------------------------------------------------------------------------------------------------

NAMES = "Anna Ben Clara David Emma Felix Greta Hugo".split()
VALUES = {
    "home": "Rome Oslo Paris Vienna Madrid Lisbon".split(),
    "job": "baker teacher doctor farmer painter nurse".split(),
    "pet": "cat dog parrot rabbit horse goat".split(),
    "boss": NAMES,
}
SENTENCES = {
    "home": "{name} lives in {value}",
    "job": "{name} is a {value}",
    "pet": "{name} has a {value}",
    "boss": "{name} works for {value}",
    "market": "{name} went to the market",
}
RETRACTION = "{name} has no pet any more"
QUESTIONS = {
    "home": "Where does {name} live?",
    "job": "What is the job of {name}?",
    "pet": "Which pet does {name} have?",
    "market": "How often did {name} go to the market?",
    "boss home": "Where does the boss of {name} live?",
    "boss job": "What is the job of the boss of {name}?",
    "boss pet": "Which pet does the boss of {name} have?",
}
SENTENCES_PER_STORY, SENTENCES_PER_CHUNK = 14, 2


def sentence(kind, name, value):
    """The town's sentence, without its full stop. value: None for a retraction, "" for an event."""
    return (RETRACTION if value is None else SENTENCES[kind]).format(name=name, value=value)


def versions(rng, values, most):
    """1 to `most` values in a row, neighbours different."""
    picked = [rng.choice(values)]
    for _ in range(rng.randrange(most)):
        picked.append(rng.choice([value for value in values if value != picked[-1]]))
    return picked


def town_task(index, split, config, hops=True):
    """Story number `index` of the 'train', 'dev' or 'test' stream; no two streams share a random state.

    The sentences about one thing keep their order among the others, which come in random order. Distractors, about
    people nobody asks for, fill the story up to `config.length` times the usual number of sentences. hops=False: an easier
    story, without two-hop questions.
    """
    rng = random.Random(f"{split} {config.seed if split == 'train' else 'held out'} {index}")
    kinds = rng.sample([kind for kind in QUESTIONS if hops or " " not in kind], config.questions or rng.randint(1, 4))
    name, *others = rng.sample(NAMES, len(NAMES))
    tracks, answers = [], {}  # a track: sentences whose order matters

    def tell(kind, name, values):
        tracks.append([sentence(kind, name, value) for value in values])
        return values[-1]

    for kind in ("home", "job"):
        if kind in kinds:
            answers[kind] = tell(kind, name, versions(rng, VALUES[kind], 4))
    if "pet" in kinds:
        pets = versions(rng, VALUES["pet"], 3)
        pets = [one for pet in pets for one in ((pet, None) if rng.random() < 0.5 else (pet,))]  # half of them are given away
        answers["pet"] = tell("pet", name, pets) or "none"
    if "market" in kinds:
        visits = rng.randint(1, 6)
        tell("market", name, [""] * visits)
        answers["market"] = str(visits)
    asked_of_boss = [kind.split()[1] for kind in kinds if kind.startswith("boss")]
    if asked_of_boss:
        bosses = versions(rng, others[:2], 3)
        tell("boss", name, bosses)
        for boss in dict.fromkeys(bosses):
            for kind in asked_of_boss:
                value = tell(kind, boss, [rng.choice(VALUES[kind])])
                if boss == bosses[-1]:
                    answers["boss " + kind] = value
        others = others[2:]
    while sum(map(len, tracks)) < SENTENCES_PER_STORY * config.length:
        kind, who = rng.choice([*SENTENCES, "retraction"]), rng.choice(others)
        if kind == "retraction":
            tell("pet", who, [None])
        else:
            tell(kind, who, [rng.choice([value for value in VALUES.get(kind, [""]) if value not in (name, who)])])
    order = [number for number, track in enumerate(tracks) for _ in track]
    rng.shuffle(order)
    sentences = [tracks[number].pop(0) + "." for number in order]
    chunks = [" ".join(sentences[at : at + SENTENCES_PER_CHUNK]) for at in range(0, len(sentences), SENTENCES_PER_CHUNK)]
    questions = [Question(QUESTIONS[kind].format(name=name), (answers[kind],)) for kind in kinds]
    return Task(f"town-{split}-{index}", tuple(questions), tuple(chunks))


def town_texts():
    """Texts that hold every word of the town's stories, questions and prompts: the word-level tokenizer's vocabulary."""
    facts = [sentence(kind, name, value) for kind in SENTENCES for name in NAMES for value in VALUES.get(kind, [""])]
    asked = [question.format(name=NAMES[0]) for question in QUESTIONS.values()]
    return facts + asked + [sentence("pet", NAMES[0], None) + "."] + [str(number) for number in range(100)] + [
        "none", "market", "Questions: Question: Scratchpad: Query: Text: #"]


# --- long-context QA from HotpotQA, 2WikiMultihopQA and MuSiQue ----------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One question of a QA file. `paragraphs`: (title, text), gold ones first; `gold` says how many of them are gold."""

    question: Question
    paragraphs: tuple
    gold: int


def corpus(config):
    """The texts from which a tiny model's tokenizer takes its vocabulary."""
    if config.task == "town":
        return town_texts()
    examples = read_examples(config.data, config.task)
    return [text for e in examples for text in (e.question.text, *e.question.answers, *(f"{t}\n{p}" for t, p in e.paragraphs))]


def load_tasks(config, split, count):
    """The stream of tasks, a function of the index: 'train', 'dev' (held out while training) or 'test'.

    `count` gives the number of tokens of a text; the town does without.
    """
    return QATasks(config, split, count) if config.task != "town" else functools.partial(town_task, split=split, config=config)


@functools.cache
def read_examples(path, task):
    """The examples of a file in the original format of `task`. BadInput names the file, the row and the fault."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a text file: {error}") from error
    if not text.strip():
        raise BadInput(f"{path}: the file is empty")
    try:  # JSONL is split at "\n" alone: the texts contain other line separators
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if task == "musique" else json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: not {'JSONL' if task == 'musique' else 'JSON'}, as files of {task} are: {error}") from error
    if not isinstance(rows, list):
        raise BadInput(f"{path}: not in the format of {task}: the file holds no list of rows")
    convert, examples = (musique_example if task == "musique" else hotpot_example), []
    for number, row in enumerate(rows):
        try:
            example = convert(row)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise BadInput(f"{path}: row {number} is not in the format of {task}: {error!r}") from error
        if example.gold == 0:
            raise BadInput(f"{path}: row {number}: the supporting paragraphs are not in its context; this looks like a "
                             "file of the 'fullwiki' kind, use the 'distractor' one")
        examples.append(example)
    return examples


def hotpot_example(row):
    """A row of HotpotQA or 2WikiMultihopQA: {question, answer, context [[title, [sentence]]], supporting_facts}."""
    support, gold, rest = [], [], []
    wanted = {}
    for title, number in row["supporting_facts"]:
        wanted.setdefault(title, []).append(number)
    for title, sentences in row["context"]:
        sentences = [sentence.strip() for sentence in sentences]
        paragraph = (title, " ".join(sentence for sentence in sentences if sentence))
        (gold if title in wanted else rest).append(paragraph)
        support += [(title, sentences[n]) for n in wanted.get(title, ()) if n < len(sentences) and sentences[n]]
    complete = set(wanted) <= {title for title, _ in gold}
    question = Question(row["question"].strip(), (str(row["answer"]),), tuple(dict.fromkeys(support)))
    return Example(question, tuple(dict.fromkeys(gold + rest)), len(set(gold)) if complete else 0)


def musique_example(row):
    """A row of MuSiQue-Ans; its support, a sentence per hop, is the first one that holds the hop's answer."""
    paragraphs = [(p["title"], " ".join(p["paragraph_text"].split())) for p in row["paragraphs"]]
    places = [n for n, p in enumerate(row["paragraphs"]) if p["is_supporting"]]
    gold = list(dict.fromkeys(paragraphs[n] for n in places))
    by_idx = {p["idx"]: paragraph for p, paragraph in zip(row["paragraphs"], paragraphs)}
    support = []
    for hop in row["question_decomposition"]:
        title, text = by_idx[hop["paragraph_support_idx"]]
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z0-9\"'(])", text)
        holding = [s for s in sentences if hop["answer"].lower() in s.lower()] or sentences
        support.append((title, holding[0]))
    question = Question(row["question"].strip(), (row["answer"], *row["answer_aliases"]), tuple(dict.fromkeys(support)))
    return Example(question, tuple(dict.fromkeys(gold + paragraphs)), len(gold))


class QATasks:
    """Builds tasks from the examples of one file; `count` gives the number of tokens of a text."""

    def __init__(self, config, split, count):
        self.config, self.split, self.count = config, split, count
        self.examples = read_examples(config.data, config.task)
        self.pool = list(dict.fromkeys(p for example in self.examples for p in example.paragraphs))
        most = config.questions or 10
        if split != "test":  # of a training file, up to every 20th question is kept for the evaluations during training
            every = min(20, max(2, len(self.examples) // most))
            self.examples = [e for number, e in enumerate(self.examples) if (number % every == every - 1) == (split == "dev")]
        if len(self.pool) < config.documents:
            raise BadInput(f"{config.data}: {len(self.pool)} different paragraphs are too few for --documents "
                             f"{config.documents}")
        if len(self.examples) < most:
            raise BadInput(f"{config.data}: {len(self.examples)} questions are too few for tasks of up to {most}")
        gold = sum(sorted(example.gold for example in self.examples)[-most:])
        if gold > config.documents:
            raise BadInput(f"--documents {config.documents} cannot hold the gold paragraphs of {most} questions (up to "
                             f"{gold}): raise it, or lower --questions")

    def __call__(self, index):
        """Task number `index`: its questions, distractors and order hang on the index, and in training on the seed."""
        rng = random.Random(f"{self.config.task} {self.split} {self.config.seed if self.split == 'train' else ''} {index}")
        number = self.config.questions or (1 if rng.random() < 0.5 else rng.randint(2, 10))
        examples = rng.sample(self.examples, number)
        gold = [p for example in examples for p in example.paragraphs[: example.gold]]
        own = [p for example in examples for p in example.paragraphs[example.gold :]]
        rng.shuffle(own)  # if there is no room for all of them, none is preferred
        documents = list(dict.fromkeys(gold + own))[: self.config.documents]
        chosen = set(documents)
        while len(documents) < self.config.documents:
            paragraph = rng.choice(self.pool)
            if paragraph not in chosen:
                chosen.add(paragraph)
                documents.append(paragraph)
        rng.shuffle(documents)
        texts = [f"Document {n}: {title}\n{text}\n" for n, (title, text) in enumerate(documents, start=1)]
        chunks = split_chunks(texts, self.config.chunk_tokens, self.count)
        return Task(f"{self.config.task}-{self.split}-{index}", tuple(e.question for e in examples), chunks)


def split_chunks(texts, most, count):
    """Join `texts` to chunks of at most `most` tokens, whole where they fit; "".join(chunks) == "".join(texts)."""
    chunks, used = [], most
    for text in texts:
        while text:
            size = count(text)
            if used + size <= most:
                chunks[-1] += text
                used += size
                break
            if size <= most:  # starts a chunk of its own
                chunks.append("")
                used = 0
                continue
            cut = len(text) * most // size  # too long for any chunk: cut at white space if there is some
            while count(text[:cut]) > most:
                cut = cut * 9 // 10
            cut = max(1, text.rfind(" ", 1, cut) + 1 or cut)
            chunks.append(text[:cut])
            text, used = text[cut:], most
    return tuple(chunks)


# --- scoring -------------------------------------------------------------------------------------------------------


def scorer(config):
    """The function score(answer, question) -> [0, 1] that --scorer names."""
    return exact_match if config.scorer == "official" else released_match


def normalize(text):
    """The official answer normalisation of SQuAD and HotpotQA: lower case, no ASCII punctuation, no a / an / the."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, question):
    """1.0 if the prediction equals the answer or an alias, after normalisation."""
    return float(any(normalize(prediction) == normalize(answer) for answer in question.answers))


def f1(prediction, question, yes_no=True):
    """Token F1, the best over answer and aliases.

    yes_no: HotpotQA's and 2Wiki's rule that yes, no and noanswer earn nothing but by equality. MuSiQue has no such rule,
    but with an empty side scores 1 if both are empty, else 0.
    """
    return max(pair_f1(normalize(prediction), normalize(answer), yes_no) for answer in question.answers)


def pair_f1(prediction, gold, yes_no):
    if yes_no and prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    ours, theirs = prediction.split(), gold.split()
    if not yes_no and not (ours and theirs):
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def released_match(prediction, question):
    """What the released code calls exact match: string equality in the way of its scorer for the MATH data set."""
    return float(any(strip_string(prediction) == strip_string(answer) for answer in question.answers))


def strip_string(text):
    """The LaTeX clean-up of the MATH scorer, as far as it can matter to answers in words; capitals do not count."""
    text = text.lower().replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    for mark in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", "%", " "):
        text = text.replace(mark, "")
    return "0" + text if text.startswith(".") else text
