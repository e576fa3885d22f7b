"""Fixtures for studying: a document worth learning, and what reading it leaves."""

from __future__ import annotations

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.document import DocumentReader
from imprint.models import DeltaNet


@pytest.fixture(scope="session")
def document() -> list[int]:
    """200 tokens in which one phrase of 30 random tokens comes back again and again."""
    phrase = torch.randint(257, (30,), generator=torch.Generator().manual_seed(0))
    return phrase.repeat(10)[:200].tolist()


@pytest.fixture(scope="session")
def small() -> RefineConfig:
    """A study of a few hundred tokens."""
    return RefineConfig(
        steps=3,
        positions=3,
        rollout_length=3,
        group_size=2,
        cue_tokens=4,
        segment_tokens=64,
        probe_places=8,
        learning_rate=1e-2,
        lora_rank=2,
        lora_targets=("q_proj", "o_proj"),
        selection="entropy",
        blend_factors=(1.0, 0.5, 0.25),
        neutral_margin=0.05,
    )


@pytest.fixture(scope="session")
def read_adapter(tiny_model: DeltaNet, document: list[int]) -> Adapter:
    """What reading `document` leaves; tests must not write to it."""
    reader = DocumentReader(tiny_model, document, segment_tokens=64)
    list(reader.run())
    assert reader.adapter is not None
    return reader.adapter
