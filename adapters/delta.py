"""A document's delta and its optimizer: which projections, which rank, which rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imprint.adapters.config import RefineConfig
from imprint.adapters.errors import AdaptationError
from imprint.adapters.optimizer import AdamW
from imprint.models.architecture import FastWeightModel
from imprint.models.lora import LoraDelta


def init_delta(
    model: FastWeightModel, config: RefineConfig, *, seed: int, num: int = 1
) -> LoraDelta:
    """Fresh deltas on projections whose names end in one of `config.lora_targets` (or on all)."""
    delta = LoraDelta.init(
        delta_targets(model, config),
        config.lora_rank,
        seed=seed,
        num=num,
        device=model.device,
        dtype=delta_dtype(model),
    )
    return delta.requires_grad_()


def delta_targets(model: FastWeightModel, config: RefineConfig) -> dict[str, tuple[int, int]]:
    """The projections that a delta changes, with their input and output widths."""
    targets = {
        name: shape
        for name, shape in model.lora_targets().items()
        if not config.lora_targets or name.endswith(config.lora_targets)
    }
    if not targets:
        raise AdaptationError(
            "invalid_method", f"no projection's name ends in one of {list(config.lora_targets)}"
        )
    return targets


def delta_dtype(model: FastWeightModel) -> torch.dtype:
    """The type of a delta's numbers."""
    # never below float32: a small step rounded to bfloat16 loses its direction
    return torch.promote_types(model.dtype, torch.float32)


def make_optimizer(parameters: Sequence[Tensor], config: RefineConfig) -> AdamW:
    """A fresh AdamW as `config` says."""
    return AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
    )
