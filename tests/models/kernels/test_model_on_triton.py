"""A whole model with its deltas and losses through the Triton kernels equals plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from imprint.models.config import DeltaNetConfig
from imprint.models.deltanet import DeltaNet
from imprint.models.kernels import uses_triton
from imprint.models.lact import LaCT
from imprint.models.lact_config import LactConfig
from imprint.models.lora import DeltaLinear, FusedDeltaLinear, LoraDelta

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 3, 5, 8, 0], [9, 0, 0, 0, 0]])
LENGTHS = torch.tensor([5, 3, 4, 1])


@pytest.fixture
def triton_kernels(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """Operators run as Triton kernels until the variable is set otherwise."""
    monkeypatch.setenv("IMPRINT_KERNELS", "triton")
    uses_triton.cache_clear()
    yield monkeypatch
    uses_triton.cache_clear()


def random_delta(targets: dict[str, tuple[int, int]], num: int, device: str) -> LoraDelta:
    delta = LoraDelta.init(targets, 2, seed=0, num=num, device=device)
    generator = torch.Generator().manual_seed(1)
    for b_QOR in delta.b.values():
        b_QOR.copy_(torch.randn(b_QOR.shape, generator=generator) * 0.3)
    return delta.requires_grad_()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_model_with_deltas(
    triton_kernels: pytest.MonkeyPatch, kernel_device: str, lengths: Tensor | None
) -> None:
    config = DeltaNetConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_heads=1, initializer_range=0.3
    )
    model = DeltaNet(config)
    model.reset_parameters(0)
    model.to(kernel_device).eval().requires_grad_(False)
    tokens_BT = TOKENS.to(kernel_device)
    lengths_B = None if lengths is None else lengths.to(kernel_device)
    inside = torch.arange(5, device=kernel_device) < LENGTHS.to(kernel_device).unsqueeze(1)
    delta = random_delta(model.lora_targets(), 2, kernel_device)

    def everything() -> list[Tensor]:
        hidden_BTD, state = model(tokens_BT, delta=delta, lengths_B=lengths_B)
        logprobs_BT = model.token_logprobs(hidden_BTD, tokens_BT, 0.9)
        losses_BT = torch.where(inside, logprobs_BT, 0) + 0.1 * sum(
            tensor.square().sum() for tensor in state.tensors()
        )
        grads = torch.autograd.grad(losses_BT.sum(), delta.parameters())
        return [losses_BT, model.entropies(hidden_BTD[inside]), *state.tensors(), *grads]

    assert uses_triton(model.device)
    found = everything()
    triton_kernels.setenv("IMPRINT_KERNELS", "reference")
    uses_triton.cache_clear()
    assert not uses_triton(model.device)
    for a, b in zip(found, everything(), strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 1e-4


def test_lact_decodes_in_place(triton_kernels: pytest.MonkeyPatch, kernel_device: str) -> None:
    config = LactConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        num_attn_heads=2,
        num_lact_heads=1,
        lact_chunk_size=4,
        window_size=3,
        initializer_range=0.3,
    )
    model = LaCT(config)
    model.reset_parameters(0)
    model.to(kernel_device).eval().requires_grad_(False)
    tokens_BT, lengths_B = TOKENS.to(kernel_device), LENGTHS.to(kernel_device)
    rows_B = torch.tensor([3, 0], device=kernel_device)
    results = []
    for choice in ("triton", "reference"):
        triton_kernels.setenv("IMPRINT_KERNELS", choice)
        uses_triton.cache_clear()
        assert uses_triton(model.device) == (choice == "triton")
        with torch.no_grad():
            _, pool = model(tokens_BT, lengths_B=lengths_B)
        steps = [model.step_(tokens_BT[:2, t], pool, rows_B) for t in range(4)]
        results.append([*steps, *(t.double() for t in pool.tensors())])
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


def test_projections_that_are_stored_as_one(
    triton_kernels: pytest.MonkeyPatch, kernel_device: str
) -> None:
    projection = FusedDeltaLinear(8, 15, ("q", "k", "v")).to(kernel_device)
    delta = random_delta({"q": (8, 5), "v": (8, 5)}, 1, kernel_device)
    x_BTI = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).to(kernel_device)
    found = projection(x_BTI, delta)
    triton_kernels.setenv("IMPRINT_KERNELS", "reference")
    uses_triton.cache_clear()
    torch.testing.assert_close(found, projection(x_BTI, delta), rtol=1e-5, atol=1e-6)


def test_other_targets_are_left_as_they_are(
    triton_kernels: pytest.MonkeyPatch, kernel_device: str
) -> None:
    projection = DeltaLinear(8, 5, "q").to(kernel_device)
    delta = random_delta({"k": (8, 5)}, 1, kernel_device)
    x_BTI = torch.ones(1, 3, 8, device=kernel_device)
    assert torch.equal(projection(x_BTI, delta), projection(x_BTI))
