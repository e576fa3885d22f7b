"""Wordings cut from sentences of a corpus: how people write has no list.

A key and a value take the place of two words of a sentence, and the sentence's own words ask for
the value. What stands around the two then reads like any other text, goes on in any way, and hardly
ever comes twice: a model that answers these answers in wordings that it has not seen. Sentences
with a word that carries the meaning of a wording kept for reports are left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from imprint.adapters.evaluation.wordings import HELD_OUT, Wording


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LEAST_WORDS, _MOST_WORDS = 7, 32
_MOST_BEFORE, _MOST_BETWEEN, _MOST_AFTER = 8, 6, 10
"""Words of a sentence around key and value, at most."""
_TRIES = 20
_LEADING = _words(
    "a an the of in on at to for from by with about is are was were be had has have than as my his "
    "her our their its that called named under over into and or"
)
"""Words after which a name or a number can stand."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z',;-]*")
_WORD = re.compile(r"[a-z]{4,}")
_COMMON = _words("asked called were what which away give found many")
_ASKING = ("What", "What", "Which number", "Which", "How many", "What number", "When", "Who")
_ANY_QUESTION = (
    "What does the text say about {query}?",
    "What goes with {query}?",
    "Which number belongs to {query}?",
    "What is said of {query}?",
    "Find {query}. What is its number?",
)
_ANY_PREFIX = (" Answer:", " Answer:", " The answer is", " It is", " For {query}:", " {query}:", "")


def _meanings() -> frozenset[str]:
    texts = [
        text
        for wording in HELD_OUT
        for text in (wording.needle, wording.question, wording.question_many, wording.prefix)
    ]
    return frozenset(word for text in texts for word in _WORD.findall(text.lower())) - _COMMON


KEPT_FOR_REPORTS = _meanings()
"""Words of four letters or more of the wordings for reports, without those that say nothing."""


def names_a_report(text: str) -> bool:
    """Whether one of `KEPT_FOR_REPORTS` is in it."""
    return not KEPT_FOR_REPORTS.isdisjoint(_WORD.findall(text.lower()))


def cut(rng: random.Random, sentences: Sequence[str]) -> Wording | None:
    """A wording out of one of the sentences; None where none of them serves."""
    for _ in range(_TRIES):
        words = rng.choice(sentences).rstrip(".!?").split()
        usable = _LEAST_WORDS <= len(words) <= _MOST_WORDS and all(map(_PLAIN.fullmatch, words))
        if usable and not names_a_report(" ".join(words)):
            return _around(rng, words)
    return None


def _around(rng: random.Random, words: list[str]) -> Wording:
    """Key and value for two of the words, another between them; and how they are asked for."""
    slots = [i for i, word in enumerate(["of", *words[:-1]]) if word.lower() in _LEADING]
    first = _drawn(rng, slots, 0, min(_MOST_BEFORE, len(words) - 3))
    second = _drawn(rng, slots, first + 2, min(first + 1 + _MOST_BETWEEN, len(words) - 1))
    before, between = words[:first], words[first + 1 : second]
    after = words[second + 1 : second + 1 + rng.randint(0, _MOST_AFTER)]
    asked_before = [before[0][0].lower() + before[0][1:], *before[1:]] if before else []
    start, link, end = (" ".join(part) for part in (asked_before, between, after))
    key_first = rng.random() < 0.65
    parts = ["{key}", link, "{value}"] if key_first else ["{value}", link, "{key}"]
    needle = " ".join(filter(None, [" ".join(before), *parts, end])).rstrip(",;") + "."
    question = _question(rng, start, link, end, key_first=key_first)
    prefix = _prefix(rng, before, between, key_first=key_first)
    return Wording(
        name="sentence",
        needle=needle,
        question=question,
        question_many=question,
        prefix=prefix,
        prefix_many=prefix,
    )


def _drawn(rng: random.Random, slots: Sequence[int], low: int, high: int) -> int:
    """A place from `low` to `high`: mostly one where a name or a number could stand."""
    likely = [slot for slot in slots if low <= slot <= high]
    return rng.choice(likely) if likely and rng.random() < 0.85 else rng.randint(low, high)


def _question(rng: random.Random, start: str, link: str, end: str, *, key_first: bool) -> str:
    if rng.random() < 0.25:
        return rng.choice(_ANY_QUESTION)
    asking = rng.choice(_ASKING)
    ending = end if rng.random() < 0.5 else ""
    if key_first:
        parts = [asking, start if rng.random() < 0.7 else "", "{query}", link, ending]
    else:
        parts = [asking, link, "{query}", start if rng.random() < 0.4 else ending]
    return " ".join(filter(None, parts)).rstrip(",;") + "?"


def _prefix(
    rng: random.Random, before: Sequence[str], between: Sequence[str], *, key_first: bool
) -> str:
    """The sentence again up to its value, where that names the key; the word before the value; or
    what begins any answer."""
    draw = rng.random()
    if draw < 0.3:
        return rng.choice(_ANY_PREFIX)
    last_words = [*before, "{query}", *between] if key_first else list(before)
    if draw < 0.5 or not key_first:
        shown = last_words[-rng.randint(1, 2) :] if last_words else []
        shown = [word for word in shown if word != "{query}"]
        return " " + " ".join(["Answer:", *shown])
    if draw < 0.65:  # what stood before the key is left out
        last_words = last_words[len(before) :]
    return " " + " ".join(last_words)
