"""Fixtures for all tests: tiny random models whose vocabulary is the 256 bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from imprint.models.config import DeltaNetConfig
from imprint.models.deltanet import DeltaNet


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: DeltaNet of width 32 with random weights, byte-level tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from imprint.models.checkpoint import save_model

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{char: i for i, char in enumerate(alphabet, start=1)}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    config = DeltaNetConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        intermediate_size=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = DeltaNet(config)
    model.reset_parameters(0)
    save_model(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = {"question_template": "\nQuestion: {question}\nAnswer:"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template), encoding="utf-8")
    (folder / "neutral.txt").write_text("It rained. The sea was calm. " * 40, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> DeltaNet:
    """A DeltaNet of width 32 over the vocabulary of `tiny_checkpoint`, frozen, in float32.

    Its random weights are large enough that states, gates and norms all change the logits.
    """
    return _random_model(torch.float32)


@pytest.fixture(scope="session")
def tiny_model64() -> DeltaNet:
    """`tiny_model` in float64, for comparisons to the last digits."""
    return _random_model(torch.float64)


def _random_model(dtype: torch.dtype) -> DeltaNet:
    config = DeltaNetConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    model = DeltaNet(config)
    model.reset_parameters(1)
    return model.to(dtype).eval().requires_grad_(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
