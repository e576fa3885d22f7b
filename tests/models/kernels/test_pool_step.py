"""The decode step over a pool: its plain form against the definition, the kernel against that."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from imprint.models.kernels.pool_step import Projected, StepWeights, pool_step

NUM_STATES = 6


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a layer."""

    heads: int = 2
    group: int = 1
    key: int = 16
    value: int = 16
    taps: int = 4
    has_beta: bool = True
    has_decay: bool = False
    has_gate: bool = False


SHAPES = {
    "delta_net": Shape(),
    "gated": Shape(has_decay=True, has_gate=True),
    "odd_sizes": Shape(heads=3, key=10, value=21, taps=3, has_gate=True),
    "grouped": Shape(heads=1, group=2, key=8, value=24, has_decay=True),
    "no_convolution": Shape(taps=0, has_decay=True, has_gate=True),
    "one_tap": Shape(taps=1),
    "no_strength": Shape(has_beta=False),
    "two_blocks": Shape(heads=1, key=256, value=66, has_decay=True),
}


@dataclass(frozen=True)
class Case:
    token: Projected
    weights: StepWeights
    pool: dict[str, Tensor]
    rows_B: Tensor


def make(shape: Shape, *, dtype: torch.dtype, device: str = "cpu", batch: int = 3) -> Case:
    generator = torch.Generator().manual_seed(5)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        wide = torch.randn(*size, generator=generator, dtype=torch.float64)
        return wide.to(device=device, dtype=dtype)

    values = shape.heads * shape.group
    small = torch.promote_types(dtype, torch.float32)
    token = Projected(
        q_BHK=normal(batch, shape.heads, shape.key),
        k_BHK=normal(batch, shape.heads, shape.key),
        v_BGV=normal(batch, values, shape.value),
        beta_BG=normal(batch, values) if shape.has_beta else None,
        decay_BG=normal(batch, values) * 10 if shape.has_decay else None,
        gate_BGV=normal(batch, values, shape.value) if shape.has_gate else None,
    )
    widths = {"q": shape.heads * shape.key, "k": shape.heads * shape.key}
    widths["v"] = values * shape.value
    weights = StepWeights(
        taps=tuple(normal(w, shape.taps) for w in widths.values()) if shape.taps else None,
        norm_V=normal(shape.value, dtype=small),
        norm_eps=1e-5,
        max_beta=2.0,
        log_rate_G=normal(values, dtype=small) if shape.has_decay else None,
        step_bias_G=normal(values, dtype=small) if shape.has_decay else None,
    )
    pool = {"S": normal(NUM_STATES, values, shape.key, shape.value, dtype=small)}
    if shape.taps:
        for name, width in widths.items():
            pool[f"conv_{name}"] = normal(NUM_STATES, shape.taps - 1, width)
    rows = torch.tensor([4, 1, 5, 2][:batch], device=device)
    return Case(token, weights, pool, rows)


