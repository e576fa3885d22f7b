"""Wordings of the grammar: whole, varied, and apart from those kept for reports."""

import random
import re

from imprint.adapters.evaluation.wordings import HELD_OUT, Wording
from imprint.adapters.training.phrases import phrase

COMMON = """
    the for key was set to value on list and it which how many did what were give all by answer
    in is are find found query called
"""


def words(wording: Wording) -> set[str]:
    texts = [wording.needle, wording.question, wording.question_many]
    texts += [wording.prefix, wording.prefix_many]
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def drawn(number: int) -> list[Wording]:
    return [phrase(random.Random(seed)) for seed in range(number)]


def test_every_wording_hides_a_value_under_a_key_and_asks_for_the_key() -> None:
    for wording in drawn(500):
        needle = wording.needle.format(key="brave-fox", value="1234567")
        assert "brave-fox" in needle
        assert "1234567" in needle
        assert needle.endswith(".")
        assert "<" not in needle + wording.question + wording.question_many + wording.prefix
        for question in (wording.question, wording.question_many):
            assert "brave-fox" in question.format(query="brave-fox")
        for prefix in (wording.prefix, wording.prefix_many):
            assert not prefix or (prefix.startswith(" ") and not prefix.endswith(" "))


def test_wordings_hardly_ever_come_again() -> None:
    assert len({(w.needle, w.question, w.prefix) for w in drawn(1000)}) > 990


def test_words_of_the_reported_wordings_do_not_occur() -> None:
    reported = set().union(*map(words, HELD_OUT)) - set(COMMON.split())
    assert {"vault", "passenger", "astronomers"} <= reported
    for wording in drawn(2000):
        assert not reported & words(wording), wording
