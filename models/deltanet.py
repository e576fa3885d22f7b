"""DeltaNet: a language model whose layers write to fast weights by the delta rule.

Module and parameter names are those of the public fla checkpoints, so their tensors load unchanged.
Shapes: B = batch, T = tokens, D = model width, H = heads, K / V = key / value width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprint.models.config import ModelConfig
from imprint.models.kernels.delta_rule import chunk_delta_rule, step_delta_rule
from imprint.models.layers import RMSNorm, ShortConvolution, SwiGLU, l2_normalize
from imprint.models.lora import DeltaLinear, LoraDelta
from imprint.models.state import RecurrentState

LayerState = dict[str, Tensor]


class DeltaNetMixer(nn.Module):
    """Token mixer of one layer: project, convolve, write and read the fast weights, normalise."""

    def __init__(self, config: ModelConfig, target: str) -> None:
        super().__init__()
        self.config = config
        hidden, key_dim, value_dim = config.hidden_size, config.key_dim, config.value_dim
        self.q_proj = DeltaLinear(hidden, key_dim, f"{target}.q_proj")
        self.k_proj = DeltaLinear(hidden, key_dim, f"{target}.k_proj")
        self.v_proj = DeltaLinear(hidden, value_dim, f"{target}.v_proj")
        if config.use_beta:
            self.b_proj = DeltaLinear(hidden, config.num_heads, f"{target}.b_proj")
        if config.use_gate:
            self.g_proj = DeltaLinear(hidden, value_dim, f"{target}.g_proj")
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.k_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.v_conv1d = ShortConvolution(value_dim, config.conv_size)
        self.o_norm = RMSNorm(config.head_v_dim, config.norm_eps)
        self.o_proj = DeltaLinear(value_dim, hidden, f"{target}.o_proj")

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        cfg = self.config
        shape = (batch, cfg.num_heads, cfg.head_k_dim, cfg.head_v_dim)
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
        lengths_B: Tensor | None,
        stops: Sequence[int] | None,
    ) -> tuple[Tensor, LayerState]:
        cfg = self.config
        new_state: LayerState = {}
        projected: list[Tensor] = []
        for name in ("q", "k", "v"):
            y_BTD = getattr(self, f"{name}_proj")(x_BTD, delta)
            if cfg.use_short_conv:
                conv = getattr(self, f"{name}_conv1d")
                tail = state[f"conv_{name}"]
                y_BTD, new_state[f"conv_{name}"] = conv(y_BTD, tail, lengths_B, stops)
            else:
                y_BTD = F.silu(y_BTD)
            projected.append(torch.unflatten(y_BTD, -1, (cfg.num_heads, -1)).transpose(1, 2))
        q_BHTK, k_BHTK, v_BHTV = projected
        beta_BHT = self._beta(x_BTD, delta, lengths_B)
        with torch.autocast(x_BTD.device.type, enabled=False):
            o_BTHV, new_state["S"] = self._delta_rule(
                q_BHTK, k_BHTK, v_BHTV, beta_BHT, state["S"], stops
            )
            o_BTHV = self.o_norm(o_BTHV)
        if cfg.use_gate:
            gate_BTD = F.silu(self.g_proj(x_BTD, delta))
            o_BTHV = o_BTHV * torch.unflatten(gate_BTD, -1, (cfg.num_heads, -1))
        return self.o_proj(o_BTHV.flatten(-2).to(x_BTD.dtype), delta), new_state

    def _beta(self, x_BTD: Tensor, delta: LoraDelta | None, lengths_B: Tensor | None) -> Tensor:
        cfg = self.config
        if cfg.use_beta:
            beta_BTH: Tensor = self.b_proj(x_BTD, delta).sigmoid()
            beta_BTH = beta_BTH * (2 if cfg.allow_neg_eigval else 1)
        else:
            beta_BTH = x_BTD.new_ones(*x_BTD.shape[:2], cfg.num_heads)
        if lengths_B is not None:  # padding writes with strength zero
            inside_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B.view(-1, 1)
            beta_BTH = beta_BTH * inside_BT.unsqueeze(-1)
        return beta_BTH.transpose(1, 2)

    @staticmethod
    def _delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        state: Tensor,
        stops: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        q, k = l2_normalize(q), l2_normalize(k)
        if q.shape[2] == 1:
            o_BHV, state = step_delta_rule(q[:, :, 0], k[:, :, 0], v[:, :, 0], beta[:, :, 0], state)
            return o_BHV.unsqueeze(1), state if stops is None else state.expand(
                len(stops), -1, -1, -1
            )
        o_BHTV, state = chunk_delta_rule(q, k, v, beta, state, stops=stops)
        return o_BHTV.transpose(1, 2), state


class DeltaNetLayer(nn.Module):
    """Pre-norm residual block: mixer, then MLP."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = DeltaNetMixer(config, f"layers.{index}.attn")
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_dim, f"layers.{index}.mlp")

    def forward(
        self,
        x_BTD: Tensor,
        state: LayerState,
        delta: LoraDelta | None,
        lengths_B: Tensor | None,
        stops: Sequence[int] | None,
    ) -> tuple[Tensor, LayerState]:
        mixed_BTD, new_state = self.attn(self.attn_norm(x_BTD), state, delta, lengths_B, stops)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), delta), new_state


class DeltaNetTrunk(nn.Module):
    """Embedding, layers, final norm: the `model.` part of a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DeltaNetLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class DeltaNet(nn.Module):
    """`model(tokens, state)` gives hidden states after the final norm and the state thereafter."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DeltaNetTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def forward(
        self,
        tokens_BT: Tensor,
        state: RecurrentState | None = None,
        *,
        delta: LoraDelta | None = None,
        lengths_B: Tensor | None = None,
        stops: Sequence[int] | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """Read T >= 1 tokens after `state` (None: a document's start).

        Returns hidden states [B, T, D] after the final norm and the new state, differentiable in
        the parameters, in `delta` and in `state`. With `lengths_B` the rows are right-padded to T:
        the padding changes no state, and its hidden states mean nothing. A `state` of fewer rows,
        P of them, is shared: each serves B / P rows in order, and short reads do not copy it.
        `stops` (one row, no lengths), ascending token counts in 1 ... T, asks for the state after
        each of them: these are the rows of the new state.
        """
        if state is None:
            state = self.init_state(tokens_BT.shape[0])
        x_BTD = self.model.embeddings(tokens_BT)
        new_layers = []
        for layer, layer_state in zip(self.model.layers, state.layers, strict=True):
            x_BTD, new_layer = layer(x_BTD, layer_state, delta, lengths_B, stops)
            new_layers.append(new_layer)
        return self.model.norm(x_BTD), RecurrentState(tuple(new_layers))

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] in float32 at least."""
        logits: Tensor = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def init_state(self, batch: int) -> RecurrentState:
        """The state at a document's start: zeros."""
        mixers = [module for module in self.modules() if isinstance(module, DeltaNetMixer)]
        return RecurrentState(
            tuple(mixer.init_state(batch, self.device, self.dtype) for mixer in mixers)
        )

    def lora_targets(self) -> dict[str, tuple[int, int]]:
        """Every projection a delta can change: name -> (input width, output width)."""
        return {
            module.target: (module.in_features, module.out_features)
            for module in self.modules()
            if isinstance(module, DeltaLinear)
        }

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw fresh weights: normal with `initializer_range`, convolutions uniform, norms one."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif "conv1d" in name:
                bound = parameter.shape[-1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