def by_definition(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Row by row and head by head, from the formulas."""
    token, weights = case.token, case.weights
    pool = {name: tensor.clone() for name, tensor in case.pool.items()}
    group = token.v_BGV.shape[1] // token.q_BHK.shape[1]
    outputs = torch.zeros_like(token.v_BGV)
    for b, row in enumerate(case.rows_B.tolist()):
        streams = {}
        for i, name in enumerate("qkv"):
            x = (token.q_BHK, token.k_BHK, token.v_BGV)[i][b]
            y = x.flatten()
            if weights.taps is not None:
                joined = torch.cat((pool[f"conv_{name}"][row], y.unsqueeze(0)))
                y = torch.einsum("wc,cw->c", joined, weights.taps[i])
                pool[f"conv_{name}"][row] = joined[1:]
            streams[name] = (y * y.sigmoid()).view_as(x)
        for g in range(token.v_BGV.shape[1]):
            q, k = streams["q"][g // group], streams["k"][g // group]
            q, k = (u / (u.dot(u) + 1e-6).sqrt() for u in (q, k))
            state = pool["S"][row, g]
            if token.decay_BG is not None:
                rate = weights.log_rate_G[g].exp()
                step = (token.decay_BG[b, g] + weights.step_bias_G[g]).exp().log1p()
                state = state * (-rate * step).exp()
            beta = 1.0
            if token.beta_BG is not None:
                beta = weights.max_beta / (1 + (-token.beta_BG[b, g]).exp())
            state = state + beta * torch.outer(k, streams["v"][g] - state.T @ k)
            pool["S"][row, g] = state
            o = state.T @ q / len(q) ** 0.5
            o = o / (o.square().mean() + weights.norm_eps).sqrt() * weights.norm_V
            if token.gate_BGV is not None:
                gate = token.gate_BGV[b, g]
                o = o * gate * gate.sigmoid()
            outputs[b, g] = o
    return outputs, pool


@pytest.mark.parametrize("name", SHAPES)
def test_the_plain_step_follows_its_definition(name: str) -> None:
    case = make(SHAPES[name], dtype=torch.float64)
    expected, expected_pool = by_definition(case)
    actual = pool_step(case.token, case.weights, case.pool, case.rows_B)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    for key, tensor in expected_pool.items():
        torch.testing.assert_close(case.pool[key], tensor, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_of_all_states_is_that_of_their_rows(name: str, dtype: torch.dtype) -> None:
    case = make(SHAPES[name], dtype=dtype)
    own = {key: tensor[case.rows_B] for key, tensor in case.pool.items()}
    expected = pool_step(case.token, case.weights, case.pool, case.rows_B)
    actual = pool_step(case.token, case.weights, own, None)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for key, tensor in case.pool.items():
        torch.testing.assert_close(own[key], tensor[case.rows_B], rtol=1e-4, atol=1e-4)


def compare(case: Case, tolerance: float) -> None:
    """Two steps of the kernel against two of its twin."""
    from imprint.models.kernels import triton_pool_step

    twin = {name: tensor.clone() for name, tensor in case.pool.items()}
    for _ in range(2):
        expected = pool_step(case.token, case.weights, twin, case.rows_B)
        actual = triton_pool_step.pool_step(case.token, case.weights, case.pool, case.rows_B)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        for name, tensor in twin.items():
            torch.testing.assert_close(case.pool[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("interpreter", "poisoned_memory")
def test_the_kernel_equals_its_twin(name: str, dtype: torch.dtype) -> None:
    case = make(SHAPES[name], dtype=dtype)
    compare(case, 1e-5 if dtype == torch.float32 else 2e-3)


def test_the_kernel_leaves_other_states_alone(interpreter: None) -> None:
    from imprint.models.kernels import triton_pool_step

    case = make(SHAPES["gated"], dtype=torch.float32)
    others = [i for i in range(NUM_STATES) if i not in case.rows_B.tolist()]
    before = {name: tensor.clone() for name, tensor in case.pool.items()}
    for tensor in case.pool.values():
        tensor[others] = torch.nan  # reading one would show
    out = triton_pool_step.pool_step(case.token, case.weights, case.pool, case.rows_B)
    assert out.isfinite().all()
    for name, tensor in case.pool.items():
        assert tensor[others].isnan().all(), name
        assert tensor[case.rows_B].isfinite().all(), name
        assert not torch.equal(tensor[case.rows_B], before[name][case.rows_B])


def test_the_kernel_steps_all_states(interpreter: None) -> None:
    from imprint.models.kernels import triton_pool_step

    case = make(SHAPES["gated"], dtype=torch.float32)
    own = {key: tensor[case.rows_B] for key, tensor in case.pool.items()}
    actual = triton_pool_step.pool_step(case.token, case.weights, own, None)
    expected = triton_pool_step.pool_step(case.token, case.weights, case.pool, case.rows_B)
    assert torch.equal(actual, expected)
    for key, tensor in case.pool.items():
        assert torch.equal(own[key], tensor[case.rows_B])


def test_the_kernel_takes_projections_that_are_views(interpreter: None) -> None:
    from imprint.models.kernels import triton_pool_step

    case = make(SHAPES["delta_net"], dtype=torch.float32)
    twin = {name: tensor.clone() for name, tensor in case.pool.items()}
    token = replace(
        case.token,
        **{
            field.name: tensor.transpose(0, 1).contiguous().transpose(0, 1)
            for field in fields(case.token)
            if (tensor := getattr(case.token, field.name)) is not None
        },
    )
    actual = triton_pool_step.pool_step(token, case.weights, case.pool, case.rows_B)
    expected = pool_step(case.token, case.weights, twin, case.rows_B)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_states_the_kernel_does_not_take(interpreter: None) -> None:
    from imprint.models.kernels.triton_pool_step import supports

    assert supports(torch.zeros(1, 2, 256, 512))
    assert not supports(torch.zeros(1, 2, 257, 16))
    assert not supports(torch.zeros(1, 2, 16, 16, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*SHAPES, "wide"])
@pytest.mark.usefixtures("poisoned_memory")
def test_the_kernel_equals_its_twin_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    wide = Shape(heads=16, key=128, value=128, has_decay=True, has_gate=True)
    case = make(SHAPES.get(name, wide), dtype=dtype, device="cuda", batch=4)
    compare(case, 1e-4 if dtype == torch.float32 else 2e-2)
