"""Building blocks that the architectures share: normalisation, short convolution, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprint.models.kernels.chunks import WHOLE_VECTORS
from imprint.models.lora import DeltaLinear, LoraDelta


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis; the epsilon is inside the root, as in fla."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)


def in_whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) of an elementwise function, each number the same wherever it lies in `x`.

    On a CPU torch computes the last numbers of a tensor, those that fill no vector, by other code,
    which rounds otherwise: a row's gates would depend on how many rows there are.
    """
    missing = -x.numel() % WHOLE_VECTORS
    if not missing or x.device.type != "cpu":
        return function(x)
    return function(F.pad(x.reshape(-1), (0, missing)))[: x.numel()].view(x.shape)


# up to here shifted products are as fast on CPUs as a depthwise conv1d, and faster to decode
_MAX_SHIFTED_TAPS = 6


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over W tokens, then SiLU. Its state: the last W - 1 inputs.

    `weight` [D, 1, W] has the name and shape of the public checkpoints.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, size))

    @property
    def size(self) -> int:
        return self.weight.shape[-1]

    def forward(
        self,
        x_BTD: Tensor,
        tail_BWD: Tensor,
        lengths_B: Tensor | None,
        stops: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (y [B, T, D], new tail [B, W - 1, D]); each row's tail ends at its own length.

        With `stops` (one row only) there is a tail for each of them, [P, W - 1, D].
        """
        num_tokens, keep = x_BTD.shape[1], self.size - 1
        if tail_BWD.shape[0] != x_BTD.shape[0]:  # rows that share a state
            tail_BWD = tail_BWD.repeat_interleave(x_BTD.shape[0] // tail_BWD.shape[0], 0)
        joined = torch.cat((tail_BWD.to(x_BTD.dtype), x_BTD), 1)
        if self.size > _MAX_SHIFTED_TAPS:
            y_BTD = self._convolve(joined)
        else:
            taps = self.weight.squeeze(1).to(x_BTD.dtype)
            y_BTD = joined[:, keep:] * taps[:, keep]
            for j in range(keep):
                y_BTD = torch.addcmul(y_BTD, joined[:, j : j + num_tokens], taps[:, j])
        if stops is not None:
            tail = torch.cat([joined[:, stop : stop + keep] for stop in stops])
        elif lengths_B is None:
            tail = joined[:, num_tokens:].clone()  # a view would keep all of the reading
        else:
            index = lengths_B.view(-1, 1) + torch.arange(keep, device=x_BTD.device)
            tail = joined.gather(1, index.unsqueeze(-1).expand(-1, -1, joined.shape[-1]))
        return F.silu(y_BTD), tail

    def _convolve(self, x_BTD: Tensor) -> Tensor:
        """All taps in one operation; float32 and channels-last rows make it fastest on CPUs."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BD1T = x_BTD.to(wide).transpose(1, 2).unsqueeze(2)
            y_BD1T = F.conv2d(x_BD1T, self.weight.to(wide).unsqueeze(2), groups=x_BTD.shape[2])
            return y_BD1T.squeeze(2).transpose(1, 2).to(x_BTD.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), without biases."""

    def __init__(self, width: int, inner: int, target: str) -> None:
        super().__init__()
        self.gate_proj = DeltaLinear(width, inner, f"{target}.gate_proj")
        self.up_proj = DeltaLinear(width, inner, f"{target}.up_proj")
        self.down_proj = DeltaLinear(inner, width, f"{target}.down_proj")

    def forward(self, x_BTD: Tensor, delta: LoraDelta | None) -> Tensor:
        out: Tensor = self.down_proj(
            F.silu(self.gate_proj(x_BTD, delta)) * self.up_proj(x_BTD, delta), delta
        )
        return out


class LowRankFastWeight(nn.Module):
    """left @ right + I / 2 for each head: what the fast weights start from."""

    def __init__(self, heads: int, inner: int, width: int, rank: int) -> None:
        super().__init__()
        self.w_left = nn.Parameter(torch.empty(heads, inner, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, width))

    def forward(self) -> Tensor:
        """The matrices [H, E, K], in float32 at least."""
        dtype = torch.promote_types(self.w_left.dtype, torch.float32)
        product = self.w_left.to(dtype) @ self.w_right.to(dtype)
        return product + 0.5 * torch.eye(*product.shape[1:], dtype=dtype, device=product.device)
