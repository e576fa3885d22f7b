"""Blocks of chunks, and whether a gradient is wanted, change no bit of what the rules give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imprint.models.kernels import chunks
from imprint.models.kernels.delta_rule import chunk_delta_rule
from imprint.models.kernels.gated_delta_rule import chunk_gated_delta_rule
from imprint.models.layers import l2_normalize

RULES = {"delta": chunk_delta_rule, "gated": chunk_gated_delta_rule}
HEADS, KEY, VALUE = 2, 8, 10
ONE_BLOCK = 1 << 30


def arguments(rule: str, num_tokens: int, batch: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, HEADS, *shape, generator=draw)

    q, k = (l2_normalize(normal(num_tokens, KEY)) for _ in "qk")
    per_token = [normal(num_tokens).sigmoid(), -normal(num_tokens).abs()]
    per_token = per_token if rule == "gated" else per_token[:1]
    return [q, k, normal(num_tokens, VALUE), *per_token, normal(KEY, VALUE)]


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("block_elements", [1, 600, ONE_BLOCK])
@pytest.mark.parametrize("num_tokens", [1, 64, 65, 300])
@pytest.mark.parametrize("rule", RULES)
def test_no_bit_changes(
    rule: str, num_tokens: int, block_elements: int, graded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(rule, num_tokens, batch=3)
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    monkeypatch.setattr(chunks, "_BLOCK_ELEMENTS", ONE_BLOCK)
    right = RULES[rule](*leaves)
    monkeypatch.setattr(chunks, "_BLOCK_ELEMENTS", block_elements)
    got = RULES[rule](*(leaves if graded else given))
    for part, whole in zip(got, right, strict=True):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_stops_are_found_in_every_block(
    rule: str, graded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(rule, 150)
    stops = [1, 31, 32, 33, 100, 100, 150]
    monkeypatch.setattr(chunks, "_BLOCK_ELEMENTS", ONE_BLOCK)
    right, states = RULES[rule](*given, stops=stops)
    monkeypatch.setattr(chunks, "_BLOCK_ELEMENTS", 1)
    leaves = [tensor.clone().requires_grad_(graded) for tensor in given]
    outputs, stopped = RULES[rule](*leaves, stops=stops)
    assert torch.equal(outputs, right)
    assert torch.equal(stopped, states)
    _, last = RULES[rule](*given)
    torch.testing.assert_close(stopped[-1:], last)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_have_the_same_gradients(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for block_elements in (ONE_BLOCK, 1):
        monkeypatch.setattr(chunks, "_BLOCK_ELEMENTS", block_elements)
        leaves = [t.double().requires_grad_() for t in arguments(rule, 150, batch=2)]
        outputs, state = RULES[rule](*leaves)
        grads.append(torch.autograd.grad(outputs.square().sum() + state.square().sum(), leaves))
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_that_is_given_is_overwritten(rule: str) -> None:
    given = arguments(rule, 32)  # whole chunks of one row, which need no copy
    before = [tensor.clone() for tensor in given]
    RULES[rule](*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 40, 100])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_the_others(rule: str, num_tokens: int) -> None:
    given = arguments(rule, num_tokens, batch=5)
    together = RULES[rule](*given)
    for row in range(5):
        alone = RULES[rule](*(tensor[row : row + 1] for tensor in given))
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part, whole[row : row + 1])
