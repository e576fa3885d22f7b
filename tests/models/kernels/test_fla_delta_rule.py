"""fla's kernels: when they must not be used, how they are called, and, on a GPU, what they give."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.models.kernels.delta_rule import chunk_delta_rule
from imprint.models.kernels.fla_delta_rule import (
    SHORT_READ,
    FlaReader,
    Platform,
    Sizes,
    find_error,
    find_obstacle,
    find_reader,
)
from imprint.models.kernels.gated_delta_rule import chunk_gated_delta_rule

SIZES = Sizes(key_width=128, value_width=128, gated=False, dtype=torch.bfloat16)
GATED = replace(SIZES, gated=True)
H200 = Platform(capability=(9, 0), triton=(3, 7, 1), fla=(0, 6, 0))


@pytest.mark.parametrize(
    ("sizes", "platform", "graded", "obstacle"),
    [
        (SIZES, H200, True, None),
        (GATED, H200, True, None),
        (SIZES, replace(H200, fla=None), False, "not installed"),
        (SIZES, replace(H200, fla=(0, 5, 2)), False, r"0\.5\.2 has wrong gradients; 0\.6\.0"),
        (replace(SIZES, dtype=torch.float32), H200, False, "TF32"),
        (replace(SIZES, key_width=288), H200, False, "width 288 are wider than the 256"),
        (GATED, replace(H200, triton=(3, 6, 0)), True, r"Triton 3\.6\.0 miscompiles.*#640"),
        (GATED, replace(H200, triton=(3, 6, 0)), False, None),
        (SIZES, replace(H200, triton=(3, 6, 0)), True, None),
        (GATED, replace(H200, triton=(3, 3, 1)), True, None),
        (GATED, replace(H200, triton=(3, 6, 0), capability=(8, 0)), True, None),
    ],
)
def test_known_traps_are_told(
    sizes: Sizes, platform: Platform, graded: bool, obstacle: str | None
) -> None:
    found = find_obstacle(sizes, platform, graded=graded)
    if obstacle is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(obstacle, found)


class Recorder:
    """fla's interface over plain torch, in float64: what it was called with is remembered."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        self.name, self.calls = name, calls

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None = None,
        *,
        initial_state: Tensor,
        output_final_state: bool,
        chunk_size: int = 64,
    ) -> tuple[Tensor, Tensor]:
        assert output_final_state
        assert all(x.is_contiguous() for x in (q, k, v, beta))
        self.calls.append((self.name, q.shape[1]))
        q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
        if g is None:
            o, state = chunk_delta_rule(q, k, v, beta, initial_state)
        else:
            o, state = chunk_gated_delta_rule(q, k, v, beta, g.transpose(1, 2), initial_state)
        return o.transpose(1, 2), state


def reading(num_tokens: int, *, gated: bool, batch: int = 1, states: int = 1) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    shape = (batch, 2, num_tokens)
    q, k = (torch.nn.functional.normalize(normal(*shape, 8), dim=-1) for _ in "qk")
    decay = -normal(*shape).exp() if gated else None
    return q, k, normal(*shape, 12), normal(*shape).sigmoid(), decay, normal(states, 2, 8, 12)


def plain(arguments: tuple[Any, ...], stops: list[int] | None = None) -> tuple[Tensor, Tensor]:
    op = chunk_delta_rule if arguments[4] is None else chunk_gated_delta_rule
    return op(*(x for x in arguments if x is not None), stops=stops)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("stops", [None, [100], [1, 70, 70, 99], [3]])
def test_readings_in_pieces_are_one_reading(gated: bool, stops: list[int] | None) -> None:
    calls: list[tuple[str, int]] = []
    reader = FlaReader(Recorder("chunk", calls), Recorder("recurrent", calls), 64)
    arguments = reading(100, gated=gated)
    expected, actual = plain(arguments, stops), reader.read(*arguments, stops=stops)
    for mine, right in zip(actual, expected, strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
    assert sum(num for _, num in calls) == 100
    assert all((name == "recurrent") == (num <= SHORT_READ) for name, num in calls)


def test_short_reads_with_gradients_go_chunkwise() -> None:
    calls: list[tuple[str, int]] = []
    reader = FlaReader(Recorder("chunk", calls), Recorder("recurrent", calls), 64)
    arguments = reading(5, gated=False)
    arguments[2].requires_grad_()  # the state is detached: fla's recurrent gradient would crash
    o, state = reader.read(*arguments)
    (o.sum() + state.sum()).backward()
    assert calls == [("chunk", 5)]
    with torch.no_grad():
        reader.read(*arguments)
    assert calls[1:] == [("recurrent", 5)]


def test_rows_may_share_states() -> None:
    reader = FlaReader(Recorder("chunk", []), Recorder("recurrent", []), 64)
    arguments = reading(9, gated=False, batch=6, states=2)
    for mine, right in zip(reader.read(*arguments), plain(arguments), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_the_check_passes_what_is_right_and_finds_what_is_wrong(gated: bool) -> None:
    sizes = Sizes(key_width=8, value_width=12, gated=gated, dtype=torch.float32)
    device = torch.device("cpu")
    good, short = Recorder("chunk", []), Recorder("recurrent", [])
    assert find_error(FlaReader(good, short, 64), sizes, device, graded=True) is None

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 1.2

    def bad(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return good(q, WrongGradient.apply(k), v, beta, **rest)

    wrong = FlaReader(bad, short, 64)
    found = find_error(wrong, sizes, device, graded=True)
    assert found is not None
    assert found.startswith("gradient of k is off by")
    assert find_error(wrong, sizes, device, graded=False) is None

    def broken(**arguments: Any) -> tuple[Tensor, Tensor]:
        o, state = good(**arguments)
        return o * torch.nan, state

    found = find_error(FlaReader(good, broken, 64), sizes, device, graded=False)
    assert found is not None
    assert found.startswith("o, token by token is off by nan")


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_fla_equals_plain_torch_on_a_gpu(gated: bool, width: int) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    sizes = Sizes(key_width=width, value_width=width, gated=gated, dtype=torch.bfloat16)
    device = torch.device("cuda", 0)
    reader = find_reader(sizes, device, graded=False)
    assert reader is not None
    graded = find_reader(sizes, device, graded=True) is not None
    assert find_error(reader, sizes, device, graded=graded) is None
