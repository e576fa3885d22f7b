"""Passages of a document for a question, by BM25: the yardstick that adapting is measured against.

Knows tokens and words; reads no model. Passages overlap by half when they are scored; those that
are handed out do not overlap and stand in the document's order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalConfig:
    """Which passages are retrieved."""

    passage_tokens: int = 64
    """Tokens of a passage."""
    num_passages: int = 4
    """Passages a question gets, where it gets several."""

    def __post_init__(self) -> None:
        if self.passage_tokens < 2:
            raise ValueError(f"passage_tokens must be at least 2, got {self.passage_tokens}")
        if self.num_passages < 1:
            raise ValueError(f"num_passages must be at least 1, got {self.num_passages}")


class PassageIndex:
    """The passages of one document."""

    def __init__(
        self,
        tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        config: RetrievalConfig,
    ) -> None:
        size = config.passage_tokens
        self._size = size
        self._tokens = list(tokens)
        self._starts = range(0, max(len(self._tokens) - size // 2, 1), size // 2)
        self._words = [Counter(_words(decode(self._passage(start)))) for start in self._starts]
        self._frequency = Counter(word for words in self._words for word in words)
        self._mean = sum(words.total() for words in self._words) / len(self._words)

    def _passage(self, start: int) -> list[int]:
        return self._tokens[start : start + self._size]

    def best(self, question: str, num: int) -> list[list[int]]:
        """The `num` best passages (fewer if the document has no more), in the document's order.

        Ties go to what stands first.
        """
        scores = self.scores(question)
        chosen: list[int] = []
        for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
            start = self._starts[index]
            if all(abs(start - other) >= self._size for other in chosen):
                chosen.append(start)
            if len(chosen) == num:
                break
        return [self._passage(start) for start in sorted(chosen)]

    def scores(self, question: str) -> list[float]:
        """BM25 of every passage (Robertson and Zaragoza 2009), k1 = 1.2, b = 0.75.

        A passage's score is the sum over the question's words of idf * tf * (k1 + 1) /
        (tf + k1 * (1 - b + b * words / mean words)), idf = log(1 + (N - n + 0.5) / (n + 0.5)).
        """
        num = len(self._words)
        idf = {
            word: math.log(1 + (num - count + 0.5) / (count + 0.5))
            for word in set(_words(question))
            if (count := self._frequency[word])
        }
        return [self._score(words, idf) for words in self._words]

    def _score(self, words: Counter[str], idf: dict[str, float]) -> float:
        share = words.total() / self._mean if self._mean else 0.0
        damping = _K1 * (1 - _B + _B * share)
        return sum(
            weight * words[word] * (_K1 + 1) / (words[word] + damping)
            for word, weight in sorted(idf.items())
        )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
