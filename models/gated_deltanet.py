"""Gated DeltaNet: DeltaNet whose fast weights also fade, per token and head, at a learned rate.

Shapes: B = batch, T = tokens, D = model width, H = heads of values, K / V = key / value width of a
head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprint.models.architecture import FastWeightModel
from imprint.models.config import GatedDeltaNetConfig
from imprint.models.deltanet import DeltaNetMixer, zero_padding
from imprint.models.kernels.choice import read_delta_rule
from imprint.models.kernels.gated_delta_rule import step_gated_delta_rule
from imprint.models.kernels.pool_step import StepWeights
from imprint.models.layers import in_whole_vectors
from imprint.models.lora import DeltaLinear, LoraDelta

_MAX_RATE = 16.0
_SHORTEST_STEP, _LONGEST_STEP = 1e-3, 1e-1


class GatedDeltaNetMixer(DeltaNetMixer):
    """DeltaNet's mixer with the decay a = exp(-exp(A_log) * softplus(a_proj(x) + dt_bias)).

    Each query and key head serves `num_v_heads / num_heads` value heads in a row.
    """

    def __init__(self, config: GatedDeltaNetConfig, target: str) -> None:
        super().__init__(config, target)
        self.a_proj = DeltaLinear(config.hidden_size, config.num_value_heads, f"{target}.a_proj")
        self.A_log = nn.Parameter(torch.empty(config.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_value_heads))

    def _gates(
        self, x_BTD: Tensor, delta: LoraDelta | None, lengths_B: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Writing strength and logarithm of the decay, [B, H, T] each, in float32 at least."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        beta_BTH: Tensor = in_whole_vectors(torch.sigmoid, self.b_proj(x_BTD, delta).to(wide))
        if self.config.allow_neg_eigval:
            beta_BTH = beta_BTH * 2
        step_BTH = in_whole_vectors(
            F.softplus, self.a_proj(x_BTD, delta).to(wide) + self.dt_bias.to(wide)
        )
        log_decay_BTH = -self.A_log.to(wide).exp() * step_BTH
        gates = (beta_BTH, log_decay_BTH)
        return tuple(zero_padding(gate, lengths_B).transpose(1, 2) for gate in gates)

    def _delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        state: Tensor,
        stops: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        beta, log_decay = gates
        group = v.shape[1] // q.shape[1]
        if group > 1:
            q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)
        if q.shape[2] == 1:
            q, k, v, beta, log_decay = (x[:, :, 0] for x in (q, k, v, beta, log_decay))
            o_BHV, state = step_gated_delta_rule(q, k, v, beta, log_decay, state)
            if stops is not None:
                state = state.expand(len(stops), -1, -1, -1)
            return o_BHV.unsqueeze(1), state
        o_BHTV, state = read_delta_rule(q, k, v, beta, log_decay, state, stops=stops)
        return o_BHTV.transpose(1, 2), state

    def _decay(self, x_B1D: Tensor, delta: LoraDelta | None) -> Tensor | None:
        decay_BH: Tensor = self.a_proj(x_B1D, delta)[:, 0]
        return decay_BH

    def _step_weights(self) -> StepWeights:
        weights = super()._step_weights()
        return replace(weights, log_rate_G=self.A_log, step_bias_G=self.dt_bias)

    def reset_parameter(self, name: str, parameter: nn.Parameter, draw: torch.Generator) -> bool:
        """Rates exp(A_log) uniform up to 16; steps softplus(dt_bias) log-uniform in 1e-3 ... 1e-1,
        as in Mamba-2."""
        if name not in ("A_log", "dt_bias"):
            return False
        uniform = torch.rand(parameter.shape, generator=draw, dtype=torch.float64)
        if name == "A_log":
            value = ((1 - uniform) * _MAX_RATE).log()  # 1 - uniform is never zero
        else:
            ratio = math.log(_LONGEST_STEP / _SHORTEST_STEP)
            step = (uniform * ratio).exp() * _SHORTEST_STEP
            value = step.expm1().log()  # the inverse of softplus
        parameter.copy_(value)
        return True


class GatedDeltaNet(FastWeightModel):
    """The language model of `model_type` "gated_deltanet" (arXiv 2412.06464)."""

    config: GatedDeltaNetConfig
    activation_width = 50

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        mixers = [
            GatedDeltaNetMixer(config, f"layers.{i}.attn") for i in range(config.num_hidden_layers)
        ]
        super().__init__(config, mixers)
