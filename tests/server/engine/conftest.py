"""The tiny model, one that breaks on demand, and engines on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imprint.models import DeltaNet, Tokenizer, load_model, load_tokenizer
from imprint.server.worker_config import WorkerConfig
from support.engine_rig import FaultyModel, Rig


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DeltaNet:
    return load_model(tiny_checkpoint)


@pytest.fixture
def faulty(model: DeltaNet) -> FaultyModel:
    copy = FaultyModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def make_rig(
    model: DeltaNet, tokenizer: Tokenizer, tiny_checkpoint: Path, tmp_path: Path
) -> Callable[..., Rig]:
    def make(other: DeltaNet | None = None, **changes: Any) -> Rig:
        settings: dict[str, Any] = {
            "model": str(tiny_checkpoint), "store": str(tmp_path / "store"), "num_slots": 8,
            "segment_tokens": 32, "step_tokens": 32,
        }  # fmt: skip
        return Rig(other or model, tokenizer, WorkerConfig(**{**settings, **changes}))

    return make
