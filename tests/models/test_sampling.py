"""Random numbers that are functions of their counter, and what is drawn with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imprint.models.sampling import (
    counter_uniform,
    counter_uniforms,
    penalize,
    sample_tokens,
    token_entropy,
    token_logprobs,
)


def full(value: float, rows: int) -> Tensor:
    return torch.full((rows,), value, dtype=torch.float64)


def test_uniform_is_a_pure_function_of_seed_and_counter() -> None:
    counters = torch.arange(1000)
    all_at_once = counter_uniform(5, counters)
    assert torch.equal(all_at_once, counter_uniform(5, counters))
    assert torch.equal(all_at_once[[7, 3]], counter_uniform(5, torch.tensor([7, 3])))
    grid = counter_uniform(5, counters.view(10, 100))
    assert torch.equal(grid, all_at_once.view(10, 100))
    assert not torch.equal(all_at_once, counter_uniform(6, counters))
    assert all_at_once.dtype == torch.float64
    assert counter_uniform(5, torch.tensor(3)).shape == ()


def test_many_streams_at_once_are_the_streams_alone() -> None:
    seeds, counters = [0, 5, -1, 2**200], [3, 0, 2**40, 7]
    alone = [
        float(counter_uniform(s, torch.tensor(c))) for s, c in zip(seeds, counters, strict=True)
    ]
    assert counter_uniforms(seeds, counters).tolist() == alone


def test_uniform_values_are_pinned() -> None:
    # seeds of stored adapters are replayed with these numbers: they must never change
    got = counter_uniform(1234, torch.tensor([0, 1, 2**60])).tolist()
    assert got == [0.6175520046213672, 0.8662979524090626, 0.7625147835524781]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, -1, 2**200])
def test_uniform_takes_any_seed_and_stays_inside(seed: int) -> None:
    values = counter_uniform(seed, torch.tensor([0, 1, 2**62, -1]))
    assert bool((values > 0).all())
    assert bool((values < 1).all())


def test_uniform_is_uniform_and_uncorrelated() -> None:
    num = 100_000
    values = counter_uniform(0, torch.arange(num))
    error = 1 / math.sqrt(12 * num)
    assert float(values.mean()) == pytest.approx(0.5, abs=5 * error)
    assert float(values.var()) == pytest.approx(1 / 12, rel=0.02)
    counts = torch.histc(values, 100, 0, 1)
    chi2 = float(((counts - num / 100).square() / (num / 100)).sum())
    assert chi2 < 99 + 5 * math.sqrt(2 * 99)
    neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    seeds = torch.corrcoef(torch.stack([values, counter_uniform(1, torch.arange(num))]))[0, 1]
    assert abs(float(neighbours)) < 5 / math.sqrt(num)
    assert abs(float(seeds)) < 5 / math.sqrt(num)


def test_entropy() -> None:
    assert float(token_entropy(torch.zeros(1, 8))) == pytest.approx(math.log(8))
    assert float(token_entropy(torch.tensor([[1e4, 0.0]]))) == 0
    probs = torch.tensor([0.5, 0.25, 0.25])
    assert float(token_entropy(probs.log())) == pytest.approx(1.5 * math.log(2))


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    num = 20_000
    logits = probs.log().expand(num, -1)
    tokens = sample_tokens(
        logits, full(1, num), full(1, num), counter_uniform(0, torch.arange(num))
    )
    shares = torch.bincount(tokens, minlength=4) / num
    torch.testing.assert_close(shares.double(), probs, rtol=0, atol=0.015)


def test_temperature_sharpens() -> None:
    probs, num = torch.tensor([0.6, 0.4], dtype=torch.float64), 20_000
    uniform = counter_uniform(0, torch.arange(num))
    tokens = sample_tokens(probs.log().expand(num, -1), full(0.5, num), full(1, num), uniform)
    assert float((tokens == 0).double().mean()) == pytest.approx(0.36 / 0.52, abs=0.015)


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 50, generator=generator) * 3
    temperature = torch.tensor([0.0, 0.7, 1.0, 2.0] * 3)
    top_p = torch.tensor([1.0, 0.9, 0.5] * 4)
    uniform = counter_uniform(9, torch.arange(12))
    together = sample_tokens(logits, temperature, top_p, uniform)
    for row in range(12):
        pick = slice(row, row + 1)
        alone = sample_tokens(logits[pick], temperature[pick], top_p[pick], uniform[pick])
        assert torch.equal(alone, together[pick])
    order = torch.randperm(12, generator=generator)
    shuffled = sample_tokens(logits[order], temperature[order], top_p[order], uniform[order])
    assert torch.equal(shuffled, together[order])


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    for temperature in (torch.zeros(5), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])):
        tokens = sample_tokens(logits, temperature, torch.ones(5), full(0.999, 5))
        cold = temperature == 0
        assert torch.equal(tokens[cold], logits.argmax(-1)[cold])


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.0, {0}), (0.5, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.9, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set(top_p: float, allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log().expand(500, -1)
    uniform = (torch.arange(500).double() + 0.5) / 500
    tokens = sample_tokens(logits, full(1, 500), full(top_p, 500), uniform)
    assert set(tokens.tolist()) == allowed


@pytest.mark.parametrize("uniform", [2.0**-54, 0.5, 1 - 2.0**-53])
def test_impossible_tokens_are_never_drawn(uniform: float) -> None:
    logits = torch.full((1, 1000), -math.inf)
    logits[0, 437] = 0.0
    token = sample_tokens(logits, torch.ones(1), torch.ones(1), full(uniform, 1))
    assert token.tolist() == [437]


def test_penalties_are_those_of_the_openai_api() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    penalized = penalize(logits, [2, 0, 2], presence=0.5, frequency=0.25)
    assert penalized.tolist() == [1 - 0.75, 2.0, 3 - 1.0]
    assert penalize(logits, [], presence=2, frequency=2).tolist() == logits.tolist()
    assert logits.tolist() == [1.0, 2.0, 3.0]


def test_logprobs_are_the_models_own() -> None:
    probs = torch.tensor([0.1, 0.6, 0.3])
    logprob, top = token_logprobs(probs.log() + 7, 0, 2)
    assert logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in top] == [1, 2]
    assert [math.exp(value) for _, value in top] == pytest.approx([0.6, 0.3], abs=1e-6)
    assert token_logprobs(probs.log(), 1, 0)[1] == []
    assert len(token_logprobs(probs.log(), 1, 20)[1]) == 3
