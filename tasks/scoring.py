"""Scores of answers, as in HotpotQA, 2WikiMultihopQA and MuSiQue, and counts over episodes."""

import re
import string
from collections import Counter
from collections.abc import Callable

from agent import TAGS, Episode
from config import Config
from tasks import Question


def score_function(config: Config) -> Callable[[str, Question], float]:
    """The function of --scorer: score(answer, question), within [0, 1]. The reward uses it."""
    return exact_match if config.scorer == "official" else released_match


def normalize(text: str) -> str:
    """SQuAD's and HotpotQA's normalisation: lower case, no ASCII punctuation, no a, an, the."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, question: Question) -> float:
    """1.0 if the prediction equals the answer or an alias, after normalisation."""
    return float(normalize(prediction) in map(normalize, question.answers))


def f1(prediction: str, question: Question, yes_no: bool = True) -> float:
    """Token F1, the best over the answer and its aliases. yes_no=True is the rule of HotpotQA and
    2Wiki: yes, no and noanswer score only if they are equal. False is the rule of MuSiQue: an empty
    side scores 1 if both are empty, else 0."""
    prediction = normalize(prediction)
    return max(pair_f1(prediction, normalize(answer), yes_no) for answer in question.answers)


def pair_f1(prediction: str, gold: str, yes_no: bool) -> float:
    """Token F1 of two normalised texts."""
    if yes_no and prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    ours, theirs = prediction.split(), gold.split()
    if not yes_no and not (ours and theirs):
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def released_match(prediction: str, question: Question) -> float:
    """The released code's exact match: the string equality of its scorer for the MATH data set."""
    return float(strip_string(prediction) in map(strip_string, question.answers))


def strip_string(text: str) -> str:
    """Lower case, and the part of the MATH scorer's LaTeX clean-up that can change words."""
    text = text.lower().replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    for mark in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", "%", " "):
        text = text.replace(mark, "")
    return "0" + text if text.startswith(".") else text


def answered(episode: Episode) -> list[tuple[str, Question]]:
    """The (answer, question) pairs of the questions that got an answer."""
    pairs = zip(episode.answers, episode.task.questions)
    return [pair for pair in pairs if pair[0] is not None]


def tally(episodes: list[Episode]) -> dict[str, float]:
    """Sums over episodes, for `summarize`. The sums of several processes can be added."""
    turns = [turn for episode in episodes for turn in episode.turns]
    operations = [operation for turn in turns for operation in turn.operations]
    executed = Counter(operation.kind for operation in operations if not operation.error)
    return {kind: executed[kind] for kind in TAGS["paper"]} | {
        "episodes": len(episodes),
        "responses": len(turns),
        "questions": sum(len(episode.scores) for episode in episodes),
        "reward": sum(episode.reward for episode in episodes),
        "em": sum(exact_match(*pair) for episode in episodes for pair in answered(episode)),
        "invalid": sum(bool(operation.error) for operation in operations),
        "truncated": sum(turn.response.truncated for turn in turns),
        "tokens": sum(turn.response.tokens for turn in turns),
        "entries": sum(len(episode.memory) for episode in episodes),
    }


def summarize(sums: dict[str, float]) -> dict[str, float]:
    """Means over episodes, questions and responses. docs/guide.md explains each of them."""
    episodes, responses = sums["episodes"], sums["responses"]
    means = {"reward": sums["reward"] / episodes, "em": sums["em"] / sums["questions"]}
    means |= {name: sums[name] / responses for name in (*TAGS["paper"], "invalid", "truncated")}
    means["turns"] = responses / episodes
    return means | {name: sums[name] / episodes for name in ("tokens", "entries")}
