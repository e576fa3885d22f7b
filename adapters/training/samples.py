"""One training sample: tokens, and how much the prediction of each of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PROSE_WEIGHT = 0.04
"""Mean loss weight of a token that is neither an answer nor a repeat."""
FIRST_WEIGHT = 4.0
"""Loss weight of the first characters of an answer."""


@dataclass(slots=True)
class Sample:
    """Token ids and their loss weights, the same number of each."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, tokens: list[int], weight: float) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)

    def add_answer(self, parts: Sequence[list[int]]) -> None:
        """The values of an answer in turn, each with the space before it and what comes between.

        A value's first characters tell whose value it is: the later ones follow from them.
        """
        for number, part in enumerate(parts):
            num_first = 3 if number == 0 else 5  # a comma more, and "and"
            self.add(part[:num_first], FIRST_WEIGHT)
            self.add(part[num_first:], 1.0)

    def cut(self, length: int) -> Sample:
        return Sample(self.tokens[:length], self.weights[:length])
