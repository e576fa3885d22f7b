"""Practice in reading: questions about passages among other passages, and chains of variables.

Texts only; `tasks.py` turns them into tokens and loss weights. Questions come from a file of the
user's, never from the parts of it that reports are made of.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from imprint.adapters.evaluation.question_files import FileQuestion
from imprint.adapters.evaluation.tracking import build_tracking

_MOST_ANSWER_CHARS = 60
_MISSES = 8  # passages too long for what is left before a document counts as full
_OPINIONS = ("yes", "no", "maybe")
_HEADS = ("Document {number}:\n", "Passage {number}\n", "", "")


@dataclass(frozen=True, slots=True)
class Asked:
    """A document and what is asked about it: pairs of a question and its answer."""

    document: str
    questions: list[tuple[str, str]]


class Passages:
    """Passages with short answers that stand in them; each other's distractors."""

    def __init__(self, questions: Sequence[FileQuestion], *, most_chars: int = 3000) -> None:
        """Passages of more than `most_chars` characters are left out, and longer answers."""
        self._asked: dict[str, list[tuple[str, str]]] = {}
        for item in questions:
            context = item.context.lower()
            answers = [a for a in item.answers if a.lower() in context]
            # yes and no stand in many passages by chance
            answers = [a for a in answers if a.lower() not in _OPINIONS]
            if answers and len(item.context) <= most_chars:
                answer = min(answers, key=len)
                if len(answer) <= _MOST_ANSWER_CHARS and "\n" not in answer:
                    pairs = self._asked.setdefault(item.context, [])
                    pairs.append((item.question.strip(), answer))
        if not self._asked:
            raise ValueError("no question has a short answer that stands in its passage")
        self._contexts = list(self._asked)

    def draw(self, rng: random.Random, num_tokens: Callable[[str], int], room: int) -> Asked | None:
        """Passages of at most `room` tokens and all their questions, shuffled; None without any."""
        chosen: list[str] = []
        misses = 0
        most = rng.randint(1, 12)
        while misses < _MISSES and len(chosen) < most:
            context = rng.choice(self._contexts)
            pairs = self._asked[context]
            size = num_tokens(context) + 8
            size += sum(num_tokens(question) + num_tokens(answer) + 8 for question, answer in pairs)
            if size > room or context in chosen:
                misses += 1
                continue
            chosen.append(context)
            room -= size
        if not chosen:
            return None
        head = rng.choice(_HEADS)
        texts = [head.format(number=i) + context for i, context in enumerate(chosen, 1)]
        questions = [pair for context in chosen for pair in self._asked[context]]
        rng.shuffle(questions)
        return Asked("\n\n".join(texts), questions)


class Excerpts:
    """Parts of passages that are too long for `Passages`, with the questions that are answered
    in them: those whose answer stands in the whole passage once."""

    def __init__(self, questions: Sequence[FileQuestion], *, least_chars: int = 3000) -> None:
        """Passages of up to `least_chars` characters are left out."""
        self._asked: dict[str, list[tuple[int, str, str]]] = {}
        for item in questions:
            if len(item.context) <= least_chars:
                continue
            context = item.context.lower()
            answers = [a for a in item.answers if context.count(a.lower()) == 1]
            answers = [a for a in answers if len(a) <= _MOST_ANSWER_CHARS and "\n" not in a]
            if answers:
                answer = min(answers, key=len)
                place = context.index(answer.lower())
                pairs = self._asked.setdefault(item.context, [])
                pairs.append((place, item.question.strip(), answer))
        self._contexts = list(self._asked)

    def __bool__(self) -> bool:
        return bool(self._contexts)

    def draw(self, rng: random.Random, num_chars: int) -> Asked:
        """About `num_chars` characters, which begin and end between words, and the questions that
        they answer, shuffled."""
        context = rng.choice(self._contexts)
        middle, _, _ = rng.choice(self._asked[context])
        start = max(min(middle - rng.randint(0, num_chars), len(context) - num_chars), 0)
        start = context.find(" ", start) + 1 if start else 0
        stop = context.rfind(" ", start, start + num_chars)
        stop = len(context) if start + num_chars >= len(context) or stop < 0 else stop
        held = [
            (question, answer)
            for place, question, answer in self._asked[context]
            if start <= place and place + len(answer) <= stop
        ]
        rng.shuffle(held)
        return Asked(context[start:stop], held)


def chain(rng: random.Random, num_tokens: Callable[[str], int], length: int) -> tuple[str, str]:
    """A chain of variables as RULER hides it, with the start of its answer; and that answer."""
    sample = build_tracking(
        length=length,
        num_tokens=num_tokens,
        seed=rng.randrange(10**9, 10**12),  # reports use small seeds
        num_answer_tokens=40,
        num_hops=rng.randint(1, 4),
    )
    return sample.document + sample.query, f" {' '.join(sample.answers)}"


def short_chain(rng: random.Random, prose: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """A few assignments with little between them, and for each value the names that hold it."""
    letters = rng.randint(1, 5)
    names: list[str] = []
    while len(names) < 10:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    lines: list[str] = []
    questions: list[tuple[str, str]] = []
    chains: list[list[str]] = []
    while names and len(chains) < 3:
        num = rng.randint(1, 5)
        held, names = names[:num], names[num:]
        value = str(rng.randint(10_000, 99_998))
        statements = [f"VAR {held[0]} = {value}"]
        statements += [f"VAR {b} = VAR {a}" for a, b in pairwise(held)]
        chains.append(statements)
        questions.append(
            (
                f"Find all variables that are assigned the value {value} in the text above.",
                " ".join(held),
            )
        )
        if rng.random() < 0.4:
            break
    while any(chains):
        statements = rng.choice([statements for statements in chains if statements])
        lines.append(statements.pop(0))
        if prose and rng.random() < 0.3:
            lines.append(rng.choice(prose))
    rng.shuffle(questions)
    return "\n".join(lines), questions
