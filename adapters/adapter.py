"""The adapter: what studying a document leaves behind, and how it becomes one file.

Holds the document's tokens and entropies (focus chooses positions from them), the recurrent state
at its end, what was trained if it was accepted, and a manifest from which the job can be replayed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final, Self

import torch
from torch import Tensor

from imprint.adapters.verified import read_verified
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState

FORMAT: Final = "imprint-adapter-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """T = document tokens. `delta`, `start` and `weights` are None where nothing was studied or the
    gate refused; else one of them is set, as the scope of the study says."""

    tokens_T: Tensor
    """Token ids of the document, int64."""
    entropy_T: Tensor
    """Entropy in nats of the base model's next-token distribution after each token, float32."""
    state: RecurrentState
    """State at the document's end, batch 1; read with the delta in scope `lora`, from `start` in
    scope `state`."""
    delta: LoraDelta | None = None
    """One delta, already blended."""
    start: RecurrentState | None = None
    """The state that the document was read from, batch 1, in scope `state`: answers need it not."""
    weights: dict[str, Tensor] | None = None
    """Every weight by its parameter's name, in scope `full`."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Model hash, config, seed, outcome and measurements: plain JSON values."""

    @property
    def adapted(self) -> bool:
        """Whether answers come from what a study has changed."""
        return any(part is not None for part in (self.delta, self.start, self.weights))

    @property
    def read_by_base(self) -> bool:
        """Whether `state` is the base model's: nothing was studied, or in scope `query_lora`."""
        return not self.adapted or self.manifest.get("config", {}).get("scope") == "query_lora"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        trained = sum(part.nbytes for part in (self.delta, self.start) if part is not None)
        trained += sum(weight.nbytes for weight in (self.weights or {}).values())
        return self.state.nbytes + trained + self.tokens_T.nbytes + self.entropy_T.nbytes

    def to(self, device: torch.device | str) -> Self:
        """The same adapter with state and delta on `device`; itself where they are there already.

        The document's tokens and entropies stay on the host, where positions are chosen, and so
        does `start`, which no answer needs.
        """
        device = torch.device(device)
        parts = [*self.state.tensors(), *(self.delta.parameters() if self.delta else [])]
        kept = [self.tokens_T, self.entropy_T, *(self.start.tensors() if self.start else [])]
        on_host = all(tensor.device.type == "cpu" for tensor in kept)
        if on_host and all(part.device == device for part in parts):
            return self
        return dataclasses.replace(
            self,
            tokens_T=self.tokens_T.cpu(),
            entropy_T=self.entropy_T.cpu(),
            state=self.state.to(device),
            delta=self.delta.to(device) if self.delta else None,
            start=self.start.to("cpu") if self.start else None,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat names for safetensors, on the host."""
        tensors = {
            "document.tokens": self.tokens_T.to(torch.int32),
            "document.entropy": self.entropy_T.float(),
            **self.state.to_tensors(),
            **(self.delta.to_tensors() if self.delta else {}),
            **(self.start.to_tensors("start.") if self.start else {}),
            **{f"weights.{name}": weight for name, weight in (self.weights or {}).items()},
        }
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Self:
        """The inverse of `to_tensors`."""
        has_delta = any(name.startswith("delta.") for name in tensors)
        start = RecurrentState.from_tensors(tensors, "start.")
        prefix = "weights."
        weights = {
            name[len(prefix) :]: tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        return cls(
            tokens_T=tensors["document.tokens"].long(),
            entropy_T=tensors["document.entropy"],
            state=RecurrentState.from_tensors(tensors),
            delta=LoraDelta.from_tensors(tensors) if has_delta else None,
            start=start if start.layers else None,
            weights=weights or None,
            manifest=manifest,
        )


def read_adapter_file(path: str) -> Adapter:
    """Read and verify one adapter file. Raises CorruptAdapterError naming the file."""
    return Adapter.from_tensors(*read_verified(path, FORMAT))
