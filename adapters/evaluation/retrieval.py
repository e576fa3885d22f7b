"""Passages of a document for a question, by BM25: the yardstick that adapting is measured against.

Knows tokens and words; reads no model. Passages begin every quarter of their length when they are
scored; those that are handed out do not overlap and stand in the document's order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_WORD = re.compile(r"\w+")
_K1 = 1.2


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
        self._size = config.passage_tokens
        self._tokens = list(tokens)
        stride = max(self._size // 4, 1)
        last = max(len(self._tokens) - self._size, 0)
        self._starts = [*range(0, last, stride), last]
        quarter = self._size // 4
        self._terms = [self._count(decode, start, 0) for start in self._starts]
        self._middles = [self._count(decode, start, quarter) for start in self._starts]
        # how rare a term is, is counted in pieces that share nothing: what stands near an end of
        # the document lies in fewer passages, but is no rarer for it
        pieces = range(0, len(self._tokens), self._size)
        self._num_pieces = len(pieces)
        self._frequency = Counter(
            term for start in pieces for term in self._count(decode, start, 0)
        )

    def _passage(self, start: int, margin: int = 0) -> list[int]:
        return self._tokens[start + margin : start + self._size - margin]

    def _count(
        self, decode: Callable[[Sequence[int]], str], start: int, margin: int
    ) -> Counter[str]:
        return Counter(_terms(decode(self._passage(start, margin))))

    def best(self, question: str, num: int) -> list[list[int]]:
        """The `num` best passages (fewer if the document has no more), in the document's order.

        Ranked by their score and that of their middle half together: what is asked for shall not
        stand at an edge, where its sentence may be cut. Ties go to what stands first.
        """
        middles = self._score(self._middles, question)
        scores = zip(self.scores(question), middles, self._starts, strict=True)
        order = sorted((-(whole + middle), start) for whole, middle, start in scores)
        chosen: list[int] = []
        for _, start in order:
            if all(abs(start - other) >= self._size for other in chosen):
                chosen.append(start)
            if len(chosen) == num:
                break
        return [self._passage(start) for start in sorted(chosen)]

    def scores(self, question: str) -> list[float]:
        """BM25 of every passage (Robertson and Zaragoza 2009) with k1 = 1.2.

        The terms are words and pairs of neighbouring words. Each term of the question adds idf *
        tf * (k1 + 1) / (tf + k1), with idf = log(1 + (N - n + 0.5) / (n + 0.5)). Passages have the
        same length, so nothing is done for it.
        """
        return self._score(self._terms, question)

    def _score(self, passages: Sequence[Counter[str]], question: str) -> list[float]:
        idf = {}
        for term in sorted(set(_terms(question))):
            # a word that an edge of a piece cuts may stand in none of them
            count = max(self._frequency[term], 1)
            idf[term] = math.log(1 + (self._num_pieces - count + 0.5) / (count + 0.5))
        return [
            sum(idf[t] * terms[t] * (_K1 + 1) / (terms[t] + _K1) for t in idf if t in terms)
            for terms in passages
        ]


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [" ".join(pair) for pair in pairwise(words)]
