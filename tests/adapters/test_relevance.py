"""What has to do with a question: the places after its rare terms, and passages around them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint.adapters.relevance import Relevance, relevant_passages


def test_relevance_peaks_right_after_the_rare_terms_of_the_question() -> None:
    filler = [1, 2, 3, 4] * 100
    document = [*filler[:200], 1, 2, 50, 51, 3, 90, *filler[200:]]
    scores = Relevance(document, [1, 2, 50, 51, 7], window=8).score_T
    assert scores.shape == (len(document),)
    assert float(scores.max()) == 1.0
    assert int(scores.argmax()) == 203  # the last token of "50 51": position 204 comes after it
    assert scores[204] > scores[206] > scores[100]
    assert float(scores[:190].max()) < 0.3


def test_relevance_of_nothing_in_common_is_zero() -> None:
    assert not Relevance([1, 2, 3], [9, 8], window=4).score_T.any()
    assert not Relevance([1, 2, 3], [], window=4).score_T.any()
    assert Relevance([], [1], window=4).score_T.numel() == 0
    assert Relevance([5], [5], window=4).score_T.tolist() == [1.0]


def test_passages_stand_around_what_is_most_relevant() -> None:
    scores = torch.zeros(400)
    scores[[40, 41, 200, 396]] = torch.tensor([0.9, 0.8, 0.5, 1.0])
    assert relevant_passages(scores, 2, 32) == [24, 368]  # 396 - 16 would reach over the end
    assert relevant_passages(scores, 9, 32) == [24, 184, 368]  # no more is relevant
    assert relevant_passages(scores, 0, 32) == []
    assert relevant_passages(torch.zeros(400), 4, 32) == []
    assert relevant_passages(torch.tensor([0.0, 1.0]), 4, 32) == [0]
    assert relevant_passages(torch.zeros(0), 4, 32) == []


def test_passages_move_aside_so_that_neighbours_are_whole() -> None:
    scores = torch.zeros(400)
    scores[[100, 118, 82]] = torch.tensor([1.0, 0.9, 0.8])
    assert relevant_passages(scores, 3, 32) == [52, 84, 116]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), max_size=200), st.integers(0, 6), st.integers(1, 40))
def test_passages_of_any_document(values: list[float], num: int, size: int) -> None:
    scores = torch.tensor(values)
    starts = relevant_passages(scores, num, size)
    assert starts == sorted(starts)
    assert len(starts) <= num
    assert all(0 <= start <= max(len(values) - size, 0) for start in starts)
    covered = {place for start in starts for place in range(start, start + size)}
    missed = [value for place, value in enumerate(values) if place not in covered]
    assert len(starts) == num or not any(missed)
    if starts:
        assert int(scores.argmax()) in covered


def test_a_passage_for_all_that_is_asked_before_a_second_one_for_the_same() -> None:
    document = [1, 2, 3, 4] * 100
    for place in (40, 120, 200):  # more of the question than the one place that has the rest of it
        document[place : place + 4] = [50, 51, 52, 53]
    document[320:322] = [60, 61]
    relevance = Relevance(document, [50, 51, 52, 53, 9, 60, 61], window=8)

    def holds(starts: list[int], place: int) -> bool:
        return any(start <= place < start + 32 for start in starts)

    assert not holds(relevance.passages(3, 32), 320)
    starts = relevance.passages(2, 32, repeat=0.25)
    assert holds(starts, 320)
    assert sum(holds(starts, place) for place in (40, 120, 200)) == 1
    # what has been covered still counts: the rest of the passages are for the same once more
    everything = relevance.passages(4, 32, repeat=0.25)
    assert all(holds(everything, place) for place in (40, 120, 200, 320))
    assert len(relevance.passages(9, 32, repeat=0.0)) < len(relevance.passages(9, 32))


def test_with_full_repeats_passages_follow_the_scores_alone() -> None:
    document = torch.randint(0, 30, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    relevance = Relevance(document, document[100:112], window=16)
    assert relevance.passages(4, 20) == relevant_passages(relevance.score_T, 4, 20)
    before = relevance.score_T.clone()
    first = relevance.passages(4, 20, repeat=0.5)
    assert relevance.passages(4, 20, repeat=0.5) == first
    assert torch.equal(relevance.score_T, before)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=120),
    st.lists(st.integers(0, 12), max_size=8),
    st.floats(0, 1),
)
def test_passages_for_any_question(document: list[int], question: list[int], repeat: float) -> None:
    relevance = Relevance(document, question, window=4)
    starts = relevance.passages(3, 12, repeat=repeat)
    assert starts == sorted(starts)
    assert all(0 <= start <= max(len(document) - 12, 0) for start in starts)
    assert bool(starts) == bool(set(document) & set(question))
    if starts:
        best = int(relevance.score_T.argmax())
        assert any(start <= best < start + 12 for start in starts)
