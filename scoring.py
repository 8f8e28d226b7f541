"""How answers are scored, and what is counted over episodes.

EM and F1 are those of the official scorers of HotpotQA, 2WikiMultihopQA and MuSiQue; the released AtomMem code scores in another
way, and a language model can judge (--judge).
"""

import re
import string
from collections import Counter

from agent import TAGS


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


class Judge:
    """A language model behind a server that says whether answers are right."""

    QUESTION = ("Question: {question}\nReference answers, each of them right: {gold}\nAnswer to be judged: {answer}\n\nDoes the answer "
                "to be judged mean the same as one of the reference answers? Reply with yes or no alone.")

    def __init__(self, endpoint):
        self.endpoint, self.unclear = endpoint, 0  # `unclear`: verdicts that were neither yes nor no, and so count as no
        endpoint.complete([[{"role": "user", "content": "Reply with yes."}]], max_tokens=512, temperature=0.0)  # is it there?

    def __call__(self, episodes):
        """[the score of each answer] of each episode: 1.0 for right, 0.0 for wrong and for no answer."""
        verdicts = self.endpoint.complete(
            [[{"role": "user", "content": self.QUESTION.format(question=question.text, gold=" / ".join(question.answers), answer=answer)}]
             for episode in episodes for answer, question in episode.answered], max_tokens=512, temperature=0.0)
        words = [re.sub(r"\W", " ", verdict.text.lower()).split()[:1] for verdict in verdicts]
        self.unclear += sum(word not in (["yes"], ["no"]) for word in words)
        right = iter(words)
        return [[float(answer is not None and next(right) == ["yes"]) for answer in episode.answers] for episode in episodes]


# --- counts over episodes ------------------------------------------------------------------------------------------


def tally(episodes):
    """Sums over episodes, which may be added up with those of other processes, for `summarize`."""
    turns = [turn for episode in episodes for turn in episode.turns]
    operations = [operation for turn in turns for operation in turn.operations]
    sums = {kind: sum(o.kind == kind and not o.error for o in operations) for kind in TAGS["paper"]}
    return sums | {
        "episodes": len(episodes), "responses": len(turns), "reward": sum(episode.reward for episode in episodes),
        "questions": sum(len(episode.scores) for episode in episodes), "em": sum(sum(episode.scores) for episode in episodes),
        "invalid": sum(bool(o.error) for o in operations), "truncated": sum(turn.response.truncated for turn in turns),
        "tokens": sum(turn.response.tokens for turn in turns), "entries": sum(len(episode.memory) for episode in episodes),
    }


def summarize(sums):
    """Means over episodes, questions and responses; the README's glossary says what each one means."""
    episodes, responses = sums["episodes"], sums["responses"]
    return {"reward": sums["reward"] / episodes, "em": sums["em"] / sums["questions"],
            **{name: sums[name] / responses for name in (*TAGS["paper"], "invalid", "truncated")},
            "turns": responses / episodes, "tokens": sums["tokens"] / episodes, "entries": sums["entries"] / episodes}
