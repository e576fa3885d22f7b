"""Fixtures for evaluating: arms on the tiny random model, with studies of a few hundred tokens."""

from __future__ import annotations

import pytest

from imprint.adapters.config import RefineConfig
from imprint.adapters.evaluation.arms import ArmSetup
from imprint.adapters.evaluation.retrieval import RetrievalConfig
from imprint.adapters.gate import load_neutral
from imprint.models.checkpoint import load_model
from imprint.models.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def setup(tiny_checkpoint):
    """Two short steps, four places for the gate."""
    tokenizer = load_tokenizer(tiny_checkpoint)
    fast = {
        "steps": 2,
        "positions": 2,
        "probe_places": 4,
        "selection": "entropy",
        "rollout_length": 5,
        "cue_tokens": 8,
        "blend_factors": (1.0, 0.5, 0.25),
    }
    return ArmSetup(
        model=load_model(tiny_checkpoint),
        tokenizer=tokenizer,
        refine=RefineConfig.preset("default", group_size=2, **fast),
        focus=RefineConfig.preset("focus", **fast),
        retrieval=RetrievalConfig(passage_tokens=32, num_passages=2),
        neutral=load_neutral(tiny_checkpoint, tokenizer),
    )
