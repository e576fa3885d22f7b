"""The gated delta rule against a token-by-token reference written from its definition."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from imprint.models.kernels.delta_rule import chunk_delta_rule, step_delta_rule
from imprint.models.kernels.gated_delta_rule import chunk_gated_delta_rule, step_gated_delta_rule
from imprint.models.layers import l2_normalize

LENGTHS = (1, 2, 63, 64, 65, 1000)
NAMES = ("q", "k", "v", "beta", "log_decay", "state")
DECAYS = ("learned", "none", "forgetting")
BATCH, HEADS, KEY, VALUE = 2, 2, 6, 10
Rule = Callable[..., tuple[Tensor, Tensor]]


def naive_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S <- a S + beta k (v - a S^T k)^T; o = S^T q / sqrt(K): one token after the other."""
    outputs = []
    for t in range(q.shape[2]):
        state = log_decay[:, :, t, None, None].exp() * state
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


def gradients(
    arguments: dict[str, Tensor], function: Rule, weights: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
    outputs, state = function(*leaves.values())
    loss = (outputs * weights[0]).sum() + (state * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return (outputs.detach(), state.detach()), dict(zip(leaves, grads, strict=True))


@functools.cache
def case(num_tokens: int, decay: str) -> Case:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (BATCH, HEADS, num_tokens)
    log_decay = -normal(*shape).square() * (decay != "none")
    if decay == "forgetting":
        log_decay[:, :, 3::17] = -300.0  # exp underflows in float32
    arguments = {
        "q": l2_normalize(normal(*shape, KEY)),
        "k": l2_normalize(normal(*shape, KEY)),
        "v": normal(*shape, VALUE),
        "beta": normal(*shape).sigmoid() * 2,
        "log_decay": log_decay,
        "state": normal(BATCH, HEADS, KEY, VALUE),
    }
    weights = (normal(*shape, VALUE), normal(BATCH, HEADS, KEY, VALUE))
    return Case(arguments, weights, *gradients(arguments, naive_gated_delta_rule, weights))


def check(function: Rule, expected: Case) -> None:
    values, grads = gradients(expected.arguments, function, expected.weights)
    for got, right in zip(values, expected.values, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    for name in NAMES:
        torch.testing.assert_close(
            grads[name], expected.grads[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("chunk_size", [None, 16, 32, 48, 64, 128])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_chunk_form_equals_reference(num_tokens: int, decay: str, chunk_size: int | None) -> None:
    function = functools.partial(chunk_gated_delta_rule, chunk_size=chunk_size)
    check(function, case(num_tokens, decay))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_tokens", [1, 2, 65])
def test_step_form_equals_reference(num_tokens: int, decay: str) -> None:
    def steps(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        *tokens, state = arguments
        outputs = []
        for t in range(num_tokens):
            o, state = step_gated_delta_rule(*(x[:, :, t] for x in tokens), state)
            outputs.append(o)
        return torch.stack(outputs, 2), state

    check(steps, case(num_tokens, decay))


@pytest.mark.parametrize("num_tokens", [1, 65])
def test_without_decay_it_is_the_delta_rule(num_tokens: int) -> None:
    arguments = case(num_tokens, "none").arguments
    plain = [tensor for name, tensor in arguments.items() if name != "log_decay"]
    for got, right in zip(
        chunk_gated_delta_rule(*arguments.values()), chunk_delta_rule(*plain), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    first = [arguments[name][:, :, 0] for name in NAMES[:5]]
    got_step = step_gated_delta_rule(*first, arguments["state"])
    right_step = step_delta_rule(*first[:4], arguments["state"])
    for got, right in zip(got_step, right_step, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 7, 16, 17, 64])
@pytest.mark.parametrize("rows", [1, 3])
def test_shared_states_equal_copies(num_tokens: int, rows: int) -> None:
    arguments = dict(case(num_tokens, "learned").arguments)
    forked = {n: t.repeat_interleave(rows, 0) for n, t in arguments.items() if n != "state"}
    state = arguments["state"]

    def shared(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_gated_delta_rule(*tensors)

    def copied(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_gated_delta_rule(*tensors[:5], tensors[5].repeat_interleave(rows, 0))

    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH * rows, HEADS, num_tokens, VALUE), (BATCH * rows, HEADS, KEY, VALUE))
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    mine, my_grads = gradients({**forked, "state": state}, shared, (weights[0], weights[1]))
    right, grads = gradients({**forked, "state": state}, copied, (weights[0], weights[1]))
    torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(my_grads, grads, rtol=1e-10, atol=1e-11)


def test_stops_are_the_states_of_shorter_reads() -> None:
    arguments = {name: tensor[:1] for name, tensor in case(65, "learned").arguments.items()}
    stops = [1, 16, 17, 17, 48, 64, 65]
    _, states = chunk_gated_delta_rule(*arguments.values(), chunk_size=16, stops=stops)
    for state, stop in zip(states, stops, strict=True):
        tokens = [arguments[name][:, :, :stop] for name in NAMES[:5]]
        _, right = naive_gated_delta_rule(*tokens, arguments["state"])
        torch.testing.assert_close(state, right[0], rtol=1e-11, atol=1e-11)


def test_neither_form_writes_to_its_arguments() -> None:
    arguments = case(65, "learned").arguments
    before = {name: t.clone() for name, t in arguments.items()}
    chunk_gated_delta_rule(*arguments.values())
    first = [arguments[name][:, :, 0] for name in NAMES[:5]]
    step_gated_delta_rule(*first, arguments["state"])
    for name, tensor in arguments.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("strongest", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("beta", [0.99, 1.95])
def test_float32_is_accurate_for_every_decay(strongest: float, beta: float) -> None:
    # keys of a chunk repeat, and one token in five forgets up to `strongest` nats
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 256)
    base = torch.randn(1, 2, 1, 64, generator=generator)
    k = l2_normalize(base + 0.3 * torch.randn(*shape, 64, generator=generator))
    q = l2_normalize(torch.randn(*shape, 64, generator=generator))
    v = torch.randn(*shape, 64, generator=generator)
    log_decay = -0.05 * torch.rand(shape, generator=generator)
    log_decay[:, :, ::5] -= strongest * torch.rand(shape, generator=generator)[:, :, ::5]
    state = torch.randn(1, 2, 64, 64, generator=generator)
    tensors = (q, k, v, torch.full(shape, beta), log_decay, state)
    arguments = dict(zip(NAMES, tensors, strict=True))
    weights = (torch.ones(*shape, 64), torch.ones(1, 2, 64, 64))
    values, grads = gradients(arguments, chunk_gated_delta_rule, weights)
    wide = {name: t.double() for name, t in arguments.items()}
    wide_weights = (weights[0].double(), weights[1].double())
    right_values, right_grads = gradients(wide, naive_gated_delta_rule, wide_weights)
    pairs = [*zip(values, right_values, strict=True), *((grads[n], right_grads[n]) for n in NAMES)]
    for got, right in pairs:
        assert got.dtype == torch.float32
        assert float((got - right).norm()) <= 2e-5 * float(right.norm()) + 1e-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_arguments_are_computed_in_float32(dtype: torch.dtype) -> None:
    arguments = [t.to(dtype) for t in case(65, "learned").arguments.values()]
    arguments[-1] = arguments[-1].float()
    outputs, state = chunk_gated_delta_rule(*arguments)
    right, right_state = naive_gated_delta_rule(*(t.double() for t in arguments))
    assert outputs.dtype == state.dtype == torch.float32
    torch.testing.assert_close(outputs.double(), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), right_state, rtol=1e-4, atol=1e-5)
