"""Prose to hide needles in: sentences in order, read from text files or corpora.

Knows nothing of needles. Token counts are asked from a callable and kept per sentence, so that
drawing many documents from one haystack stays cheap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from imprint.adapters.evaluation.json_lines import is_json_lines, read_json_lines

_SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s+(?=["'(\[]?[A-Z0-9])""")
_MAX_SENTENCE_CHARS = 400


def split_sentences(text: str) -> list[str]:
    """Sentences of `text` with whitespace runs made one space; longer ones are cut near 400
    characters.
    """
    text = " ".join(text.split())
    edges = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    sentences: list[str] = []
    for start, stop in pairwise(edges):
        sentence = text[start:stop].strip()
        while len(sentence) > _MAX_SENTENCE_CHARS:
            cut = sentence.rfind(" ", 1, _MAX_SENTENCE_CHARS)
            cut = cut if cut > 0 else _MAX_SENTENCE_CHARS
            sentences.append(sentence[:cut])
            sentence = sentence[cut:].strip()
        if sentence:
            sentences.append(sentence)
    return sentences


def read_texts(path: Path) -> Iterator[str]:
    """Texts of a `.txt` file (one), or of a `.jsonl` / `.jsonl.zst` corpus (the field `text` of
    each line).

    Raises `ValueError` for another suffix, a torn file or a line without `text`.
    """
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    if not is_json_lines(path):
        raise ValueError(f"haystack must be .txt, .jsonl or .jsonl.zst, got {path.name}")
    for where, row in read_json_lines(path):
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{where} has no text field")
        yield text


class Haystack:
    """Sentences of prose in reading order; runs past the end continue at the start."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.sentences: list[str] = [s for text in texts for s in split_sentences(text)]
        if not self.sentences:
            raise ValueError("the haystack holds no text")
        self._num_tokens: dict[int, int] = {}
        self._counter: Callable[[str], int] | None = None

    @classmethod
    def from_file(cls, path: Path, *, max_chars: int = 8_000_000) -> Haystack:
        """Read `path` (see `read_texts`), stopping after the text that passes `max_chars`."""
        texts: list[str] = []
        num_chars = 0
        for text in read_texts(path):
            texts.append(text)
            num_chars += len(text)
            if num_chars >= max_chars:
                break
        return cls(texts)

    def __len__(self) -> int:
        return len(self.sentences)

    def run(self, start: int, budget_tokens: int, num_tokens: Callable[[str], int]) -> list[str]:
        """Sentences from `start` on, as many as fit into `budget_tokens` when counted one by one.

        Counts are kept as long as the same callable comes: pass a method or function, not a new
        lambda.
        """
        if self._counter != num_tokens:
            self._counter, self._num_tokens = num_tokens, {}
        chosen: list[str] = []
        while True:
            index = (start + len(chosen)) % len(self.sentences)
            count = self._num_tokens.get(index)
            if count is None:
                count = self._num_tokens[index] = num_tokens(" " + self.sentences[index])
            if count > budget_tokens:
                return chosen
            budget_tokens -= max(count, 1)
            chosen.append(self.sentences[index])
