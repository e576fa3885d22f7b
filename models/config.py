"""What a checkpoint's config.json says about a model, checked once; one class an architecture.

Key names are those of the public checkpoints. Knows nothing of tensors. `imprint.models.registry`
finds the class of a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from imprint.models.errors import CheckpointError

BUNDLED = Path(__file__).resolve().parent / "pretrained" / "imprint-tiny"
"""Folder of the checkpoint that ships with the package."""

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "int | None": ((int, type(None)), "an integer or null"),
    "float": ((float, int), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What every architecture has: vocabulary, width, layers, MLP, norms."""

    model_type: str
    """Architecture, the key of `imprint.models.registry.ARCHITECTURES`."""
    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: int | None = 4
    """Sets the MLP width where `intermediate_size` is null; null means 4."""
    intermediate_size: int | None = None
    """MLP width; null means 256 * ceil(hidden_size * hidden_ratio * 2/3 / 256), as in fla."""
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attn": (None,),
        "attnres_block_size": (None,),
        "hidden_act": ("swish", "silu"),
    }
    """Keys that would change the computation, with the values under which they do not."""

    def __post_init__(self) -> None:
        for field in fields(self):
            kinds, words = _KINDS[str(field.type)]
            value = getattr(self, field.name)
            if type(value) not in kinds:  # isinstance would take true for a number
                raise CheckpointError(f"config: {field.name} must be {words}, got {value!r}")
        own_type = type(self).__dataclass_fields__["model_type"].default
        if self.model_type != own_type:
            raise CheckpointError(
                f"config: model_type {self.model_type!r} is not that of {type(self).__name__}, "
                f"{own_type!r}"
            )
        self._check_positive("vocab_size", "hidden_size", "num_hidden_layers")
        self._check()

    def _check(self) -> None:
        """What an architecture demands beyond the types of its fields; raises CheckpointError."""

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"config: {name} must be at least 1, got {getattr(self, name)}"
                )

    @property
    def mlp_dim(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read the known keys; refuse values of others that would change the computation."""
        for key, allowed in cls.refused.items():
            if key in raw and raw[key] not in allowed:
                words = " or ".join(json.dumps(value) for value in allowed)
                raise CheckpointError(
                    f"config: {key} {raw[key]!r} is not supported; it must be {words}"
                )
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in raw.items() if key in known})

    def save(self, folder: Path) -> None:
        """Write `folder`/config.json."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetConfig(ModelConfig):
    """DeltaNet (Yang et al., arXiv 2406.06484); the defaults are the public 1.3B checkpoint's."""

    model_type: str = "delta_net"
    num_heads: int = 16
    expand_k: float = 1.0
    """Width of all keys together, as a multiple of `hidden_size`."""
    expand_v: float = 1.0
    """Width of all values together, as a multiple of `hidden_size`."""
    use_gate: bool = False
    """Output gate: silu(g_proj(x)) multiplies the normalised read-out."""
    use_short_conv: bool = True
    conv_size: int = 4
    """Taps of the causal depthwise convolutions before q, k and v."""
    use_beta: bool = True
    """Per-token writing strength; without it every token is written with strength 1."""
    allow_neg_eigval: bool = False
    """Writing strength in [0, 2] instead of [0, 1]."""
    qk_norm: str = "l2"
    qk_activation: str = "silu"

    def _check(self) -> None:
        self._check_positive("num_heads", "conv_size")
        for name in ("key_dim", "value_dim"):
            width = getattr(self, name)
            if width % self.num_heads:
                raise CheckpointError(
                    f"config: {name} {width} is not divisible by num_heads {self.num_heads}"
                )
        if self.qk_norm != "l2" or self.qk_activation != "silu":
            raise CheckpointError(
                "config: only qk_norm 'l2' with qk_activation 'silu' is supported, got "
                f"{self.qk_norm!r} with {self.qk_activation!r}"
            )

    @property
    def key_dim(self) -> int:
        return int(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        return int(self.hidden_size * self.expand_v)

    @property
    def head_k_dim(self) -> int:
        return self.key_dim // self.num_heads

    @property
    def head_v_dim(self) -> int:
        return self.value_dim // self.num_heads

    @property
    def num_value_heads(self) -> int:
        return self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNetConfig(ModelConfig):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464); the defaults are fla's."""

    model_type: str = "gated_deltanet"
    num_hidden_layers: int = 21
    num_heads: int = 6
    """Heads of queries and keys."""
    num_v_heads: int | None = None
    """Heads of values, a multiple of `num_heads`: a query and its key serve several in a row.
    Null means `num_heads`."""
    head_dim: int = 256
    """Key width of a head."""
    expand_v: float = 2.0
    """Value width of a head, as a multiple of `head_dim`."""
    use_gate: bool = True
    """Output gate: silu(g_proj(x)) multiplies the normalised read-out."""
    use_short_conv: bool = True
    conv_size: int = 4
    """Taps of the causal depthwise convolutions before q, k and v."""
    allow_neg_eigval: bool = False
    """Writing strength in [0, 2] instead of [0, 1]."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ModelConfig.refused,
        "output_gate_activation": ("swish", "silu"),
    }

    def _check(self) -> None:
        self._check_positive("num_heads", "num_value_heads", "head_dim", "conv_size")
        if self.num_value_heads % self.num_heads:
            raise CheckpointError(
                f"config: num_v_heads {self.num_v_heads} is not a multiple of num_heads "
                f"{self.num_heads}"
            )
        if not math.isclose(self.head_dim * self.expand_v, self.head_v_dim, rel_tol=1e-5):
            raise CheckpointError(
                f"config: expand_v {self.expand_v} times head_dim {self.head_dim} is not a whole "
                "number"
            )

    @property
    def use_beta(self) -> bool:
        """There is no variant without a per-token writing strength."""
        return True

    @property
    def num_value_heads(self) -> int:
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_k_dim(self) -> int:
        return self.head_dim

    @property
    def head_v_dim(self) -> int:
        return int(self.head_dim * self.expand_v)

    @property
    def key_dim(self) -> int:
        return self.num_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        return self.num_value_heads * self.head_v_dim
