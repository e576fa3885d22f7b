"""Which form of a delta-rule operator runs: plain torch, fla's kernels, or the Triton kernel here.

The forms compute the same; where one cannot take the sizes at hand, the plain one does.
Shapes: B = rows, H = heads, T = tokens, K / V = key / value width of a head, P = states.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from imprint.models.kernels import uses_triton
from imprint.models.kernels.chunks import needs_grad
from imprint.models.kernels.delta_rule import chunk_delta_rule
from imprint.models.kernels.fla_delta_rule import Sizes, find_reader
from imprint.models.kernels.gated_delta_rule import chunk_gated_delta_rule
from imprint.models.kernels.pool_step import PoolStep, find_error, pool_step

MAX_STEP_ERROR = 1e-3
"""Relative, of one step in float32: more than rounding explains, and far below a wrong result."""

log = logging.getLogger(__name__)


def pool_step_for(state_NGKV: Tensor) -> PoolStep:
    """The decode step for a pool of such states."""
    if uses_triton(state_NGKV.device):
        from imprint.models.kernels import triton_pool_step

        if triton_pool_step.supports(state_NGKV):
            return _checked_step(tuple(state_NGKV.shape[1:]), state_NGKV.device)
    return pool_step


@functools.cache
def _checked_step(shape_GKV: tuple[int, int, int], device: torch.device) -> PoolStep:
    """The kernel, if it agrees with plain torch on `device` for states of this shape."""
    from imprint.models.kernels import triton_pool_step

    error = find_error(triton_pool_step.pool_step, shape_GKV, device)
    if error <= MAX_STEP_ERROR:
        return triton_pool_step.pool_step
    log.warning(
        "tokens are decoded in plain torch, which is slower: the kernel for states of %s is off by "
        "%.1e on %s; this Triton miscompiles it, try another version",
        shape_GKV,
        error,
        device,
    )
    return pool_step


def read_delta_rule(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    beta_BHT: Tensor,
    log_decay_BHT: Tensor | None,
    state_PHKV: Tensor,
    *,
    stops: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read T >= 1 tokens by the delta rule, gated where `log_decay_BHT` is given.

    Returns (o [B, H, T, V], state) as `chunk_delta_rule` and `chunk_gated_delta_rule` do.
    """
    tensors = (q_BHTK, k_BHTK, v_BHTV, beta_BHT, log_decay_BHT, state_PHKV)
    if v_BHTV.is_cuda and uses_triton(v_BHTV.device):
        sizes = Sizes(
            key_width=q_BHTK.shape[-1],
            value_width=v_BHTV.shape[-1],
            gated=log_decay_BHT is not None,
            dtype=v_BHTV.dtype,
        )
        graded = needs_grad(*(t for t in tensors if t is not None))
        reader = find_reader(sizes, v_BHTV.device, graded=graded)
        if reader is not None:
            return reader.read(*tensors, stops=stops)
    if log_decay_BHT is None:
        return chunk_delta_rule(q_BHTK, k_BHTK, v_BHTV, beta_BHT, state_PHKV, stops=stops)
    return chunk_gated_delta_rule(
        q_BHTK, k_BHTK, v_BHTV, beta_BHT, log_decay_BHT, state_PHKV, stops=stops
    )
