"""How LongBench (arXiv 2308.14508) cuts and scores answers, task by task. Pure functions of text.

Question answering is scored by `squad.py`, summaries by `rouge.py`; the rest is here. After the
scoring of the published REFINE evaluation, except that references which hold a "|" stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Final

QUESTION_TYPES: Final = (
    "Abbreviation", "Animal", "City", "Color", "Country", "Currency name", "Date",
    "Definition of something", "Description of a person", "Description of something",
    "Disease and medicine", "Distance, linear measure", "Element and substance",
    "Equivalent term", "Event", "Expression abbreviated", "Food",
    "Group or organization of person", "Individual", "Invention, book and other creative piece",
    "Language", "Lasting time of somethin", "Letter like a-z", "Manner of an action", "Mountain",
    "Musical instrument", "Number of something", "Order, rank", "Organ of body", "Other entity",
    "Other location", "Other number", "Percent, fraction", "Plant", "Postcode or other code",
    "Price", "Product", "Reason", "Religion", "Size, area and volume", "Speed", "Sport", "State",
    "Symbols and sign", "Techniques and method", "Temperature", "Title of a person", "Vehicle",
    "Weight", "Word with a special property",
)  # fmt: skip
"""The classes of `trec`, spelled as in LongBench."""

_COMMENT_MARKS = ("`", "#", "//")


def whole(response: str) -> str:
    """The response as it is: summaries and code."""
    return response


def first_line(response: str) -> str:
    """What stands before the first line break; nothing where the response begins with one."""
    return response.split("\n")[0]


def first_full_line(response: str) -> str:
    """The first line after line breaks at the start: few-shot tasks."""
    return response.lstrip("\n").split("\n")[0]


def class_score(response: str, answers: Sequence[str]) -> float:
    """1 / the number of classes named in the response if the right one is among them, else 0.

    Names are looked for as they are spelled. (The published script sets names aside that are a part
    of the right one; there are none among these.)
    """
    named = [name for name in QUESTION_TYPES if name in response]
    return 1 / len(named) if any(answer in named for answer in answers) else 0.0


def edit_similarity(response: str, answers: Sequence[str]) -> float:
    """Likeness of a line of code, 0 to 1 in hundredths; the best over the answers.

    Taken is the first line without comment marks, or the whole response if there is none. The
    likeness is 2 M / T, with M matching characters of T (difflib), as `fuzzywuzzy` computes it
    where python-Levenshtein is not installed; 0 where either text is empty.
    """
    lines = response.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in _COMMENT_MARKS))
    line = next(code, response)
    return max((_likeness(line, answer) for answer in answers), default=0.0)


def _likeness(line: str, answer: str) -> float:
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100
