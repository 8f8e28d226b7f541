import json

import pytest
from conftest import DATA

from agent import unbox
from scoring import exact_match, f1, normalize, released_match
from tasks import Question


def test_scores_equal_the_official_ones():
    """Bug: punctuation replaced by a space, articles dropped too early, yes / no partly right, MuSiQue's empty side."""
    vectors = json.loads((DATA / "scoring_vectors.json").read_text())
    for pair in vectors["pairs"]:
        question = Question("", (pair["gold"],))
        assert normalize(pair["prediction"]) == pair["normal_pred"] and normalize(pair["gold"]) == pair["normal_gold"]
        assert exact_match(pair["prediction"], question) == pair["em"] == pair["musique_em"]
        assert f1(pair["prediction"], question) == pytest.approx(pair["hotpot_2wiki_f1"], abs=1e-5)
        assert f1(pair["prediction"], question, yes_no=False) == pytest.approx(pair["musique_f1"], abs=1e-5)
    for case in vectors["alias_cases"]:
        question = Question("", tuple(case["golds"]))
        assert exact_match(case["prediction"], question) == case["musique_em"]
        assert f1(case["prediction"], question) == case["2wiki_v1.1"]["f1"]


def test_released_scorer():
    """Bug: --scorer released is not the string equality of the released code."""
    for case in json.loads((DATA / "scoring_vectors.json").read_text())["atommem_boxed"]:
        assert released_match(unbox(case["text"]), Question("", tuple(case["golds"]))) == case["score"], case
