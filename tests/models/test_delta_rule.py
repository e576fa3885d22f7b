"""The delta rule against a token-by-token reference written from its definition."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from imprint.models.kernels.delta_rule import chunk_delta_rule, step_delta_rule
from imprint.models.layers import l2_normalize

LENGTHS = (1, 2, 63, 64, 65, 1000)
NAMES = ("q", "k", "v", "beta", "state")
BATCH, HEADS, KEY, VALUE = 2, 2, 6, 10


def naive_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S <- S + beta k (v - S^T k)^T; o = S^T q / sqrt(K): one token after the other."""
    outputs = []
    for t in range(q.shape[2]):
        k_t, v_t, b_t = k[:, :, t], v[:, :, t], beta[:, :, t]
        error = v_t - (state.mT @ k_t.unsqueeze(-1)).squeeze(-1)
        state = state + b_t[..., None, None] * k_t.unsqueeze(-1) * error.unsqueeze(-2)
        outputs.append((state.mT @ q[:, :, t].unsqueeze(-1)).squeeze(-1) / math.sqrt(q.shape[-1]))
    return torch.stack(outputs, 2), state


@dataclass(frozen=True)
class Case:
    """Arguments, the weights that make outputs and final state one number, and what is right."""

    arguments: dict[str, Tensor]
    weights: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    grads: dict[str, Tensor]


def gradients(case_arguments: dict[str, Tensor], function, weights) -> tuple:
    leaves = {name: t.clone().requires_grad_() for name, t in case_arguments.items()}
    outputs, state = function(*leaves.values())
    loss = (outputs * weights[0]).sum() + (state * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return (outputs.detach(), state.detach()), dict(zip(leaves, grads, strict=True))


@functools.cache
def case(num_tokens: int, with_state: bool) -> Case:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (BATCH, HEADS, num_tokens)
    arguments = {
        "q": l2_normalize(normal(*shape, KEY)),
        "k": l2_normalize(normal(*shape, KEY)),
        "v": normal(*shape, VALUE),
        "beta": normal(*shape).sigmoid() * 2,
        "state": normal(BATCH, HEADS, KEY, VALUE) * with_state,
    }
    weights = (normal(*shape, VALUE), normal(BATCH, HEADS, KEY, VALUE))
    return Case(arguments, weights, *gradients(arguments, naive_delta_rule, weights))


def check(function, expected: Case) -> None:
    values, grads = gradients(expected.arguments, function, expected.weights)
    for got, right in zip(values, expected.values, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    for name in NAMES:
        torch.testing.assert_close(
            grads[name], expected.grads[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("chunk_size", [None, 16, 32, 48, 64, 128])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_chunk_form_equals_reference(num_tokens: int, with_state: bool, chunk_size: int) -> None:
    function = functools.partial(chunk_delta_rule, chunk_size=chunk_size)
    check(function, case(num_tokens, with_state))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 65])
def test_step_form_equals_reference(num_tokens: int, with_state: bool) -> None:
    def steps(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(q.shape[2]):
            o, state = step_delta_rule(q[:, :, t], k[:, :, t], v[:, :, t], beta[:, :, t], state)
            outputs.append(o)
        return torch.stack(outputs, 2), state

    check(steps, case(num_tokens, with_state))


def test_neither_form_writes_to_its_arguments() -> None:
    arguments = case(65, True).arguments
    before = {name: t.clone() for name, t in arguments.items()}
    chunk_delta_rule(*arguments.values())
    first = [arguments[name][:, :, 0] for name in NAMES[:4]]
    step_delta_rule(*first, arguments["state"])
    for name, tensor in arguments.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("beta", [0.99, 1.0, 1.95, 2.0])
@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("chunk_size", [32, 64])
def test_repeated_keys_stay_accurate_in_float32(beta: float, noise: float, chunk_size: int) -> None:
    # the power series of the inverse reaches 1e8 and more here before its terms cancel
    generator = torch.Generator().manual_seed(0)
    key_dim, num_tokens = 64, 256
    base = torch.randn(1, 2, 1, key_dim, generator=generator)
    noisy = base + noise * torch.randn(1, 2, num_tokens, key_dim, generator=generator)
    k = l2_normalize(noisy).detach()
    q = l2_normalize(torch.randn(1, 2, num_tokens, key_dim, generator=generator))
    v = torch.randn(1, 2, num_tokens, key_dim, generator=generator)
    strength = torch.full((1, 2, num_tokens), beta)
    arguments = dict(zip(NAMES, (q, k, v, strength, torch.zeros(1, 2, 64, 64)), strict=True))
    weights = (torch.ones(1, 2, num_tokens, key_dim), torch.ones(1, 2, 64, 64))
    function = functools.partial(chunk_delta_rule, chunk_size=chunk_size)
    values, grads = gradients(arguments, function, weights)
    wide = {name: t.double() for name, t in arguments.items()}
    right_values, right_grads = gradients(wide, naive_delta_rule, [w.double() for w in weights])
    pairs = [*zip(values, right_values, strict=True), *((grads[n], right_grads[n]) for n in NAMES)]
    for got, right in pairs:
        assert float((got - right).norm() / right.norm()) < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_arguments_are_computed_in_float32(dtype: torch.dtype) -> None:
    arguments = [t.to(dtype) for t in case(65, True).arguments.values()]
    arguments[-1] = arguments[-1].float()
    outputs, state = chunk_delta_rule(*arguments)
    right, right_state = naive_delta_rule(*(t.double() for t in arguments))
    assert outputs.dtype == state.dtype == torch.float32
    torch.testing.assert_close(outputs.double(), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), right_state, rtol=1e-4, atol=1e-5)
