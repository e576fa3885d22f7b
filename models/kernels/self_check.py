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

from imprint.models.kernels.lact import FastWeights
from imprint.models.kernels.lact_step import StepRows, plain_attend_ring, plain_read_rows
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
    return errors | _errors_of_lact_step(normal, device)


def _errors_of_lact_step(normal: Callable[..., Tensor], device: torch.device) -> dict[str, float]:
    """A ring that has gone round, one that has not, and fast weights that have stepped or not."""
    from imprint.models.kernels import triton_lact_step

    rows_B = torch.tensor([1, 2], device=device)
    at = StepRows.of(torch.tensor([0, 150, 40], device=device), rows_B, 70)
    q_BHK, k_NLD, v_NLD = normal(2, 3, 20).detach(), normal(3, 70, 60), normal(3, 70, 60)
    rings = k_NLD.detach(), v_NLD.detach()
    seen_BHK = triton_lact_step.attend_ring(q_BHK, *rings, 60, at)
    exact_BHK = plain_attend_ring(q_BHK.double(), rings[0].double(), rings[1].double(), 60, at)
    errors = {"attention of a decoded token": _distance(seen_BHK, exact_BHK)}

    def weights(rows: int) -> FastWeights:
        shapes = (rows, 3, 130, 20), (rows, 3, 20, 130), (rows, 3, 130, 20)
        return FastWeights(*(normal(*shape, like=torch.float32).detach() for shape in shapes))

    own, start = weights(3), weights(1)
    q_BHK = q_BHK.float()
    said_BHK = triton_lact_step.read_rows(own, start, 100, q_BHK, at)
    wide_own, wide_start = (FastWeights(*(w.double() for w in each)) for each in (own, start))
    exact_BHK = plain_read_rows(wide_own, wide_start, 100, q_BHK.double(), at)
    errors["fast weights of a decoded token"] = _distance(said_BHK, exact_BHK)
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
