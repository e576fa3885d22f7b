"""The paired bootstrap: its counts, its determinism, and its coverage of a known difference."""

from __future__ import annotations

import numpy as np
import pytest

from imprint.adapters.evaluation.statistics import compare


def test_counts_and_mean_are_those_of_the_differences():
    result = compare([0, 1, 0, 1, 0], [1, 1, 1, 0, 0])
    assert (result.num_better, result.num_same, result.num_worse) == (2, 2, 1)
    assert result.difference == pytest.approx(0.2)
    assert result.interval_low <= 0.2 <= result.interval_high


def test_equal_arms_have_an_interval_of_zero_width():
    result = compare([0.0, 1.0, 0.5], [0.0, 1.0, 0.5])
    assert (result.difference, result.interval_low, result.interval_high) == (0.0, 0.0, 0.0)


def test_the_interval_is_reproducible_and_close_to_the_normal_one():
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2, 200).astype(float)
    other = np.where(rng.random(200) < 0.2, 1.0, base)
    first, again = (compare(base.tolist(), other.tolist(), seed=7) for _ in range(2))
    assert first == again
    spread = 1.96 * (other - base).std() / np.sqrt(200)
    assert first.interval_low == pytest.approx(first.difference - spread, abs=0.01)
    assert first.interval_high == pytest.approx(first.difference + spread, abs=0.01)


@pytest.mark.parametrize(("base", "other"), [([], []), ([1.0], [1.0, 0.0])])
def test_arms_of_other_documents_are_refused(base, other):
    with pytest.raises(ValueError, match="both arms need the same documents"):
        compare(base, other)
