"""Next-token statistics from hidden states: by blocks and by Triton, against all logits at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imprint.models.deltanet import DeltaNet
from imprint.models.kernels import self_check, vocabulary
from imprint.models.kernels.vocabulary import (
    most_likely_tokens,
    plain_token_logprobs,
    token_entropies,
    token_logprobs,
    triton_most_likely_tokens,
    triton_token_entropies,
    triton_token_logprobs,
)
from imprint.models.sampling import token_entropy

# tokens, width, vocabulary: one tile is 64 tokens, 64 inputs and 128 words
SHAPES = {"one": (1, 1, 1), "small": (5, 33, 97), "tiles": (65, 70, 259)}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight, and a token asked for after each state."""
    num_tokens, width, size = shape
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, width, generator=generator).to(device, dtype)
    weight = torch.randn(size, width, generator=generator).to(device, dtype)
    targets = torch.randint(size, (num_tokens,), generator=generator).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative to the norm, or to one where all is (nearly) zero: a vocabulary of one."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm().clamp_min(1.0))


def test_by_hand() -> None:
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    hidden = torch.tensor([[0.0], [1.0]])
    found = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([-math.log(2), -math.log(4 / 3)]))
    warm = token_logprobs(hidden, weight, torch.tensor([0, 0]), math.log(3.0) / math.log(2.0))
    torch.testing.assert_close(warm, torch.tensor([-math.log(2), -math.log(3)]))
    assert float(token_entropies(hidden[:1], weight)) == pytest.approx(math.log(2))
    assert most_likely_tokens(hidden, weight).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    hidden, weight, targets = make((10, 6, 21), torch.float64, "cpu")
    hidden_NKD, targets_NK = hidden.view(2, 5, 6), targets.view(2, 5)

    def everything() -> list[Tensor]:
        logprobs = token_logprobs(hidden_NKD, weight, targets_NK, temperature)
        grads = torch.autograd.grad(logprobs.sin().sum(), (hidden, weight))
        rest = token_entropies(hidden_NKD, weight), most_likely_tokens(hidden_NKD, weight)
        return [logprobs, *grads, *rest]

    whole = everything()
    monkeypatch.setattr(vocabulary, "_BLOCK_ELEMENTS", 3 * 21 + 20)
    for found, expected in zip(everything(), whole, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_block_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make((40, 4, 300), torch.float32, "cpu")
    monkeypatch.setattr(vocabulary, "_BLOCK_ELEMENTS", 8 * 300)
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        token_logprobs(hidden, weight, targets)
    assert max(kept, default=0) < 8 * 300


def test_no_tokens_have_no_statistics() -> None:
    hidden, weight, targets = make((0, 4, 9), torch.float32, "cpu")
    assert token_logprobs(hidden, weight, targets).shape == (0,)
    assert token_entropies(hidden, weight).shape == (0,)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_their_twins(kernel_device: str, name: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = make(SHAPES[name], dtype, kernel_device)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = plain_token_logprobs(*exact_inputs, targets, 0.7)
    found = triton_token_logprobs(hidden, weight, targets, 0.7)
    assert found.dtype == torch.float32
    assert distance(found, exact) < 1e-5
    exact_logits = exact_inputs[0].detach() @ exact_inputs[1].detach().mT
    assert distance(triton_token_entropies(hidden, weight), token_entropy(exact_logits)) < 1e-5
    assert torch.equal(triton_most_likely_tokens(hidden, weight), exact_logits.argmax(-1))
    grad = torch.linspace(-1, 1, len(found), device=found.device)
    grads = torch.autograd.grad(found, (hidden, weight), grad)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.dtype == dtype
        assert distance(a, b) < TOLERANCE[dtype]


def test_the_first_of_equals_is_the_most_likely(kernel_device: str) -> None:
    weight = torch.zeros(300, 2, device=kernel_device)
    weight[[7, 130, 299]] = 1.0
    hidden = torch.tensor([[1.0, 0.0], [-1.0, -1.0]], device=kernel_device)
    assert triton_most_likely_tokens(hidden, weight).tolist() == [7, 0]


def test_large_logits_overflow_nowhere(kernel_device: str) -> None:
    weight = torch.tensor([[0.0], [2e4], [-2e4], [2e4]], device=kernel_device)
    hidden = torch.tensor([[1.0], [-1.0]], device=kernel_device)
    targets = torch.tensor([1, 0], device=kernel_device)
    entropies = triton_token_entropies(hidden, weight).tolist()
    assert entropies == pytest.approx([math.log(2), 0.0])
    logprobs = triton_token_logprobs(hidden, weight, targets, 1.0).tolist()
    assert logprobs == pytest.approx([-math.log(2), -2e4])


def test_hidden_states_that_are_not_finite_give_none(kernel_device: str) -> None:
    hidden, weight, targets = make((3, 4, 9), torch.float32, kernel_device)
    broken = hidden.detach().clone()
    broken[1] = float("nan")
    found = triton_token_logprobs(broken, weight.detach(), targets, 1.0)
    assert found.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_wanted_gradients_are_computed(kernel_device: str, wanted: str) -> None:
    hidden, weight, targets = make((3, 4, 9), torch.float32, kernel_device)
    inputs = {"hidden": hidden.detach(), "weight": weight.detach()}
    inputs[wanted].requires_grad_()
    triton_token_logprobs(inputs["hidden"], inputs["weight"], targets, 1.0).sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [wanted]


def test_the_self_check_passes(kernel_device: str) -> None:
    errors = self_check.errors_by_kernel(torch.device(kernel_device), torch.float32)
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5


@pytest.mark.usefixtures("interpreter")
def test_the_self_check_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    wrong = {"entropies": 0.5}
    monkeypatch.setattr(self_check, "errors_by_kernel", lambda device, dtype: wrong)
    assert "self-check of entropies in torch.float32 is off by 5.0e-01" in str(
        self_check.failed_check(cpu)
    )
    wrong["entropies"] = float("nan")
    assert "is off by nan" in str(self_check.failed_check(cpu))
    wrong.clear()
    assert self_check.failed_check(cpu) is None

    def explode(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(self_check, "errors_by_kernel", explode)
    assert "failed with RuntimeError: Failed to find C compiler" in str(
        self_check.failed_check(cpu)
    )


def test_a_model_uses_them(tiny_model: DeltaNet) -> None:
    hidden, _ = tiny_model(torch.arange(1, 9).unsqueeze(0))
    logits, targets = tiny_model.logits(hidden), torch.arange(2, 10).unsqueeze(0)
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(tiny_model.token_logprobs(hidden, targets), expected)
    assert torch.equal(tiny_model.entropies(hidden), token_entropy(logits))
    assert torch.equal(tiny_model.most_likely(hidden), logits.argmax(-1))
