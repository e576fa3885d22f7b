"""ROUGE-L of summaries as LongBench's tables have it. Pure functions of text.

The number is that of the package `rouge` 1.0.1 at summary level: sentences end at full stops, case
counts, nothing is stemmed, and words are counted once. Where that package runs out of its
interpreter's stack on sentences of several hundred words, and LongBench then counts 0, the value
itself is given here.
"""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F of the union of longest common subsequences, best over the answers; 0 for empty texts."""
    given = prediction.strip()
    return max((_summary_level(given, answer) for answer in answers), default=0.0)


def _summary_level(given: str, wanted: str) -> float:
    """R = u / m, P = u / n, F = 2 P R / (P + R + 1e-8).

    m and n are the numbers of distinct words of `wanted` and `given`, u that of the words that lie
    on a longest common subsequence of any of their sentences.
    """
    given_sentences, wanted_sentences = _sentences(given), _sentences(wanted)
    if not given_sentences or not wanted_sentences:
        return 0.0
    union: set[str] = set()
    for theirs in wanted_sentences:
        for ours in given_sentences:
            union |= _common_words(theirs, ours)
    recall = len(union) / len({word for words in wanted_sentences for word in words})
    precision = len(union) / len({word for words in given_sentences for word in words})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # as the package does it: a blank between two full stops is a sentence of one empty word
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_words(x: list[str], y: list[str]) -> set[str]:
    """The words of one longest common subsequence; of several, the one that gives up `y` first."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, word in enumerate(x, start=1):
        for j, other in enumerate(y, start=1):
            best = max(length[i - 1][j], length[i][j - 1])
            length[i][j] = length[i - 1][j - 1] + 1 if word == other else best
    words: set[str] = set()
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
