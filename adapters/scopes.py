"""What a study trains, a class for each kind, and how a document is read and asked with it.

Knows tensors and how they are kept; takes no step and judges nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from imprint.adapters.config import RefineConfig
from imprint.adapters.delta import init_delta
from imprint.adapters.errors import AdaptationError
from imprint.adapters.loss import clip_grads, clip_grads_per_delta
from imprint.models.architecture import FastWeightModel
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a document is read, and asked once it has been read."""

    model: FastWeightModel
    read_delta: LoraDelta | None = None
    ask_delta: LoraDelta | None = None
    start: RecurrentState | None = None
    """The state before the document; the model's own start if not given."""


class Trained(ABC):
    """What one study of one document trains, at one moment; it starts as what changes nothing."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What an optimizer moves, always in the same order."""

    @property
    @abstractmethod
    def view(self) -> View:
        """The model with it; differentiable in the parameters."""

    @abstractmethod
    def copy(self) -> Self:
        """The same values, which no later step changes and which need no gradients."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """A copy between what changes nothing (0) and this (1): the blend of the gate."""

    @abstractmethod
    def clip_grads(self, max_norm: float) -> float:
        """Bound the norm of the whole gradient; the norm that it had."""

    @abstractmethod
    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Flat names that begin with `prefix`, for a checkpoint of the study."""

    @abstractmethod
    def from_tensors(self, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        """Another of this form, on this one's device, of what `to_tensors` gave."""

    @abstractmethod
    def adapter_fields(self) -> dict[str, Any]:
        """What an `Adapter` keeps of it, by field."""


class TrainedDelta(Trained):
    """Scopes `lora` and `query_lora`: a low-rank delta beside the weights."""

    def __init__(self, model: FastWeightModel, delta: LoraDelta, *, reads: bool) -> None:
        """`reads`: the document is read with the delta, too."""
        self.model, self.delta, self.reads = model, delta, reads

    def parameters(self) -> list[Tensor]:
        return self.delta.parameters()

    @property
    def view(self) -> View:
        read_delta = self.delta if self.reads else None
        return View(model=self.model, read_delta=read_delta, ask_delta=self.delta)

    def _with(self, delta: LoraDelta) -> Self:
        return type(self)(self.model, delta, reads=self.reads)

    def copy(self) -> Self:
        return self._with(self.delta.detach().clone())

    def scaled(self, factor: float) -> Self:
        return self._with(self.delta.detach().scaled(factor))

    def clip_grads(self, max_norm: float) -> float:
        return float(clip_grads_per_delta(self.delta, max_norm)[0])

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        return self.delta.to_tensors(prefix)

    def from_tensors(self, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        found = LoraDelta.from_tensors(tensors, prefix)
        a = {name: found.a[name].to(tensor.device) for name, tensor in self.delta.a.items()}
        b = {name: found.b[name].to(tensor.device) for name, tensor in self.delta.b.items()}
        return self._with(LoraDelta(a, b))

    def adapter_fields(self) -> dict[str, Any]:
        return {"delta": self.delta}


class TrainedStart(Trained):
    """Scope `state`: the recurrent state that the document is read from, which is zeros without it.

    The document writes over it, and what it does not write over is there to be asked.
    """

    def __init__(self, model: FastWeightModel, values: dict[str, Tensor]) -> None:
        """`values`: the tensors of a state by layer and name, `0.S`; those of no number (counters)
        are not among them."""
        self.model, self.values = model, values

    @classmethod
    def fresh(cls, model: FastWeightModel) -> Self:
        """Zeros. Raises AdaptationError where a model cannot be started from another state."""
        if not model.starts_from_state:
            raise AdaptationError(
                "invalid_method",
                f"scope state does not fit {type(model).__name__}, whose memory starts from "
                "weights of its own",
            )
        return cls(
            model,
            {
                # never below float32: small steps would be lost
                name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                for name, tensor in model.init_state(1).to_tensors("").items()
                if tensor.is_floating_point()
            },
        )

    def parameters(self) -> list[Tensor]:
        return list(self.values.values())

    @property
    def view(self) -> View:
        zeros = self.model.init_state(1)
        tensors = {
            name: self.values[name].to(zero.dtype) if name in self.values else zero
            for name, zero in zeros.to_tensors("").items()
        }
        return View(model=self.model, start=RecurrentState.from_tensors(tensors, ""))

    def _map(self, factor: float) -> Self:
        values = {name: factor * value.detach() for name, value in self.values.items()}
        return type(self)(self.model, values)

    def copy(self) -> Self:
        return self._map(1.0)

    def scaled(self, factor: float) -> Self:
        return self._map(factor)

    def clip_grads(self, max_norm: float) -> float:
        return clip_grads(self.parameters(), max_norm)

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}{name}": value.detach() for name, value in self.values.items()}

    def from_tensors(self, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        return type(self)(
            self.model,
            {name: tensors[f"{prefix}{name}"].to(old.device) for name, old in self.values.items()},
        )

    def adapter_fields(self) -> dict[str, Any]:
        start = self.view.start
        assert start is not None
        return {"start": start}


class TrainedWeights(Trained):
    """Scope `full`: every weight, in a copy of the model. The model itself is never written."""

    def __init__(self, base: FastWeightModel, model: FastWeightModel) -> None:
        """`model`: the copy."""
        self.base, self.model = base, model

    @classmethod
    def fresh(cls, base: FastWeightModel) -> Self:
        """The weights as they are. Raises AdaptationError for types that lose small steps."""
        if base.dtype not in (torch.float32, torch.float64):
            raise AdaptationError(
                "invalid_method", f"scope full needs a model in float32, this one is {base.dtype}"
            )
        return cls(base, deepcopy(base))

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def view(self) -> View:
        return View(model=self.model)

    def copy(self) -> Self:
        return type(self)(self.base, deepcopy(self.model).requires_grad_(False))

    @torch.no_grad()
    def scaled(self, factor: float) -> Self:
        copied = self.copy()
        if factor != 1.0:
            for weight, base in zip(copied.parameters(), self.base.parameters(), strict=True):
                weight.copy_(base + factor * (weight - base))
        return copied

    def clip_grads(self, max_norm: float) -> float:
        return clip_grads(self.parameters(), max_norm)

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {f"{prefix}{name}": weight.detach() for name, weight in named}

    @torch.no_grad()
    def from_tensors(self, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        copied = self.copy()
        for name, weight in copied.model.named_parameters():
            weight.copy_(tensors[f"{prefix}{name}"])
        return copied

    def adapter_fields(self) -> dict[str, Any]:
        return {"weights": self.to_tensors("")}


def fresh(model: FastWeightModel, config: RefineConfig, *, seed: int) -> Trained:
    """What a study of this scope begins with, its gradients switched on.

    Raises AdaptationError where the model has nothing of the kind.
    """
    trained: Trained
    if config.scope == "state":
        trained = TrainedStart.fresh(model)
    elif config.scope == "full":
        trained = TrainedWeights.fresh(model)
    else:
        delta = init_delta(model, config, seed=seed)
        trained = TrainedDelta(model, delta, reads=config.reads_again)
    for parameter in trained.parameters():
        parameter.requires_grad_()
    return trained
