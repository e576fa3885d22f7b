"""Files of one JSON object a line, plain or compressed with zstd. Knows nothing of their fields."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard


def is_json_lines(path: Path) -> bool:
    """Whether the name says so: `.jsonl` or `.jsonl.zst`."""
    return path.name.endswith((".jsonl", ".jsonl.zst"))


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of the lines that are not blank, each with a name for where it stands.

    Raises `ValueError` naming the file and line that cannot be used, `OSError` where it cannot be
    read.
    """
    with path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{path.name} line {number}"
                        yield where, _parsed(line, where)
            except zstandard.ZstdError as error:
                raise ValueError(f"{path.name} is not a whole zstd file: {error}") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path.name} is not UTF-8 text: {error}") from None


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object")
    return row
