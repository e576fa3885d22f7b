"""Text to token ids and back, and how a question is put to a base model. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers.decoders import DecodeStream as _DecodeStream

from imprint.models.errors import CheckpointError
from imprint.models.prompts import (
    DEFAULT_QUESTION_TEMPLATE,
    ChatMessage,
    QuestionTemplate,
    checkpoint_template,
    read_template,
)

_BYTE_TOKEN: Final = re.compile("<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


class DecodeStream:
    """Ids in, text out as soon as its characters are complete."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = _DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str | None:
        """The text that `token_id` completes, or None while a character is not whole."""
        text: str | None = self._stream.step(self._tokenizer, token_id)
        return text


class Tokenizer:
    """A `tokenizers` tokenizer with the few things a server needs of it."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        question_template: QuestionTemplate | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._template = question_template or QuestionTemplate(DEFAULT_QUESTION_TEMPLATE)

    @property
    def question_template(self) -> str:
        """The template as it was written."""
        return self._template.source

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of `text`, no special tokens added. Lone surrogates become U+FFFD.

        Some tokenizers put a space before a text; one that `continues` another gets none.
        """
        tokenizer = self._continuing if continues else self._tokenizer
        return list(tokenizer.encode(_well_formed(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """Ids of several texts, each as `encode` gives them."""
        clean = [_well_formed(text) for text in texts]
        tokenizer = self._continuing if continues else self._tokenizer
        encodings = tokenizer.encode_batch(clean, add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer without the space that it puts before a text, if it puts one."""
        parts = json.loads(self._tokenizer.to_str())
        if not _drop_prefix(parts):
            return self._tokenizer
        return tokenizers.Tokenizer.from_str(json.dumps(parts))

    def token_ends(self, text: str, *, continues: bool = False) -> list[int]:
        """For each token that `encode` gives, the characters of `text` up to its end; ascending.

        A character of several tokens counts with the first, one of none with the next.
        """
        tokenizer = self._continuing if continues else self._tokenizer
        encoding = tokenizer.encode(_well_formed(text), add_special_tokens=False)
        ends = list(accumulate((end for _, end in encoding.offsets), max))
        return [*ends[:-1], len(text)] if ends else []

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, also where they are a part of a character only."""
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        if id in self._special_ids:
            return str(token).encode()
        if self._byte_level:
            return bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else str(token).replace("▁", " ").encode()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        return any(step.get("type") == "ByteLevel" for step in decoder.get("decoders", [decoder]))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out, broken characters become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_stream(self) -> DecodeStream:
        """A fresh incremental decoder."""
        return DecodeStream(self._tokenizer)

    def format_question(self, question: str) -> str:
        """The prompt that puts `question` to the model after a document."""
        return self._template.render(question)

    def format_chat(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt that puts a conversation to the model after a document.

        Raises CheckpointError where the checkpoint's template refuses it.
        """
        return self._template.render_chat(messages)


def load_tokenizer(path: Path | str, *, question_template: Path | None = None) -> Tokenizer:
    """Read tokenizer.json of a checkpoint folder; ids of bos and eos come from config.json.

    `question_template` is a file that replaces the checkpoint's own template. Raises
    CheckpointError naming the file that is missing or cannot be used.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no tokenizer.json; give the folder of a checkpoint")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any unreadable file
        raise CheckpointError(
            f"{file} is not a tokenizer the `tokenizers` library reads: {error}"
        ) from None
    config = _read_json(folder / "config.json")
    if question_template is None:
        template = checkpoint_template(folder, _read_json(folder / "tokenizer_config.json"))
    else:
        template = read_template(question_template)
    return Tokenizer(
        inner,
        bos_id=config.get("bos_token_id"),
        eos_id=config.get("eos_token_id"),
        question_template=template,
    )


def _drop_prefix(parts: dict[str, Any]) -> bool:
    """Take what adds a space before a text out of a tokenizer.json; whether there was any."""
    found = False
    normalizer = parts.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step.get("type") != "Prepend"]
    if len(kept) < len(steps):
        found = True
        parts["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    pre_tokenizer = parts.get("pre_tokenizer") or {}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("prepend_scheme", "never") != "never":
            found, step["prepend_scheme"] = True, "never"
        if step.get("add_prefix_space"):
            found, step["add_prefix_space"] = True, False
    return found


def _well_formed(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return raw
