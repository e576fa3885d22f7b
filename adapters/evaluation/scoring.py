"""How an answer is scored against its references. Pure functions of text; knows no tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+")


def clean_prediction(text: str) -> str:
    """RULER's post-processing: strip, control characters become newlines, strip."""
    return _CONTROL.sub("\n", text.strip()).strip()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, ignoring case (RULER's needle score)."""
    text = clean_prediction(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first numbers of the prediction are the answers, all of them and in any order.

    Whole numbers are compared: an answer inside a longer run of digits does not count, and neither
    does one that follows a wrong number. The answers must be numbers.
    """
    given = _NUMBER.findall(prediction)[: len(answers)]
    return float(sorted(given) == sorted(answers))
