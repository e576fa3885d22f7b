"""Scores by hand, at their edges."""

from __future__ import annotations

import pytest

from imprint.adapters.evaluation.scoring import clean_prediction, exact_match, string_match_all


@pytest.mark.parametrize(
    ("prediction", "answers", "match_all", "exact"),
    [
        (" 1234567.", ["1234567"], 1.0, 1.0),
        ("1234567 and 7654321", ["7654321"], 1.0, 0.0),  # the right one comes second
        ("12345678", ["1234567"], 1.0, 0.0),  # only inside a longer number
        ("", ["1234567"], 0.0, 0.0),
        (" 222, 111, and 333.", ["111", "222", "333"], 1.0, 1.0),
        (" 111, 999, and 333", ["111", "222", "333"], 2 / 3, 0.0),
        (" 111 and 111 and 222", ["111", "222"], 1.0, 0.0),
    ],
)
def test_scores(prediction, answers, match_all, exact):
    assert string_match_all(prediction, answers) == pytest.approx(match_all)
    assert exact_match(prediction, answers) == exact


def test_cleaning_strips_and_turns_control_characters_into_newlines():
    assert clean_prediction("\t one\x00two \n") == "one\ntwo"
    assert string_match_all("The ANSWER", ["answer"]) == 1.0
