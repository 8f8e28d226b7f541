"""The town, the built-in task: short stories about people, with questions about them.

A story tells where people live, their job, their pet, whom they work for, and how often they went
to the market. A later sentence about the same thing supersedes the earlier one and looks just like
it. Some sentences retract ("has no pet any more"). Visits to the market have to be counted. A
question needs one fact, two facts (the home of somebody's boss), or the count.
"""

import random
from itertools import product

from config import Config
from tasks import Question, Task

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


def sentence(kind: str, name: str, value: str | None) -> str:
    """One sentence without its full stop. value: None for a retraction, "" for an event."""
    return (RETRACTION if value is None else SENTENCES[kind]).format(name=name, value=value)


def track(kind: str, name: str, values: list) -> list[str]:
    """A track: one sentence for each of `values`. A story keeps their order."""
    return [sentence(kind, name, value) + "." for value in values]


def versions(rng: random.Random, values: list[str], most: int) -> list[str]:
    """1 to `most` values in a row. Neighbours differ."""
    picked = [rng.choice(values)]
    for _ in range(rng.randrange(most)):
        picked.append(rng.choice([value for value in values if value != picked[-1]]))
    return picked


def person_tracks(rng: random.Random, kinds: list[str], name: str):
    """([track], {kind: answer}) of the questions about `name` that need one fact or the count."""
    tracks, answers = [], {}
    for kind in ("home", "job"):
        if kind in kinds:
            values = versions(rng, VALUES[kind], 4)
            tracks.append(track(kind, name, values))
            answers[kind] = values[-1]
    if "pet" in kinds:
        pets = []
        for pet in versions(rng, VALUES["pet"], 3):
            pets += [pet, None] if rng.random() < 0.5 else [pet]  # half of them are given away
        tracks.append(track("pet", name, pets))
        answers["pet"] = pets[-1] or "none"
    if "market" in kinds:
        visits = [""] * rng.randint(1, 6)
        tracks.append(track("market", name, visits))
        answers["market"] = str(len(visits))
    return tracks, answers


def boss_tracks(rng: random.Random, kinds: list[str], name: str, candidates: list[str]):
    """([track], {"boss " + kind: answer}) of the two-hop questions. Former bosses get facts too."""
    bosses = versions(rng, candidates, 3)
    tracks, answers = [track("boss", name, bosses)], {}
    for boss, kind in product(dict.fromkeys(bosses), kinds):
        value = rng.choice(VALUES[kind])
        tracks.append(track(kind, boss, [value]))
        if boss == bosses[-1]:
            answers["boss " + kind] = value
    return tracks, answers


def distractor(rng: random.Random, name: str, others: list[str]) -> list[str]:
    """A track of one sentence about one of the `others`. It never mentions `name`."""
    kind, who = rng.choice([*SENTENCES, "retraction"]), rng.choice(others)
    if kind == "retraction":
        return track("pet", who, [None])
    values = [value for value in VALUES.get(kind, [""]) if value not in (name, who)]
    return track(kind, who, [rng.choice(values)])


def town_task(index: int, split: str, config: Config, hops: bool = True) -> Task:
    """Story `index` of the 'train', 'dev' or 'test' stream. Its chunks are its documents.

    The tracks are mixed at random. Distractors, about other people, fill the story up to
    `config.length` times the usual number of sentences. hops=False: no two-hop questions.
    """
    rng = random.Random(f"{split} {config.seed if split == 'train' else 'held out'} {index}")
    allowed = [kind for kind in QUESTIONS if hops or " " not in kind]
    kinds = rng.sample(allowed, config.questions or rng.randint(1, 4))
    name, *others = rng.sample(NAMES, len(NAMES))
    tracks, answers = person_tracks(rng, kinds, name)
    asked_of_boss = [kind.split()[1] for kind in kinds if kind.startswith("boss")]
    if asked_of_boss:
        more_tracks, more_answers = boss_tracks(rng, asked_of_boss, name, others[:2])
        tracks, answers, others = tracks + more_tracks, answers | more_answers, others[2:]
    while sum(map(len, tracks)) < SENTENCES_PER_STORY * config.length:
        tracks.append(distractor(rng, name, others))
    order = [number for number, one in enumerate(tracks) for _ in one]
    rng.shuffle(order)
    sentences = [tracks[number].pop(0) for number in order]
    starts = range(0, len(sentences), SENTENCES_PER_CHUNK)
    chunks = tuple(" ".join(sentences[i : i + SENTENCES_PER_CHUNK]) for i in starts)
    questions = [Question(QUESTIONS[kind].format(name=name), (answers[kind],)) for kind in kinds]
    return Task(f"town-{split}-{index}", tuple(questions), documents=chunks, chunks=chunks)
