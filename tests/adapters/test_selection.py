"""Positions: margins, held-out places, short documents, distributions, focus."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint.adapters.config import RefineConfig
from imprint.adapters.relevance import Relevance
from imprint.adapters.selection import (
    allowed_positions,
    focus_positions,
    select_positions,
    smooth_entropy,
    write_positions,
)


def entropy(length: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.rand(length, generator=torch.Generator().manual_seed(seed))


def test_smoothing_is_the_mean_of_the_neighbours_there_are() -> None:
    assert smooth_entropy(torch.tensor([1.0, 2.0, 6.0, 1.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.5]
    assert smooth_entropy(torch.tensor([4.0]), 5).tolist() == [4.0]
    assert smooth_entropy(torch.empty(0), 5).numel() == 0


def test_one_position_a_segment_inside_the_margins() -> None:
    config = RefineConfig(selection="entropy", positions=4, margin_tokens=20)
    window = torch.arange(20, 1000 - 20 + 1).tensor_split(4)
    for step in range(20):
        positions = select_positions(entropy(1000), config, seed=1, step=step)
        assert len(positions) == 4
        for position, segment in zip(positions, window, strict=True):
            assert segment[0] <= position <= segment[-1]


@given(st.integers(0, 80), st.integers(1, 12), st.integers(1, 9), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_documents_of_any_length(length: int, count: int, rollout: int, margin: int) -> None:
    config = RefineConfig(
        selection="entropy", positions=count, rollout_length=rollout, margin_tokens=margin
    )
    positions = select_positions(entropy(length), config, seed=0, step=0).tolist()
    assert positions == sorted(set(positions))
    assert len(positions) == max(0, min(count, length - rollout))
    assert all(1 <= position <= length - rollout for position in positions)


def test_margins_shrink_only_where_they_must() -> None:
    config = RefineConfig(selection="entropy", positions=8, margin_tokens=20, rollout_length=5)
    wide = allowed_positions(200, config)
    assert (int(wide[0]), int(wide[-1])) == (20, 180)
    tight = allowed_positions(41, config)
    assert len(tight) >= 8
    assert int(tight[0]) > 1


def test_held_out_tokens_are_never_rolled_over() -> None:
    config = RefineConfig(selection="entropy", positions=8, rollout_length=5, margin_tokens=0)
    excluded = torch.zeros(120, dtype=torch.bool)
    excluded[30:35] = excluded[70:75] = True
    for step in range(50):
        for positions in (
            select_positions(entropy(120), config, seed=2, step=step, excluded_T=excluded),
            focus_positions(
                entropy(120), torch.ones(120), config, seed=2, step=step, excluded_T=excluded
            ),
        ):
            assert len(positions) == 8
            for position in positions.tolist():
                assert not excluded[position : position + 5].any()
    everything = torch.ones(120, dtype=torch.bool)
    assert len(select_positions(entropy(120), config, seed=0, step=0, excluded_T=everything)) == 0


@pytest.mark.parametrize(("selection", "wanted"), [("argmax", 60), ("argmin", 40)])
def test_extremes(selection: str, wanted: int) -> None:
    scores = torch.ones(100)
    scores[59], scores[39] = 2.0, 0.5
    config = RefineConfig(positions=1, selection=selection, smoothing=1)
    assert select_positions(scores, config, seed=0, step=0).tolist() == [wanted]


def test_entropy_selection_follows_the_softmax_and_uniform_does_not() -> None:
    scores = torch.zeros(24)
    scores[9] = 2.0  # position 10, about e^2 times as likely as any other
    config = RefineConfig(
        selection="entropy", positions=1, smoothing=1, margin_tokens=0, rollout_length=4
    )
    drawn = Counter(
        int(select_positions(scores, config, seed=4, step=step)) for step in range(2000)
    )
    expected = 7.389 / (7.389 + 19)
    assert drawn[10] / 2000 == pytest.approx(expected, abs=0.04)
    uniform = config.replace(selection="uniform")
    drawn = Counter(
        int(select_positions(scores, uniform, seed=4, step=step)) for step in range(2000)
    )
    assert drawn[10] / 2000 == pytest.approx(1 / 20, abs=0.02)
    assert set(drawn) == set(range(1, 21))


def test_draws_depend_on_seed_and_step_alone() -> None:
    config = RefineConfig(selection="entropy")

    def draw(seed: int, step: int) -> list[int]:
        chosen: list[int] = select_positions(entropy(400), config, seed=seed, step=step).tolist()
        return chosen

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(1, 3)
    assert draw(1, 2) != draw(2, 2)


def test_focus_goes_where_the_question_points() -> None:
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(0, 40, (600,), generator=generator).tolist()
    document[400:404] = [90, 91, 92, 93]
    config = RefineConfig(positions=8, focus_gamma=10.0, focus_window=16)
    scores = Relevance(document, [90, 91, 92, 93], window=config.focus_window).score_T
    positions = focus_positions(entropy(600), scores, config, seed=0, step=0).tolist()
    assert positions == sorted(set(positions))
    assert len(positions) == 8
    assert sum(401 <= position <= 420 for position in positions) >= 6
    drawn = [focus_positions(entropy(600), scores, config, seed=0, step=i) for i in range(8)]
    assert {len(positions) for positions in drawn} == {8}
    assert sum(int(((p >= 375) & (p <= 400)).sum()) for p in drawn) >= 8
    sharp = config.replace(focus_spread=0.0)
    positions = focus_positions(entropy(600), scores, sharp, seed=0, step=0).tolist()
    assert all(401 <= position <= 420 for position in positions)
    indifferent = config.replace(focus_gamma=0.0)
    positions = focus_positions(entropy(600), scores, indifferent, seed=0, step=0).tolist()
    assert sum(401 <= position <= 420 for position in positions) <= 2


@pytest.mark.parametrize("length", [0, 1, 5, 6, 9])
def test_focus_on_short_documents(length: int) -> None:
    config = RefineConfig(selection="entropy", positions=4, rollout_length=5)
    positions = focus_positions(entropy(length), torch.zeros(length), config, seed=0, step=0)
    assert len(positions) == max(0, min(4, length - 5))


def written(length: int, *places: int) -> torch.Tensor:
    strength = 0.1 * torch.rand(length, generator=torch.Generator().manual_seed(1))
    for place in places:
        strength[place : place + 5] += 1.0
    return strength


def test_what_was_written_most_strongly_is_chosen() -> None:
    config = RefineConfig(selection="write", positions=3, rollout_length=5, write_gamma=100.0)
    positions = write_positions(written(400, 50, 200, 330), config, seed=0, step=0)
    assert positions.tolist() == [50, 200, 330]
    same = select_positions(
        entropy(400), config, seed=0, step=0, write_T=written(400, 50, 200, 330)
    )
    assert same.tolist() == positions.tolist()


def test_without_weight_writing_decides_nothing() -> None:
    config = RefineConfig(selection="write", positions=4, rollout_length=5, write_gamma=0.0)
    chosen = Counter(
        int(place) // 100
        for step in range(100)
        for place in write_positions(written(400, 50), config, seed=0, step=step)
    )
    assert min(chosen.values()) > 60  # a hundred each, on the mean


def test_chosen_by_writing_they_lie_apart_and_outside_what_is_held_out() -> None:
    config = RefineConfig(selection="write", positions=30, rollout_length=9)
    excluded = torch.zeros(300, dtype=torch.bool)
    excluded[100:120] = True
    positions = write_positions(written(300, 102), config, seed=3, step=1, excluded_T=excluded)
    assert torch.all(positions.diff() > 4)
    assert not any(bool(excluded[p : p + 9].any()) for p in positions.tolist())
    again = write_positions(written(300, 102), config, seed=3, step=1, excluded_T=excluded)
    assert torch.equal(positions, again)
    other = write_positions(written(300, 102), config, seed=3, step=2, excluded_T=excluded)
    assert not torch.equal(positions, other)


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_writing_in_documents_of_any_length(length: int, count: int, rollout: int) -> None:
    config = RefineConfig(selection="write", positions=count, rollout_length=rollout)
    positions = write_positions(torch.ones(length), config, seed=0, step=0).tolist()
    assert positions == sorted(set(positions))
    assert len(positions) <= count
    assert bool(positions) == (length > rollout)
    assert all(1 <= position <= length - rollout for position in positions)


def test_selection_by_writing_needs_the_strengths() -> None:
    with pytest.raises(ValueError, match="writing strengths"):
        select_positions(entropy(50), RefineConfig(selection="write"), seed=0, step=0)


def test_strengths_that_are_not_finite_choose_nothing() -> None:
    config = RefineConfig(selection="write", positions=3)
    strength = torch.full((200,), float("nan"))
    assert len(write_positions(strength, config, seed=0, step=0)) == 0
