"""Questions made of sentences of a corpus: a number, a name or a thing is asked for with the words
around it.

Nothing is put into the text: whatever it says may be asked, as people ask. The question has the
sentence's words, some of them left out or moved, after a question word that fits what is asked for
(cloze translation, arXiv 1906.04980, with rules alone). Sentences with a word that carries the
meaning of a wording kept for reports are left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imprint.adapters.training.sentence_wordings import names_a_report

Kind = Literal["number", "year", "money", "name", "thing"]

_LEAST_WORDS, _MOST_WORDS = 7, 45
_MOST_BEFORE, _MOST_AFTER = 10, 8
"""Words of a sentence around what is asked for, at most."""
_LEAST_TOLD = 3
"""Words with a meaning that a question has, at least: they tell which sentence it is about."""
_LIKELIER = 3
"""How much likelier a number or a name is asked for than a thing."""
_EDGES = "\"'()[],;:.!?*_"
_NUMBER = re.compile(r"\$?\d[\d,]*(\.\d+)?%?")
_YEAR = re.compile(r"1[0-9]{3}|20[0-9]{2}")
_NAME = re.compile(r"[A-Z][a-z]+[A-Za-z'-]*|[A-Z]{2,6}")
_SMALL_WORD = re.compile(r"[a-z]{4,}")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NUMBER_WORDS = _words(
    "two three four five six seven eight nine ten eleven twelve thirteen fifteen sixteen twenty "
    "thirty forty fifty sixty hundred thousand million"
)
_ARTICLES = _words("a an the his her their its our my this")
_FUNCTION_WORDS = _words(
    "a an the of in on at to for from by with about into over under and or but as than that which "
    "who whom whose this these those it its he she they them his her their him we us our you your "
    "i my me is are was were be been being had has have do does did not no so if then there here "
    "would could should will shall may might must can very more most such any all some when where "
    "while what how because though although upon"
)
_NO_NAMES = _words(
    "I The A An In On At It He She They We You But And Or If When Where What Who Why How This That "
    "These Those There Then For To From By With As Of So Yes No Oh My His Her Their Our Your Its "
    "Mr Mrs Miss Dr St"
)
_PLACE_WORDS = _words("in at from near to into toward towards across through")
_WHOM_WORDS = _words("by with and said asked told called cried replied answered for against")
_ASKING: dict[str, tuple[str, ...]] = {
    "number": ("How many", "How many", "What number", "How much"),
    "year": ("When", "In what year", "In which year", "What year"),
    "money": ("How much", "How much money", "What"),
    "place": ("Where", "Where", "In what place", "What place", "Which place"),
    "person": ("Who", "Who", "Who", "Whom", "What is the name of"),
    "name": ("Who", "What", "Which", "What is the name of", "Where"),
    "thing": ("What", "What", "What", "Which thing"),
}
_AUXILIARIES = ("did", "did", "was", "is", "does", "were", "")


@dataclass(frozen=True, slots=True)
class _Asked:
    """Words `first` ... `last - 1` of a sentence, which are the answer, and what kind of it."""

    first: int
    last: int
    kind: Kind


def cloze(rng: random.Random, sentence: str) -> tuple[str, str] | None:
    """A question and its answer, which stands in the sentence; None where it does not serve."""
    words = sentence.split()
    if not _LEAST_WORDS <= len(words) <= _MOST_WORDS or names_a_report(sentence):
        return None
    if " - " in sentence:  # items of a list
        return None
    bare = [word.strip(_EDGES) for word in words]
    places = _places(words, bare)
    if not places:
        return None
    asked = rng.choice(places)
    before = bare[max(asked.first - _MOST_BEFORE, 0) : asked.first]
    after = bare[asked.last : asked.last + rng.randint(2, _MOST_AFTER)]
    begins = asked.first <= _MOST_BEFORE
    if before and (before[0] in _NO_NAMES or (begins and not _NAME.fullmatch(before[0]))):
        before[0] = before[0].lower()
    told = [w for w in (*before, *after) if w and w.lower() not in _FUNCTION_WORDS]
    if len(told) < _LEAST_TOLD:
        return None
    return _question(rng, asked, before, after), " ".join(bare[asked.first : asked.last])


def _places(words: Sequence[str], bare: Sequence[str]) -> list[_Asked]:
    """Everything in a sentence that can be asked for; numbers and names are likelier."""
    found: list[_Asked] = []
    i = 0
    while i < len(bare):
        word = bare[i]
        if _NUMBER.fullmatch(word):
            kind: Kind = "year" if _YEAR.fullmatch(word) else "number"
            found += _LIKELIER * [_Asked(i, i + 1, "money" if word.startswith("$") else kind)]
        elif word in _NUMBER_WORDS:
            last = i + 1
            while last < len(bare) and _joined(words, last) and bare[last] in _NUMBER_WORDS:
                last += 1
            found += _LIKELIER * [_Asked(i, last, "number")]
            i = last - 1
        elif _is_name(word):
            last = i + 1
            while last < min(len(bare), i + 4) and _joined(words, last) and _is_name(bare[last]):
                last += 1
            if i or last > 1:  # the first word of a sentence is mostly no name
                found += _LIKELIER * [_Asked(i, last, "name")]
            i = last - 1
        elif i + 1 < len(bare) and word.lower() in _ARTICLES and _joined(words, i + 1):
            last = _end_of_thing(words, bare, i + 1)
            if last > i + 1:
                found.append(_Asked(i + 1, last, "thing"))
                i = last - 1
        i += 1
    return found


def _is_name(word: str) -> bool:
    return bool(_NAME.fullmatch(word)) and word not in _NO_NAMES


def _joined(words: Sequence[str], i: int) -> bool:
    """Whether no mark stands between a word and the one before it."""
    return words[i - 1][-1] not in ",;:.!?)\"'" and words[i][0] not in "(\"'"


def _end_of_thing(words: Sequence[str], bare: Sequence[str], first: int) -> int:
    """Behind the small words of a thing: one or two, until a function word or a mark."""
    last = first
    while last < min(len(bare), first + 2):
        if not _SMALL_WORD.fullmatch(bare[last]) or bare[last] in _FUNCTION_WORDS:
            break
        if last > first and not _joined(words, last):
            break
        last += 1
    ends = last == len(bare) or bare[last].lower() in _FUNCTION_WORDS or not _joined(words, last)
    return last if ends else first


def _question(
    rng: random.Random, asked: _Asked, before: Sequence[str], after: Sequence[str]
) -> str:
    asking = rng.choice(_ASKING[_manner(asked, before, after)])
    after = list(after)
    counted: list[str] = []
    if asked.kind == "number" and asking in ("How many", "How much") and after:
        num = 2 if len(after) > 1 and after[1].endswith("s") and rng.random() < 0.7 else 1
        counted, after = after[:num], after[num:]
    before = list(before)
    draw = rng.random()
    if draw < 0.25:  # what tells the sentence from others, and nothing else
        near = [w for w in (*before[-6:], *after[:5]) if w.lower() not in _FUNCTION_WORDS]
        body = [*counted, *near]
    elif not before or draw < 0.35:
        body = [*counted, *after, *before]
    else:
        auxiliary = rng.choice(_AUXILIARIES)
        if auxiliary in ("did", "does"):
            before = _unbent(before, auxiliary)
        body = [*counted, auxiliary, *before, *(after if rng.random() < 0.7 else after[:2])]
    if rng.random() < 0.4:
        body = [w for w in body if rng.random() >= (0.5 if w.lower() in _FUNCTION_WORDS else 0.1)]
    if rng.random() < 0.15:  # neighbours change places
        order = sorted(range(len(body)), key=lambda i: i + 3 * rng.random())
        body = [body[i] for i in order]
    return " ".join(filter(None, [asking, *body])).rstrip(_EDGES + " ") + "?"


def _manner(asked: _Asked, before: Sequence[str], after: Sequence[str]) -> str:
    """Which question words fit."""
    if asked.kind != "name":
        return asked.kind
    last = before[-1].lower() if before else ""
    if last in _PLACE_WORDS:
        return "place"
    if last in _WHOM_WORDS or not before or (after and after[0].lower() in _WHOM_WORDS):
        return "person"
    return "name"


def _unbent(words: Sequence[str], auxiliary: str) -> list[str]:
    """The verbs behind an auxiliary as they stand in a dictionary, roughly."""
    ending = "ed" if auxiliary == "did" else "s"
    places = [
        i
        for i, word in enumerate(words)
        if word.endswith(ending) and len(word) > 4 and word.islower() and word[-2:] != "ss"
    ]
    bent = list(words)
    if places:
        bent[places[-1]] = bent[places[-1]].removesuffix(ending)
    return bent
