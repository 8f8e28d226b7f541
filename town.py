"""The town, the built-in task: a generator of short stories about people, with questions about them.

It tells where they live, their job, their pet, whom they work for, and how often they went to the market. A later sentence about
the same thing supersedes the earlier one and looks just like it; some sentences retract ("has no pet any more"); going to the
market is an event that only a running count can hold. A question needs one fact, or two (the home of somebody's boss), or the
count.
"""

import random

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


def story(index, split, config, hops=True):
    """Story number `index` of the 'train', 'dev' or 'test' stream, as ([(question, answer)], [chunk]); no two share a random state.

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
    return [(QUESTIONS[kind].format(name=name), answers[kind]) for kind in kinds], chunks


def texts():
    """Texts that hold every word of the town's stories, questions and prompts: the word-level tokenizer's vocabulary."""
    facts = [sentence(kind, name, value) for kind in SENTENCES for name in NAMES for value in VALUES.get(kind, [""])]
    asked = [question.format(name=NAMES[0]) for question in QUESTIONS.values()]
    return facts + asked + [sentence("pet", NAMES[0], None) + "."] + [str(number) for number in range(100)] + [
        "none", "market", "Questions: Question: Scratchpad: Query: Text: #"]
