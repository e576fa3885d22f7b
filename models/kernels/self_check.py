"""A small computation through every Triton kernel of ours, against its plain twin, on one device.

Triton compiles for the GPU at hand, and some of its versions have miscompiled kernels for some GPUs
without an error. So nothing is computed with Triton on a device before this has passed there. It
takes a few seconds the first time; Triton then finds the compiled kernels in its cache. Limit: the
shapes are small and odd; nothing is timed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imprint.models.kernels.lora import lora_add, lora_add_triton
from imprint.models.kernels.vocabulary import (
    plain_token_logprobs,
    triton_token_entropies,
    triton_token_logprobs,
)
from imprint.models.sampling import token_entropy

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Relative, in the norm: more than rounding explains, and far below a wrong result."""


def failed_check(device: torch.device) -> str | None:
    """What the check found wrong on `device`, for people; None where everything agrees."""
    from triton.errors import TritonError

    # what compilers, drivers and launches raise: no C compiler, no memory, an unknown GPU
    problems = (TritonError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError)
    try:
        for dtype, tolerance in _TOLERANCE.items():
            for name, error in errors_by_kernel(device, dtype).items():
                if not error <= tolerance:
                    return (
                        f"the self-check of {name} in {dtype} is off by {error:.1e} (relative); "
                        "this Triton miscompiles it for this GPU, try another version"
                    )
    except problems as error:
        return f"the self-check failed with {type(error).__name__}: {error}"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def errors_by_kernel(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of each operator in the norm, the largest over values and gradients."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, like: torch.dtype = dtype) -> Tensor:
        numbers = torch.randn(shape, generator=draw).to(device, like)
        return numbers.requires_grad_()

    errors = {}
    for name, rows in (("the decoding delta", 1), ("the batched delta", 70)):
        deltas = normal(3, 5, 600, like=torch.float32), normal(3, 130, 5, like=torch.float32)
        inputs = (normal(3, rows, 130), normal(3, rows, 600), *deltas)
        errors[name] = _compare(lora_add_triton, lora_add, inputs)
    hidden_TD, weight_VD = normal(70, 96), normal(333, 96)
    targets_T = torch.arange(70, device=device)
    errors["log-probabilities"] = _compare(
        lambda hidden, weight: triton_token_logprobs(hidden, weight, targets_T, 0.7),
        lambda hidden, weight: plain_token_logprobs(hidden, weight, targets_T, 0.7),
        (hidden_TD, weight_VD),
    )
    found_T = triton_token_entropies(hidden_TD.detach(), weight_VD.detach())
    exact_T = token_entropy(hidden_TD.detach().double() @ weight_VD.detach().double().mT)
    errors["entropies"] = _distance(found_T, exact_T)
    return errors


def _compare(
    kernel: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> float:
    """The largest relative error of values and gradients against the plain form in float64."""
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, exact = kernel(*inputs), plain(*exact_inputs)
    grad = torch.linspace(-1, 1, found.numel(), device=found.device).view(found.shape)
    found_grads = torch.autograd.grad(found, tuple(inputs), grad.to(found.dtype))
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    pairs = zip((found, *found_grads), (exact, *exact_grads), strict=True)
    return max(_distance(a, b) for a, b in pairs)


def _distance(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm())
