"""Wordings cut from sentences: whole, varied, and apart from those kept for reports."""

from __future__ import annotations

import random
import re

import pytest

from imprint.adapters.evaluation.wordings import HELD_OUT, Wording
from imprint.adapters.training.sentence_wordings import KEPT_FOR_REPORTS, cut

SENTENCES = [
    "The old mill by the river was sold to a man from the north, who never came to see it.",
    "In the spring the two brothers walked to the village and carried the lanterns with them.",
    "Nobody at the office could remember which of the ships had been built for the new company.",
]


def drawn(number: int) -> list[Wording]:
    wordings = [cut(random.Random(seed), SENTENCES) for seed in range(number)]
    return [wording for wording in wordings if wording is not None]


def test_every_wording_hides_a_value_under_a_key_and_asks_for_the_key() -> None:
    wordings = drawn(500)
    assert len(wordings) == 500
    for wording in wordings:
        needle = wording.needle.format(key="brave-fox", value="1234567")
        assert needle.count("brave-fox") == needle.count("1234567") == 1
        assert re.search(r"[^ ,;]\.$", needle)
        assert "  " not in needle + wording.question + wording.prefix
        assert "brave-fox" in wording.question.format(query="brave-fox")
        assert not wording.prefix or wording.prefix == " " + wording.prefix.strip()


def test_a_sentence_is_cut_in_many_ways() -> None:
    assert len({(w.needle, w.question, w.prefix) for w in drawn(1000)}) > 900


def test_some_answers_begin_with_the_sentence_up_to_the_value() -> None:
    repeated = 0
    for wording in drawn(300):
        before, value, _ = wording.needle.partition("{value}")
        repeated += wording.prefix.strip() == before.strip().replace("{key}", "{query}")
        assert value
    assert 60 < repeated < 200


def test_words_of_the_reported_wordings_do_not_occur() -> None:
    assert {"vault", "combination", "passenger", "ticket", "astronomers"} <= KEPT_FOR_REPORTS
    reported = [wording.needle.format(key="a", value="b") for wording in HELD_OUT]
    assert cut(random.Random(0), reported) is None
    for seed in range(200):
        wording = cut(random.Random(seed), [*reported, *SENTENCES])
        if wording is not None:
            assert not KEPT_FOR_REPORTS & set(
                re.findall(r"\w+", wording.needle.format(key="k", value="v").lower())
            )


@pytest.mark.parametrize(
    "sentence", ["Too few words here.", "It cost {many} dollars (or 12) by the end of the year."]
)
def test_what_does_not_serve_is_passed_over(sentence: str) -> None:
    assert cut(random.Random(0), [sentence]) is None
