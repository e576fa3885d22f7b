"""DeltaNet: a language model whose layers write to fast weights by the delta rule.

Shapes: B = batch, T = tokens, D = model width, H = heads, K / V = key / value width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.models.architecture import FastWeightModel, LayerState, Mixer, Read
from imprint.models.config import DeltaNetConfig, GatedDeltaNetConfig
from imprint.models.kernels.choice import pool_step_for, read_delta_rule
from imprint.models.kernels.delta_rule import step_delta_rule
from imprint.models.kernels.pool_step import Projected, StepWeights
from imprint.models.layers import RMSNorm, ShortConvolution, in_whole_vectors, l2_normalize
from imprint.models.lora import DeltaLinear, LoraDelta


class DeltaNetMixer(Mixer):
    """Project, convolve, write and read the fast weights, normalise.

    A gated variant overrides `_gates` and `_delta_rule`, and for decoding `_decay` and
    `_step_weights`.
    """

    def __init__(self, config: DeltaNetConfig | GatedDeltaNetConfig, target: str) -> None:
        super().__init__()
        self.config = config
        hidden, key_dim, value_dim = config.hidden_size, config.key_dim, config.value_dim
        self.q_proj = DeltaLinear(hidden, key_dim, f"{target}.q_proj")
        self.k_proj = DeltaLinear(hidden, key_dim, f"{target}.k_proj")
        self.v_proj = DeltaLinear(hidden, value_dim, f"{target}.v_proj")
        if config.use_beta:
            self.b_proj = DeltaLinear(hidden, config.num_value_heads, f"{target}.b_proj")
        if config.use_gate:
            self.g_proj = DeltaLinear(hidden, value_dim, f"{target}.g_proj")
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.k_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.v_conv1d = ShortConvolution(value_dim, config.conv_size)
        self.o_norm = RMSNorm(config.head_v_dim, config.norm_eps)
        self.o_proj = DeltaLinear(value_dim, hidden, f"{target}.o_proj")

    def faded(self, state: LayerState, share: float) -> LayerState:
        """What comes out of it is normalised: without new writes it says what it said before."""
        return {**state, "S": state["S"] * share}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        cfg = self.config
        shape = (batch, cfg.num_value_heads, cfg.head_k_dim, cfg.head_v_dim)
        # float32 even under bfloat16: the fast weights accumulate over the whole document
        state = {
            "S": torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        }
        if cfg.use_short_conv:
            for name, width in (("q", cfg.key_dim), ("k", cfg.key_dim), ("v", cfg.value_dim)):
                state[f"conv_{name}"] = torch.zeros(
                    batch, cfg.conv_size - 1, width, device=device, dtype=dtype
                )
        return state

    def forward(
        self,
        x_BTD: Tensor,
        state: LayerState,
        delta: LoraDelta | None,
        read: Read,
    ) -> tuple[Tensor, LayerState]:
        cfg = self.config
        new_state: LayerState = {}
        projected: list[Tensor] = []
        heads = {"q": cfg.num_heads, "k": cfg.num_heads, "v": cfg.num_value_heads}
        for name, num_heads in heads.items():
            y_BTD = getattr(self, f"{name}_proj")(x_BTD, delta)
            if cfg.use_short_conv:
                conv = getattr(self, f"{name}_conv1d")
                tail = state[f"conv_{name}"]
                y_BTD, new_state[f"conv_{name}"] = conv(y_BTD, tail, read.lengths_B, read.stops)
            else:
                y_BTD = F.silu(y_BTD)
            projected.append(torch.unflatten(y_BTD, -1, (num_heads, -1)).transpose(1, 2))
        q_BHTK, k_BHTK, v_BHTV = projected
        gates = self._gates(x_BTD, delta, read.lengths_B)
        if read.writes is not None:
            read.writes.append(gates[0].detach().float().mean(1))
        with torch.autocast(x_BTD.device.type, enabled=False):
            q_BHTK, k_BHTK = l2_normalize(q_BHTK), l2_normalize(k_BHTK)
            o_BTHV, new_state["S"] = self._delta_rule(
                q_BHTK, k_BHTK, v_BHTV, gates, state["S"], read.stops
            )
            o_BTHV = self.o_norm(o_BTHV)
        if cfg.use_gate:
            gate_BTD = F.silu(self.g_proj(x_BTD, delta).to(o_BTHV.dtype))
            o_BTHV = o_BTHV * torch.unflatten(gate_BTD, -1, (cfg.num_value_heads, -1))
        return self.o_proj(o_BTHV.flatten(-2).to(x_BTD.dtype), delta), new_state

    def _gates(
        self, x_BTD: Tensor, delta: LoraDelta | None, lengths_B: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What the rule takes per token and head [B, H, T]: here the writing strength."""
        cfg = self.config
        if cfg.use_beta:
            beta_BTH: Tensor = in_whole_vectors(torch.sigmoid, self.b_proj(x_BTD, delta))
            beta_BTH = beta_BTH * (2 if cfg.allow_neg_eigval else 1)
        else:
            beta_BTH = x_BTD.new_ones(*x_BTD.shape[:2], cfg.num_value_heads)
        return (zero_padding(beta_BTH, lengths_B).transpose(1, 2),)

    def _delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        state: Tensor,
        stops: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        """The read-out [B, T, H, V], and the new state or the one at each of `stops`."""
        (beta,) = gates
        if q.shape[2] == 1:
            o_BHV, state = step_delta_rule(q[:, :, 0], k[:, :, 0], v[:, :, 0], beta[:, :, 0], state)
            return o_BHV.unsqueeze(1), state if stops is None else state.expand(
                len(stops), -1, -1, -1
            )
        o_BHTV, state = read_delta_rule(q, k, v, beta, None, state, stops=stops)
        return o_BHTV.transpose(1, 2), state

    def step_(
        self,
        x_BD: Tensor,
        pool: LayerState,
        rows_B: Tensor | None,
        delta: LoraDelta | None,
        plan: Any = None,
    ) -> Tensor:
        cfg, x_B1D = self.config, x_BD.unsqueeze(1)

        def project(linear: DeltaLinear, num_heads: int) -> Tensor:
            return torch.unflatten(linear(x_B1D, delta)[:, 0], -1, (num_heads, -1))

        token = Projected(
            q_BHK=project(self.q_proj, cfg.num_heads),
            k_BHK=project(self.k_proj, cfg.num_heads),
            v_BGV=project(self.v_proj, cfg.num_value_heads),
            beta_BG=self.b_proj(x_B1D, delta)[:, 0] if cfg.use_beta else None,
            decay_BG=self._decay(x_B1D, delta),
            gate_BGV=project(self.g_proj, cfg.num_value_heads) if cfg.use_gate else None,
        )
        o_BGV = pool_step_for(pool["S"])(token, self._step_weights(), pool, rows_B)
        mixed_B1D: Tensor = self.o_proj(o_BGV.flatten(1).unsqueeze(1), delta)
        return mixed_B1D[:, 0]

    def _decay(self, x_B1D: Tensor, delta: LoraDelta | None) -> Tensor | None:
        """What the decay of the fast weights is computed from [B, H]; None: they do not fade."""
        return None

    def _step_weights(self) -> StepWeights:
        cfg = self.config
        taps = None
        if cfg.use_short_conv:
            q, k, v = (
                conv.weight.squeeze(1) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            )
            taps = (q, k, v)
        return StepWeights(
            taps=taps,
            norm_V=self.o_norm.weight,
            norm_eps=self.o_norm.eps,
            max_beta=2.0 if cfg.allow_neg_eigval else 1.0,
        )


def zero_padding(x_BTH: Tensor, lengths_B: Tensor | None) -> Tensor:
    """`x` with zeros from each row's length on: such tokens write nothing."""
    if lengths_B is None:
        return x_BTH
    inside_BT = torch.arange(x_BTH.shape[1], device=x_BTH.device) < lengths_B.view(-1, 1)
    return x_BTH * inside_BT.unsqueeze(-1)


class DeltaNet(FastWeightModel):
    """The language model of `model_type` "delta_net"."""

    config: DeltaNetConfig

    def __init__(self, config: DeltaNetConfig) -> None:
        mixers = [
            DeltaNetMixer(config, f"layers.{i}.attn") for i in range(config.num_hidden_layers)
        ]
        super().__init__(config, mixers)
