"""Configurations of public checkpoints, and how they are sized down. Numbers only; no torch.

What the files on the hub say wins: nothing here is read when a checkpoint is loaded. Where a
public value is not known, the note says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from imprint.models.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicModel:
    """One public checkpoint: its config.json, and how its tensors are spelled."""

    hub_id: str
    config: dict[str, Any]
    """The keys of config.json that set the architecture."""
    dtype: str
    """Type on disk, in torch's name."""
    fused_mlp: bool = False
    """`mlp.gate_proj` holds the rows of gate_proj, then those of up_proj."""
    unused_d: bool = False
    """Every layer has an `attn.D` of zeros."""


_SHARED = {
    "vocab_size": 32000,
    "num_hidden_layers": 24,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PUBLIC_MODELS: Final[dict[str, PublicModel]] = {
    "delta_net-1.3B": PublicModel(
        hub_id="fla-hub/delta_net-1.3B-100B",
        dtype="bfloat16",
        config={
            **_SHARED,
            "model_type": "delta_net",
            "hidden_size": 2048,
            "num_heads": 16,
            "expand_k": 1.0,
            "expand_v": 1.0,
            "use_gate": False,
            "use_beta": True,
            "use_short_conv": True,
            "conv_size": 4,
            "qk_norm": "l2",
            "qk_activation": "silu",
        },
    ),
    "gated_deltanet-1.3B": PublicModel(
        hub_id="m-a-p/1.3B-100B-GatedDeltaNet-pure",
        dtype="float32",
        unused_d=True,
        config={
            **_SHARED,
            "model_type": "gated_deltanet",
            "hidden_size": 2048,
            "num_heads": 8,
            "head_dim": 256,
            "expand_v": 1.0,
            "use_gate": True,
            "use_short_conv": True,
            "conv_size": 4,
        },
    ),
    # width of its heads not known: heads as wide as together they fill the model
    "gated_deltanet-1.3B-fused": PublicModel(
        hub_id="linear-moe-hub/Gated-Deltanet-1.3B",
        dtype="bfloat16",
        fused_mlp=True,
        unused_d=True,
        config={
            **_SHARED,
            "model_type": "gated_deltanet",
            "hidden_size": 2048,
            "num_heads": 4,
            "head_dim": 512,
            "expand_v": 1.0,
            "use_gate": True,
            "use_short_conv": False,
        },
    ),
    # published in three variants of the same tensors; this is the one with Muon
    "lact-760M": PublicModel(
        hub_id="YunjinZhang/lact_llm",
        dtype="bfloat16",
        config={
            **_SHARED,
            "model_type": "lact_swiglu",
            "hidden_size": 1536,
            "num_attn_heads": 24,
            "num_lact_heads": 4,
            "inter_multi": 1,
            "qkv_bias": False,
            "attn_qk_norm": False,
            "qkv_silu": True,
            "no_v_silu": False,
            "lact_chunk_size": 2048,
            "window_size": 2048,
            "lr_dim": 1,
            "lr_parameterization": "mamba",
            "learnable_ttt_scale": True,
            "w0_w2_low_rank": 32,
            "fw_init_gain": 0.5,
            "use_muon": True,
            "use_momentum": True,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
        },
    ),
}
"""By the name that `imprint models fake --like` takes."""


def sized_config(
    model: PublicModel,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
) -> dict[str, Any]:
    """The public configuration with fewer layers, less width or a smaller vocabulary.

    With `hidden` the heads keep their width and become fewer; a model narrower than one head has
    one head of its own width. Raises CheckpointError for a width that no whole number of heads
    fills.
    """
    raw = dict(model.config)
    for key, value in (("num_hidden_layers", layers), ("vocab_size", vocab)):
        if value is not None:
            raw[key] = _positive(key, value)
    if hidden is not None:
        _narrow(raw, _positive("hidden_size", hidden))
    return raw


def _narrow(raw: dict[str, Any], hidden: int) -> None:
    public = raw["hidden_size"]
    raw["hidden_size"] = hidden
    for key in ("num_heads", "num_attn_heads", "num_lact_heads"):
        if key in raw:
            width = public // raw[key]
            raw[key] = max(1, hidden // width)
            if hidden % raw[key] or (hidden > width and hidden % width):
                raise CheckpointError(
                    f"hidden_size {hidden} is not a multiple of the head width {width}"
                )
    if "head_dim" in raw:
        raw["head_dim"] = hidden // raw["num_heads"]


def _positive(key: str, value: int) -> int:
    if value < 1:
        raise CheckpointError(f"{key} must be at least 1, got {value}")
    return value
