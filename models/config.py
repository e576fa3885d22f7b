"""What a checkpoint's config.json says about a model, checked once. Knows nothing of tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

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
    """Architecture of a fast-weight language model, in key names of the public fla checkpoints."""

    model_type: str = "delta_net"
    """Architecture, the key under which `imprint.models.checkpoint` registers the model class."""
    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 16
    expand_k: float = 1.0
    """Width of all keys together, as a multiple of `hidden_size`."""
    expand_v: float = 1.0
    """Width of all values together, as a multiple of `hidden_size`."""
    hidden_ratio: int | None = 4
    """Sets the MLP width where `intermediate_size` is null; null means 4."""
    intermediate_size: int | None = None
    """MLP width; null means 256 * ceil(hidden_size * hidden_ratio * 2/3 / 256), as in fla."""
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
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            kinds, words = _KINDS[str(field.type)]
            value = getattr(self, field.name)
            if type(value) not in kinds:  # isinstance would take true for a number
                raise CheckpointError(f"config: {field.name} must be {words}, got {value!r}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "conv_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"config: {name} must be at least 1, got {getattr(self, name)}"
                )
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
    def mlp_dim(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Read the known keys; refuse values of others that would change the computation."""
        if raw.get("attn") is not None:
            raise CheckpointError("config: hybrid attention layers ('attn') are not supported yet")
        if raw.get("attnres_block_size") is not None:
            raise CheckpointError("config: 'attnres_block_size' is not supported")
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in raw.items() if key in known})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/config.json. Raises CheckpointError if it is missing or not JSON."""
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} holds no config.json; give the folder of a checkpoint"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        return cls.from_dict(raw)

    def save(self, folder: Path) -> None:
        """Write `folder`/config.json."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
