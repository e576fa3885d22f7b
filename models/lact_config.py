"""What the config.json of a LaCT checkpoint says, checked once. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from imprint.models.config import ModelConfig
from imprint.models.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class LactConfig(ModelConfig):
    """LaCT (Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884).

    Key names and defaults are those of the published language model (`lact_swiglu`). Its keys
    `fp32_states` and `use_fused_kernel` say how it rounds; here the fast weights are always kept
    and stepped in float32 at least.
    """

    model_type: str = "lact_swiglu"
    num_attn_heads: int = 32
    """Heads of the sliding-window attention; they also cut what rotary positions turn."""
    num_lact_heads: int = 4
    """Heads of the fast weights, each a SwiGLU of its own."""
    inter_multi: float = 1.0
    """Inner width of a fast SwiGLU, as a multiple of its head's width."""
    qkv_bias: bool = False
    attn_qk_norm: bool = False
    """Normalise queries and keys, over all heads together, before anything is done with them."""
    lact_chunk_size: int = 2048
    """Tokens after which the fast weights take a step; counted from the document's start."""
    window_size: int = 2048
    """Tokens that attention sees, the present one among them."""
    qkv_silu: bool = True
    """SiLU on what the fast weights read and write."""
    no_v_silu: bool = False
    """Leaves the values out of `qkv_silu`."""
    learnable_ttt_scale: bool = True
    """Scale what a fast head says by silu(ttt_scale_proj(x))."""
    ttt_nope: bool = False
    """No rotary positions on the queries and keys of the fast weights."""
    use_momentum: bool = True
    use_muon: bool = False
    """Orthogonalise every step of the fast weights by Newton-Schulz iterations."""
    muon_bfloat16: bool = False
    """Iterate in bfloat16, as the published code does, even if the model is loaded in more than
    that. A key of ours: bfloat16 magnifies rounding, so reading in pieces is not reading at once.
    """
    w0_w2_low_rank: int = -1
    """Rank of the initial W0 and W2 beside half the identity; 0 or less: full matrices."""
    fw_init_gain: float = 0.5
    """Scale of freshly drawn low-rank factors."""
    rope_theta: float = 10000.0
    initializer_range: float = 0.006
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ModelConfig.refused,
        "elementwise_affine": (True,),
        "lr_dim": (1,),
        "lr_parameterization": ("mamba",),
        "ttt_loss_type": ("dot_product",),
        "ttt_prenorm": (False,),
    }

    def _check(self) -> None:
        self._check_positive("num_attn_heads", "num_lact_heads", "lact_chunk_size", "window_size")
        for name in ("num_attn_heads", "num_lact_heads"):
            if self.hidden_size % getattr(self, name):
                raise CheckpointError(
                    f"config: hidden_size {self.hidden_size} is not divisible by {name} "
                    f"{getattr(self, name)}"
                )
        if self.attn_head_dim % 2:
            raise CheckpointError(
                f"config: rotary positions need heads of even width, got {self.attn_head_dim}"
            )
        self._check_positive("fast_inner_dim")

    @property
    def attn_head_dim(self) -> int:
        return self.hidden_size // self.num_attn_heads

    @property
    def fast_head_dim(self) -> int:
        return self.hidden_size // self.num_lact_heads

    @property
    def fast_inner_dim(self) -> int:
        return int(self.fast_head_dim * self.inter_multi)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose keys and values a state keeps: for the window, and for a chunk."""
        return max(self.window_size, self.lact_chunk_size)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read the known keys; refuse values of others that would change the computation."""
        if raw.get("use_fused_kernel") and raw.get("use_muon"):
            raise CheckpointError(
                "config: use_fused_kernel with use_muon is not supported: the fused kernel "
                "orthogonalises W0 and W2 as one matrix"
            )
        # the bare form would look for the class as it was before slots were added
        return super(LactConfig, cls).from_dict(raw)
