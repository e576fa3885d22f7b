"""What a REFINE training run learns from: pieces of long text, or prompts with their responses.

Which of them an update sees is a function of (seed, step, place), so a run can stop anywhere.
Limit: everything is kept in memory.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from imprint.adapters.evaluation.json_lines import is_json_lines, read_json_lines
from imprint.adapters.training.corpus import read_documents
from imprint.models.tokenizer import Tokenizer

_CHARS_PER_TOKEN = 8  # more than a token has; what is too short is drawn longer


@dataclass(frozen=True, slots=True)
class Example:
    """One document, and what is to be answered to it: nothing in mid-training."""

    document: list[int]
    response: list[int]


class Examples(Protocol):
    """A source of examples."""

    def draw(self, rng: random.Random) -> Example: ...


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The .jsonl and .jsonl.zst files that are named, or that lie in named folders, sorted."""
    files: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(path.glob("*"))
        found = [file for file in found if is_json_lines(file)]
        if not found:
            raise ValueError(f"{path} holds no .jsonl or .jsonl.zst file")
        files += found
    return files


class LongTexts:
    """Pieces of `num_tokens` tokens, each from a place drawn evenly over all characters."""

    def __init__(
        self, files: Sequence[Path], tokenizer: Tokenizer, *, num_tokens: int, max_chars: int
    ) -> None:
        self._tokenizer, self._num_tokens = tokenizer, num_tokens
        self._texts: list[str] = []
        total = 0
        for text in read_documents(files):
            self._texts.append(text[: max_chars - total])
            total += len(self._texts[-1])
            if total >= max_chars:
                break
        if total < num_tokens:
            raise ValueError(f"{total} characters of text are too few for {num_tokens} tokens")
        self._ends = list(itertools.accumulate(map(len, self._texts)))

    def draw(self, rng: random.Random) -> Example:
        """A piece; where a text ends too early, the next one follows."""
        place = rng.randrange(self._ends[-1])
        index = bisect_right(self._ends, place)
        start = place - (self._ends[index] - len(self._texts[index]))
        tokens: list[int] = []
        while len(tokens) < self._num_tokens:
            missing = self._num_tokens - len(tokens)
            text = self._texts[index]
            piece = text[start : start + missing * _CHARS_PER_TOKEN]
            tokens += self._tokenizer.encode(piece)[:missing]
            start += len(piece)
            if start >= len(text):
                index, start = (index + 1) % len(self._texts), 0
        return Example(tokens, [])


class Pairs:
    """Prompts with responses, from records of either form:

    `{"prompt", "response"}`, or `{"context", "question", "answers"}`, whose question is put by the
    checkpoint's template and whose first answer is the response. `us_only` records are left out.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Tokenizer, *, most_tokens: int) -> None:
        self._examples: list[Example] = []
        num_long = 0
        for where, record in _records(files):
            prompt, asked, response = _texts_of(where, record, tokenizer)
            document = [*tokenizer.encode(prompt), *tokenizer.encode(asked, continues=True)]
            answer = tokenizer.encode(response, continues=True)
            if 2 <= len(document) <= most_tokens and answer:
                self._examples.append(Example(document, answer))
            else:
                num_long += 1
        if not self._examples:
            raise ValueError(
                f"no prompt has 2 to {most_tokens} tokens and a response; {num_long} have not"
            )

    def __len__(self) -> int:
        return len(self._examples)

    def draw(self, rng: random.Random) -> Example:
        """Any of them."""
        return rng.choice(self._examples)


def _records(files: Sequence[Path]) -> Iterable[tuple[str, dict[str, Any]]]:
    for file in files:
        for where, record in read_json_lines(file):
            if not record.get("us_only"):
                yield where, record


def _texts_of(where: str, record: dict[str, Any], tokenizer: Tokenizer) -> tuple[str, str, str]:
    """The document, what follows it in the prompt, and the response with the line's end."""
    if "prompt" in record and "response" in record:
        return record["prompt"], "", record["response"]
    try:
        answers = record["answers"]
        question = tokenizer.format_question(record["question"])
        return record["context"], question, f" {answers[0]}\n" if answers else ""
    except KeyError as error:
        raise ValueError(
            f"{where} has no field {error}; it needs prompt and response, or context, question "
            "and answers"
        ) from None
