"""Trains the bundled model's tokenizer: byte-level BPE, every digit a token of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE

END_OF_TEXT = "<|end|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write `folder`/tokenizer.json and tokenizer_config.json. Id 0 is the end of a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = json.dumps({"question_template": DEFAULT_QUESTION_TEMPLATE}, indent=2)
    (folder / "tokenizer_config.json").write_text(template + "\n", encoding="utf-8")
