"""LaCT's decode step over a pool: its plain form against the definition, the kernels against it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from imprint.models.kernels.lact import FastWeights
from imprint.models.kernels.lact_step import StepRows, plain_attend_ring, plain_read_rows

NUM_STATES = 5
FIRST_STEP = 9
"""Rows at an earlier place read the initial weights."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, and where its rows are."""

    heads: int = 2
    width: int = 8
    inner: int = 8
    size: int = 16
    window: int = 16
    rows: tuple[int, ...] | None = (3, 0, 4)
    places: tuple[int, ...] = (15, 40, 2)


SHAPES = {
    "wrapped": Shape(places=(40, 31, 16)),
    "mixed": Shape(),
    "from_the_start": Shape(places=(3, 0, 7)),
    "alike": Shape(places=(6, 6, 6)),
    "short_window": Shape(size=23, window=7, places=(3, 50, 6)),
    "window_of_one": Shape(size=4, window=1, places=(0, 5, 11)),
    "odd_sizes": Shape(heads=3, width=10, inner=21, size=37, window=29, places=(28, 36, 200)),
    "wide": Shape(heads=1, width=70, inner=140, size=300, window=300, places=(299, 150, 700)),
    "all_rows": Shape(rows=None, places=(15, 40, 2, 16, 9)),
    "all_rows_alike": Shape(rows=None, places=(8,) * 5),
    "all_rows_wrapped": Shape(rows=None, places=(20, 16, 17, 18, 90)),
}


@dataclass(frozen=True)
class Case:
    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    weights: FastWeights
    initial: FastWeights
    at: StepRows

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Row and place."""
        return list(zip(self.at.rows_B.tolist(), self.at.places_B.tolist(), strict=True))


def make(name: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    shape, draw = SHAPES[name], torch.Generator().manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64).to(device, dtype)

    def fast(rows: int) -> FastWeights:
        inner, width = (
            (shape.heads, shape.inner, shape.width),
            (
                shape.heads,
                shape.width,
                shape.inner,
            ),
        )
        return FastWeights(normal(rows, *inner), normal(rows, *width), normal(rows, *inner))

    positions_N = torch.zeros(NUM_STATES, dtype=torch.long, device=device)
    rows = range(NUM_STATES) if shape.rows is None else shape.rows
    for row, place in zip(rows, shape.places, strict=True):
        positions_N[row] = place
    rows_B = None if shape.rows is None else torch.tensor(shape.rows, device=device)
    ring = (NUM_STATES, shape.size, shape.heads * shape.width)
    return Case(
        shape,
        q=normal(len(shape.places), shape.heads, shape.width),
        k=normal(*ring, dtype=dtype),
        v=normal(*ring, dtype=dtype),
        weights=fast(NUM_STATES),
        initial=fast(1),
        at=StepRows.of(positions_N, rows_B, shape.size),
    )


def attended_by_definition(case: Case) -> Tensor:
    """Row by row and head by head, over the places that are seen."""
    shape, outs = case.shape, torch.zeros_like(case.q)
    for i, (row, place) in enumerate(case.pairs):
        seen = [p % shape.size for p in range(max(place - shape.window + 1, 0), place + 1)]
        for head in range(shape.heads):
            part = slice(head * shape.width, (head + 1) * shape.width)
            keys, values = case.k[row, seen, part], case.v[row, seen, part]
            weights = (keys @ case.q[i, head] * shape.width**-0.5).softmax(0)
            outs[i, head] = weights @ values
    return outs


def read_by_definition(case: Case) -> Tensor:
    """Row by row and head by head."""
    outs = torch.zeros_like(case.q)
    for i, (row, place) in enumerate(case.pairs):
        own = place >= FIRST_STEP
        w0, w1, w2 = (
            w[row] if own else s[0] for w, s in zip(case.weights, case.initial, strict=True)
        )
        for head in range(case.shape.heads):
            gate = w0[head] @ case.q[i, head]
            outs[i, head] = w1[head] @ (gate * gate.sigmoid() * (w2[head] @ case.q[i, head]))
    return outs


def start_of(case: Case) -> FastWeights | None:
    """What callers give: nothing, where no row needs it."""
    return None if int(case.at.places_B.min()) >= FIRST_STEP else case.initial


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_the_plain_step_follows_its_definition(name: str, known: bool) -> None:
    """Whether the host knows where rows are or not."""
    case = make(name, torch.float64)
    if not known:
        case = replace(case, at=replace(case.at, known=None))
    seen = plain_attend_ring(case.q, case.k, case.v, case.shape.window, case.at)
    torch.testing.assert_close(seen, attended_by_definition(case), rtol=1e-11, atol=1e-11)
    start = start_of(case) if known else case.initial
    said = plain_read_rows(case.weights, start, FIRST_STEP, case.q, case.at)
    torch.testing.assert_close(said, read_by_definition(case), rtol=1e-11, atol=1e-11)


def test_a_token_is_written_over_the_oldest() -> None:
    case = make("mixed", torch.float64)
    before, token = case.k.clone(), torch.randn(3, 16, dtype=torch.float64)
    case.at.put(case.k, token)
    for i, (row, place) in enumerate(case.pairs):
        assert torch.equal(case.k[row, place % 16], token[i])
        before[row, place % 16] = token[i]
    assert torch.equal(case.k, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_the_kernels_equal_their_twins(name: str, dtype: torch.dtype, kernel_device: str) -> None:
    from imprint.models.kernels import triton_lact_step

    case = make(name, dtype, kernel_device)
    right = plain_attend_ring(case.q, case.k, case.v, case.shape.window, case.at)
    hide_what_is_not_seen(case)
    seen = triton_lact_step.attend_ring(case.q, case.k, case.v, case.shape.window, case.at)
    assert seen.dtype == right.dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(seen, right, rtol=tolerance, atol=tolerance)
    inputs = (case.weights, start_of(case), FIRST_STEP, case.q, case.at)
    said, right = triton_lact_step.read_rows(*inputs), plain_read_rows(*inputs)
    torch.testing.assert_close(said, right, rtol=1e-5, atol=1e-4)


def hide_what_is_not_seen(case: Case) -> None:
    """NaN in every other state, and at every place of a ring that a row may not look at."""
    seen = torch.zeros(case.k.shape[:2], dtype=torch.bool, device=case.k.device)
    for row, place in case.pairs:
        places = range(max(place - case.shape.window + 1, 0), place + 1)
        seen[row, [p % case.shape.size for p in places]] = True
    for ring in (case.k, case.v):
        ring[~seen] = torch.nan
    own = {r for r, p in case.pairs if p >= FIRST_STEP}
    others = [row for row in range(NUM_STATES) if row not in own]
    for w in case.weights:
        w[others] = torch.nan
