"""How RULER's answers are scored, and what a task's scoring is. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+")
_VARIABLE = re.compile(r"[A-Za-z]+")

Metric = Callable[[str, Sequence[str]], float]
"""A score from 0 to 1 of a prediction against its references."""


def _as_it_is(response: str) -> str:
    return response


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a task's answers are scored."""

    metrics: Mapping[str, Metric]
    """By name; arms are compared by the first one unless another is asked for."""
    cut: Callable[[str], str] = _as_it_is
    """What of the response is scored."""

    def scores(self, response: str, answers: Sequence[str]) -> dict[str, float]:
        """Every metric's score."""
        prediction = self.cut(response)
        return {name: metric(prediction, answers) for name, metric in self.metrics.items()}


def clean_prediction(text: str) -> str:
    """RULER's post-processing: strip, control characters become newlines, strip."""
    return _CONTROL.sub("\n", text.strip()).strip()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, ignoring case (RULER, all but qa)."""
    text = clean_prediction(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 if any of the answers occurs in the prediction, ignoring case (RULER's qa)."""
    text = clean_prediction(prediction).lower()
    return float(any(answer.lower() in text for answer in answers))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first numbers of the prediction are the answers, all of them and in any order.

    Whole numbers are compared: an answer inside a longer run of digits does not count, and neither
    does one that follows a wrong number. The answers must be numbers.
    """
    return _same(_NUMBER.findall(prediction), answers)


def exact_variables(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first words of the prediction are the answers, all of them and in any order."""
    return _same(_VARIABLE.findall(prediction), answers)


def _same(given: Sequence[str], answers: Sequence[str]) -> float:
    return float(sorted(given[: len(answers)]) == sorted(answers))
