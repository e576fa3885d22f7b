"""A small corpus made on the spot, and what is trained on it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import zstandard

from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.tasks import Tasks
from imprint.adapters.training.tokenizer import train_tokenizer
from imprint.models.tokenizer import load_tokenizer

_WORDS = ("the", "river", "ran", "past", "old", "mills", "seven", "men", "carried", "lanterns")


def _document(rng: random.Random) -> str:
    sentences = []
    for _ in range(60):
        words = [rng.choice(_WORDS) for _ in range(rng.randint(5, 12))]
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one train-*.jsonl.zst file of invented prose."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    lines = [json.dumps({"text": _document(rng), "us_only": i == 0}) for i in range(30)]
    blob = zstandard.ZstdCompressor().compress("\n".join(lines).encode())
    (folder / "train-00000.jsonl.zst").write_bytes(blob)
    return folder


@pytest.fixture(scope="session")
def tasks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """Every task over the invented prose, with a tokenizer trained on it."""
    prose = Prose(sorted(corpus.glob("*.zst")), max_chars=10**6)
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((" ".join(document) for document in prose.documents), 320, folder)
    return Tasks(prose, load_tokenizer(folder))
