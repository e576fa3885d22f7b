"""How much of a text stands in a document: counted in runs of four tokens."""

from __future__ import annotations

import random

import pytest
import torch

from imprint.adapters.grounding import Grounding


def counted(document: list[int], text: list[int], question: list[int]) -> int:
    def runs(tokens: list[int]) -> set[tuple[int, ...]]:
        return {tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)}

    return len((runs(text) & runs(document)) - runs(question))


@pytest.mark.parametrize("vocab_size", [3, 300, 151_936])
def test_runs_are_counted_as_they_stand(vocab_size: int) -> None:
    draw = random.Random(vocab_size)
    document = [draw.randrange(vocab_size) for _ in range(300)]
    grounding = Grounding(torch.tensor(document), vocab_size)
    seen = set()
    for _ in range(40):
        start = draw.randrange(290)
        text = [*document[start : start + 6], draw.randrange(vocab_size), *document[5:10]]
        question = document[start : start + draw.randrange(6)]
        seen.add(grounding.count(text, question))
        assert grounding.count(text, question) == counted(document, text, question)
    assert len(seen) > 1


def test_what_is_said_twice_counts_once_and_what_the_question_says_does_not() -> None:
    grounding = Grounding(torch.arange(20), 20)
    assert grounding.count([5, 6, 7, 8, 9]) == 2
    assert grounding.count([5, 6, 7, 8, 0, 5, 6, 7, 8]) == 1
    assert grounding.count([5, 6, 7, 8, 9], [1, 5, 6, 7, 8]) == 1
    assert grounding.count([8, 7, 6, 5]) == 0


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3]])
def test_short_texts_have_no_runs(text: list[int]) -> None:
    assert Grounding(torch.arange(20), 20).count(text) == 0
    assert Grounding(torch.tensor(text, dtype=torch.long), 20).count([1, 2, 3, 4]) == 0
