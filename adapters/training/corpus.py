"""Prose and vocabulary for training: documents of a corpus folder, cut into sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from imprint.adapters.evaluation.haystack import split_sentences
from imprint.adapters.evaluation.json_lines import read_json_lines

_WORD = re.compile(r"[A-Za-z]{3,12}")


def read_documents(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of corpora, without those marked `us_only`. Raises ValueError for one without text."""
    for path in paths:
        for where, document in read_json_lines(path):
            if not isinstance(document.get("text"), str):
                raise ValueError(f"{where} has no field 'text'")
            if not document.get("us_only"):
                yield document["text"]


class Prose:
    """Sentences of many documents, drawn as consecutive runs, and the words they are made of."""

    def __init__(self, paths: list[Path], *, max_chars: int, seed: int = 0) -> None:
        """Keep up to 60,000 characters of each document, in a shuffled order, up to `max_chars`."""
        texts = list(read_documents(paths))
        random.Random(seed).shuffle(texts)
        self.documents: list[list[str]] = []
        words: dict[str, int] = {}
        total_chars = 0
        for text in texts:
            start = random.Random(f"{seed}:{total_chars}").randrange(max(len(text) - 60_000, 1))
            piece = text[start : start + 60_000]
            sentences = split_sentences(piece)[1:-1]
            if len(sentences) < 8:
                continue
            self.documents.append(sentences)
            for word in _WORD.findall(piece):
                words[word] = words.get(word, 0) + 1
            total_chars += len(piece)
            if total_chars >= max_chars:
                break
        if not self.documents:
            raise ValueError("the corpus holds no usable document")
        self.words = sorted(word for word, count in words.items() if count >= 3)

    def run(self, rng: random.Random, num_chars: int) -> list[str]:
        """Consecutive sentences of at least `num_chars` characters, from one or more documents."""
        sentences: list[str] = []
        while num_chars > 0:
            document = rng.choice(self.documents)
            at = rng.randrange(len(document))
            while num_chars > 0 and at < len(document):
                sentences.append(document[at])
                num_chars -= len(document[at]) + 1
                at += 1
        return sentences
