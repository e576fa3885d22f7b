"""What every fast-weight language model shares: the trunk around the token mixers, and its use.

A model of one architecture is a `FastWeightModel` with mixers of its own. Whoever adapts or serves
a model knows this interface and no architecture. Module and parameter names are those of the public
checkpoints, so their tensors load unchanged.
Shapes: B = batch, T = tokens, D = model width, V = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imprint.models.config import ModelConfig
from imprint.models.kernels.vocabulary import (
    most_likely_tokens,
    token_entropies,
    token_logprobs,
)
from imprint.models.layers import RMSNorm, SwiGLU
from imprint.models.lora import DeltaLinear, LoraDelta
from imprint.models.state import RecurrentState

LayerState = dict[str, Tensor]
"""What one mixer remembers: tensors with the batch first, of shapes that no length changes."""

Endings = list[tuple[int, int]]
"""Rows of a pool where something ends with the token just read, and how many each has read."""


@dataclass(frozen=True, slots=True)
class Read:
    """What one call of the model asks of every mixer alike; see `FastWeightModel.forward`."""

    lengths_B: Tensor | None = None
    stops: Sequence[int] | None = None
    writes: list[Tensor] | None = None
    """Where every mixer appends how strongly each token is written into its memory: [B, T]."""
    keep_state: bool = True
    """Whether anybody wants the new state; a mixer that saves something may return none."""
    plan: Any = None
    """What `Mixer.plan` worked out for all layers; without it each works it out for itself."""


class Mixer(nn.Module, ABC):
    """Token mixer of one layer: the only place where a token meets those before it."""

    @abstractmethod
    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """The state at a document's start: zeros, in every architecture.

        Slots rely on it. Where memory starts from trained weights, zeros stand for these, and
        `forward` puts them in; so they get their gradient, too.
        """

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        state: LayerState,
        delta: LoraDelta | None,
        read: Read,
    ) -> tuple[Tensor, LayerState]:
        """Mix T >= 1 normalised inputs into `state`; see `FastWeightModel.forward`."""

    @abstractmethod
    def faded(self, state: LayerState, share: float) -> LayerState:
        """The memory gone by 1 - `share` of the way back to a document's start; see
        `FastWeightModel.faded`."""

    def plan(self, state: LayerState, shape: Sequence[int], read: Read) -> Any:
        """What follows from where the rows are, which is the same in every layer: worked out from
        the first layer's state for a read of `shape` (B, T), once a call, since it may have to wait
        for the device."""
        return None

    def plan_step(self, pool: LayerState, rows_B: Tensor | None, *, waits: bool = True) -> Any:
        """The same for `step_`; without `waits` it never waits for the device."""
        return None

    @abstractmethod
    def step_(
        self,
        x_BD: Tensor,
        pool: LayerState,
        rows_B: Tensor | None,
        delta: LoraDelta | None,
        plan: Any = None,
    ) -> Tensor:
        """One token a row, mixed into the given rows of `pool` in place, or into all of them.

        With a plan made without waiting, the same kernels run whatever the states hold. What ends
        with the token is left to `end_`; see `FastWeightModel.step_`.
        """

    def endings(self, pool: LayerState, rows_B: Tensor | None) -> Endings:
        """What ends with the last token of these rows (None: all), the same in every layer."""
        return []

    def end_(self, pool: LayerState, endings: Endings) -> None:
        """What has to be done about it, in place."""

    def reset_parameter(self, name: str, parameter: nn.Parameter, draw: torch.Generator) -> bool:
        """Set the parameter of this name (in the mixer) if it needs a start of its own.

        False where `FastWeightModel.reset_parameters` shall set it.
        """
        return False


class Layer(nn.Module):
    """Pre-norm residual block: mixer, then MLP."""

    def __init__(self, config: ModelConfig, mixer: Mixer, index: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn: Mixer = mixer
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_dim, f"layers.{index}.mlp")

    def forward(
        self,
        x_BTD: Tensor,
        state: LayerState,
        delta: LoraDelta | None,
        read: Read,
    ) -> tuple[Tensor, LayerState]:
        mixed_BTD, new_state = self.attn(self.attn_norm(x_BTD), state, delta, read)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), delta), new_state

    def step_(
        self,
        x_BD: Tensor,
        pool: LayerState,
        rows_B: Tensor | None,
        delta: LoraDelta | None,
        plan: Any,
    ) -> Tensor:
        x_BD = x_BD + self.attn.step_(self.attn_norm(x_BD), pool, rows_B, delta, plan)
        # deltas take [B, T, D]
        mixed_B1D: Tensor = self.mlp(self.mlp_norm(x_BD).unsqueeze(1), delta)
        return x_BD + mixed_B1D[:, 0]


class Trunk(nn.Module):
    """Embedding, layers, final norm: the `model.` part of a checkpoint."""

    def __init__(self, config: ModelConfig, mixers: Sequence[Mixer]) -> None:
        super().__init__()
        # filled by `reset_parameters` or a checkpoint: torch's own filling, where a model is only
        # planned (device meta), loads its compiler, which takes more than a second
        size = config.vocab_size, config.hidden_size
        self.embeddings = nn.Embedding(size[0], size[1], _weight=torch.zeros(size))
        self.layers = nn.ModuleList(Layer(config, mixer, i) for i, mixer in enumerate(mixers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class FastWeightModel(nn.Module):
    """`model(tokens, state)` gives hidden states after the final norm and the state thereafter."""

    activation_width: ClassVar[int] = 40
    """Floats that a token keeps for the backward pass, per layer and unit of width: an upper bound
    for DeltaNet, by resident memory too. An architecture that keeps more says so."""
    starts_from_state: ClassVar[bool] = True
    """Whether all that memory starts from is in the state, so that another start can be given."""
    state_layout: ClassVar[str] = ""
    """How numbers lie in a state, named anew whenever that changes. It is part of `weights_hash`: a
    stored state of another layout is another model's."""
    rounds_rows_alike: ClassVar[bool] = True
    """Whether, on a CPU, a batch that once gave a row the bits it gets alone always does."""

    def __init__(self, config: ModelConfig, mixers: Sequence[Mixer]) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, mixers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def mixers(self) -> list[Mixer]:
        """The token mixers, first layer first."""
        return [module for module in self.modules() if isinstance(module, Mixer)]

    @property
    def _first_mixer(self) -> Mixer:
        layer = self.model.layers[0]
        assert isinstance(layer, Layer)
        return layer.attn

    def forward(
        self,
        tokens_BT: Tensor,
        state: RecurrentState | None = None,
        *,
        delta: LoraDelta | None = None,
        lengths_B: Tensor | None = None,
        stops: Sequence[int] | None = None,
        writes: list[Tensor] | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, RecurrentState]:
        """Read T >= 1 tokens after `state` (None: a document's start).

        Returns hidden states [B, T, D] after the final norm and the new state, differentiable in
        the parameters, in `delta` and in `state`. With `lengths_B` the rows are right-padded to T:
        the padding changes no state, and its hidden states mean nothing. A `state` of fewer rows,
        P of them, is shared: each serves B / P rows in order, and short reads do not copy it.
        `stops` (one row, no lengths), ascending token counts in 1 ... T, asks for the state after
        each of them: these are the rows of the new state. To a list `writes` every layer appends
        how strongly it wrote each token into its memory, [B, T]. Without `keep_state` the state
        that is returned is empty, and costs nothing.
        """
        if state is None:
            state = self.init_state(tokens_BT.shape[0])
        if delta is not None and lengths_B is not None:
            delta = delta.over(lengths_B)
        read = Read(lengths_B, stops, writes, keep_state)
        read = replace(read, plan=self._first_mixer.plan(state.layers[0], tokens_BT.shape, read))
        x_BTD = self.model.embeddings(tokens_BT)
        new_layers = []
        for layer, layer_state in zip(self.model.layers, state.layers, strict=True):
            x_BTD, new_layer = layer(x_BTD, layer_state, delta, read)
            new_layers.append(new_layer)
        return self.model.norm(x_BTD), RecurrentState(tuple(new_layers) if keep_state else ())

    @torch.no_grad()
    def step_(
        self,
        tokens_B: Tensor,
        pool: RecurrentState,
        rows_B: Tensor | None = None,
        *,
        delta: LoraDelta | None = None,
    ) -> Tensor:
        """Read one token into each of the rows `rows_B` of `pool`, in place, without gradients.

        None: into every row, in order. Returns hidden states [B, D] after the final norm. The rows
        must differ, except for padding that nobody reads; those not named are left alone. After an
        error they mean nothing.
        """
        plan = self._first_mixer.plan_step(pool.layers[0], rows_B)
        hidden_BD = self._through_layers(tokens_B, pool, rows_B, delta, plan)
        self.end_(pool, rows_B)
        return hidden_BD

    @torch.no_grad()
    def advance_(
        self, tokens_B: Tensor, pool: RecurrentState, rows_B: Tensor, *, delta: LoraDelta | None
    ) -> Tensor:
        """The part of `step_` that a CUDA graph can replay: it does the same work whatever the
        states hold, and never waits for the device. `end_` is the rest."""
        plan = self._first_mixer.plan_step(pool.layers[0], rows_B, waits=False)
        return self._through_layers(tokens_B, pool, rows_B, delta, plan)

    @torch.no_grad()
    def end_(self, pool: RecurrentState, rows_B: Tensor | None) -> None:
        """What is left of a step of these rows: rarely anything, but it may wait for the device."""
        endings = self._first_mixer.endings(pool.layers[0], rows_B)
        if endings:
            for mixer, layer_pool in zip(self.mixers, pool.layers, strict=True):
                mixer.end_(layer_pool, endings)

    def _through_layers(
        self,
        tokens_B: Tensor,
        pool: RecurrentState,
        rows_B: Tensor | None,
        delta: LoraDelta | None,
        plan: Any,
    ) -> Tensor:
        x_BD = self.model.embeddings(tokens_B)
        for layer, layer_pool in zip(self.model.layers, pool.layers, strict=True):
            assert isinstance(layer, Layer)
            x_BD = layer.step_(x_BD, layer_pool, rows_B, delta, plan)
        hidden_BD: Tensor = self.model.norm(x_BD)
        return hidden_BD

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] in float32 at least."""
        logits: Tensor = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def token_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability in nats of `targets[...]` after `hidden[..., D]`: [...], differentiable.

        Like the next two, it never holds the logits of many tokens: see `kernels/vocabulary.py`.
        """
        return token_logprobs(hidden, self.lm_head.weight, targets, temperature)

    def entropies(self, hidden: Tensor) -> Tensor:
        """Entropy in nats of the next-token distribution after `hidden[..., D]`: [...]."""
        return token_entropies(hidden, self.lm_head.weight)

    def most_likely(self, hidden: Tensor) -> Tensor:
        """The most likely next token after `hidden[..., D]`: [...]."""
        return most_likely_tokens(hidden, self.lm_head.weight)

    def init_state(self, batch: int) -> RecurrentState:
        """The state at a document's start: zeros."""
        return RecurrentState(
            tuple(mixer.init_state(batch, self.device, self.dtype) for mixer in self.mixers)
        )

    def faded(self, state: RecurrentState, share: float) -> RecurrentState:
        """A state whose memory has a `share` (0 to 1) of its strength: what is read next weighs
        more against it. The last tokens (convolutions, windows) stay as they are."""
        layers = zip(self.mixers, state.layers, strict=True)
        return RecurrentState(tuple(mixer.faded(layer, share) for mixer, layer in layers))

    def lora_targets(self) -> dict[str, tuple[int, int]]:
        """Every projection a delta can change: name -> (input width, output width)."""
        projections = [module for module in self.modules() if isinstance(module, DeltaLinear)]
        return {name: widths for p in projections for name, widths in p.targets().items()}

    def activation_floats(self, num_tokens: int) -> int:
        """What a reading of `num_tokens` with gradients holds, at most."""
        width = self.config.hidden_size * self.config.num_hidden_layers
        return self.activation_width * num_tokens * width

    def parameter_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type a parameter is kept in when the model is loaded in `dtype`.

        Norms and decay rates stay in float32: they are few, and rounding them costs accuracy.
        """
        is_small = "norm" in name or name.endswith((".A_log", ".dt_bias"))
        return torch.promote_types(dtype, torch.float32) if is_small else dtype

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw fresh weights: normal with `initializer_range`, convolutions uniform, norms one;
        what a mixer sets itself, as it sees fit."""
        draw = torch.Generator().manual_seed(seed)
        mixers = {f"model.layers.{i}.attn.": mixer for i, mixer in enumerate(self.mixers)}
        for name, parameter in self.named_parameters():
            prefix, attn, local = name.partition(".attn.")
            owner = mixers.get(prefix + attn)
            if owner is not None and owner.reset_parameter(local, parameter, draw):
                continue
            if "norm" in name:
                parameter.fill_(1.0)
            elif "conv1d" in name:
                bound = parameter.shape[-1] ** -0.5
                parameter.uniform_(-bound, bound, generator=draw)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=draw)
