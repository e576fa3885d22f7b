"""Variable tracking after RULER (arXiv 2404.06654): one chain of assignments hidden in noise.

Written from the task's description. Unlike RULER, the start of the answer ends without a space
(tokenizers put it in front of the name), every document is filled up on its own, and where the
whole is short the demonstration before it takes a quarter at most, so that there is a text to read.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

NUM_HOPS = 4

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_QUESTION = "Find all variables that are assigned the value {value} in the text above."
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num} variables are assigned the value {value}, they are:"
)
_DEMONSTRATION_TOKENS = 500
_LETTERS, _DEMONSTRATION_LETTERS = 5, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingSample:
    """One document with its question."""

    document: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    """The names of the chain's variables, in its order."""

    @property
    def query(self) -> str:
        """What follows the document in the prompt."""
        return f"\nQuestion: {self.question}{self.answer_prefix}"


def build_tracking(
    *,
    length: int,
    num_tokens: Callable[[str], int],
    seed: int,
    num_answer_tokens: int = 30,
    num_hops: int = NUM_HOPS,
) -> TrackingSample:
    """One sample whose document, query and `num_answer_tokens` just fit into `length` tokens.

    A demonstration with its answer stands before it. The same arguments give the same sample.
    Raises `ValueError` when the chain and the question alone are longer.
    """
    rng = random.Random(f"vt:{length}:{seed}")
    most = min(_DEMONSTRATION_TOKENS, length // 4)
    shown = _sample(rng, _DEMONSTRATION_LETTERS, num_hops)
    answered = f"{shown.query} {' '.join(shown.names)}\n\n"
    before = shown.fill("", num_tokens, most - num_tokens(answered), shortest=True) + answered
    asked = _sample(rng, _LETTERS, num_hops)
    room = length - num_answer_tokens - num_tokens(asked.query)
    return TrackingSample(
        document=asked.fill(before, num_tokens, room),
        question=asked.question,
        answer_prefix=asked.prefix,
        answers=tuple(asked.names),
    )


@dataclass(frozen=True, slots=True)
class _Chain:
    rng: random.Random
    names: list[str]
    value: str

    @property
    def question(self) -> str:
        return _QUESTION.format(value=self.value)

    @property
    def prefix(self) -> str:
        return _PREFIX.format(num=len(self.names), value=self.value)

    @property
    def query(self) -> str:
        return f"\nQuestion: {self.question}{self.prefix}"

    def fill(
        self, before: str, num_tokens: Callable[[str], int], room: int, *, shortest: bool = False
    ) -> str:
        """Noise with the chain in it, as many lines as fit; with `shortest`, none if none does."""
        seed = self.rng.random()
        num_lines = max(0, room - num_tokens(before)) // num_tokens(f"{_NOISE}\n")
        while True:
            text = f"{before}{_HEAD}{self._context(random.Random(seed), num_lines)}"
            excess = num_tokens(text) - room
            if excess <= 0 or (shortest and num_lines == 0):
                return text
            if num_lines == 0:
                raise ValueError(f"the chain and its question are {excess} tokens too long")
            num_lines -= 1

    def _context(self, rng: random.Random, num_lines: int) -> str:
        statements = [f"VAR {self.names[0]} = {self.value}"] + [
            f"VAR {name} = VAR {before} "
            for before, name in zip(self.names, self.names[1:], strict=False)
        ]
        places = sorted(rng.randint(0, num_lines) for _ in statements)
        lines = [_NOISE] * num_lines
        for statement, place in reversed(list(zip(statements, places, strict=True))):
            lines.insert(place, statement)
        return "\n".join(lines).replace(". \n", ".\n")


def _sample(rng: random.Random, num_letters: int, num_hops: int) -> _Chain:
    names: dict[str, None] = {}
    while len(names) <= num_hops:
        names["".join(rng.choices(string.ascii_uppercase, k=num_letters))] = None
    return _Chain(rng, list(names), str(rng.randint(10_000, 99_998)))
