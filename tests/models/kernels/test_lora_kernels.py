"""The Triton kernels of deltas against plain torch: values, gradients, padding, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imprint.models.kernels.lora import lora_add_triton, lora_side

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}

# segments, rows, rank, input width, output width; 513 inputs are two parts, 129 outputs two tiles
SHAPES = {
    "decode": (3, 1, 3, 513, 129),
    "few_rows": (2, 5, 17, 33, 7),
    "reading": (2, 65, 5, 37, 20),
    "one_of_everything": (1, 1, 1, 1, 1),
}


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator).to(device, dtype)
    return numbers.requires_grad_()


def make(
    shape: tuple[int, int, int, int, int], num: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """base, x, a, b for `num` deltas."""
    segments, rows, rank, width_in, width_out = shape
    return [
        random((segments, rows, width_out), dtype, device, 0),
        random((segments, rows, width_in), dtype, device, 1),
        random((num, rank, width_in), torch.float32, device, 2),
        random((num, width_out, rank), torch.float32, device, 3),
    ]


def plain(base: Tensor, x: Tensor, a: Tensor, b: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The same in plain torch, delta by delta and without the padding."""
    share = len(x) // len(a)
    side = lora_side(x, a.repeat_interleave(share, 0), b.repeat_interleave(share, 0))
    if lengths is not None:
        inside = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        side = torch.where(inside.unsqueeze(-1), side, 0)
    return (base + side).to(base.dtype)


def distance(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / (exact.norm() + 1e-30))


def check(inputs: list[Tensor], dtype: torch.dtype, lengths: Tensor | None = None) -> None:
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, exact = lora_add_triton(*inputs, lengths), plain(*exact_inputs, lengths)
    assert found.dtype == dtype
    assert distance(found, exact) < TOLERANCE[dtype]
    grad = random(tuple(found.shape), dtype, str(found.device), 4).detach()
    grads = torch.autograd.grad(found, inputs, grad)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    for a, b, given in zip(grads, exact_grads, inputs, strict=True):
        assert a.dtype == given.dtype
        assert distance(a, b) < TOLERANCE[given.dtype]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(kernel_device: str, name: str) -> None:
    check(make(SHAPES[name], SHAPES[name][0], torch.float32, kernel_device), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_the_delta_in_float32(kernel_device: str, dtype: torch.dtype) -> None:
    check(make((2, 17, 4, 33, 20), 2, dtype, kernel_device), dtype)


@pytest.mark.usefixtures("poisoned_memory")
def test_ragged_segments_share_deltas(kernel_device: str) -> None:
    inputs = make((4, 21, 3, 35, 18), 2, torch.float32, kernel_device)
    lengths = torch.tensor([21, 1, 0, 17], device=kernel_device)
    check(inputs, torch.float32, lengths)
    base, found = inputs[0], lora_add_triton(*inputs, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(found[row, length:], base[row, length:])


def test_without_a_base(kernel_device: str) -> None:
    _, x, a, b = make((2, 3, 2, 9, 5), 2, torch.float16, kernel_device)
    found = lora_add_triton(None, x, a, b)
    assert found.dtype == torch.float32
    assert distance(found, lora_side(x.double(), a.double(), b.double())) < 2e-6


def test_a_broken_delta_stays_with_its_rows(kernel_device: str) -> None:
    inputs = make((3, 2, 2, 9, 5), 3, torch.float32, kernel_device)
    right = lora_add_triton(*inputs)
    with torch.no_grad():
        for tensor in inputs[2:]:
            tensor[1] = float("nan")
    found = lora_add_triton(*inputs)
    assert torch.equal(found[0::2], right[0::2])
    assert not found[1].isfinite().any()


def test_only_wanted_gradients_are_computed(kernel_device: str) -> None:
    base, x, a, b = (t.detach() for t in make((2, 3, 2, 9, 5), 2, torch.float32, kernel_device))
    b.requires_grad_()
    lora_add_triton(base, x, a, b).sum().backward()
    assert b.grad is not None
    assert base.grad is x.grad is a.grad is None
