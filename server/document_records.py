"""What a stored document looks like in Python: new, as a row, and appended. Opens no file."""

import json
import sqlite3
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceText:
    """A text, and what its source said beside it."""

    text: str
    media_type: str = "text/plain"
    title: str | None = None
    references: list[dict[str, Any]] = field(default_factory=list)
    """Places of the source: `{"kind", "number", "start", "end"}`, offsets in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDocument:
    """What a request brings."""

    id: str
    owner: str
    source: SourceText
    num_tokens: int
    metadata: dict[str, str] = field(default_factory=dict)
    expires_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentRow:
    """One document with its newest version."""

    number: int
    id: str
    owner: str
    title: str | None
    media_type: str
    metadata: dict[str, str]
    created_at: float
    expires_at: float | None
    deleting: bool
    version: int
    sha256: str
    """Fingerprint of the whole text: see `document_journal`."""
    num_tokens: int
    num_bytes: int
    updated_at: float
    num_references: int


def document_row(row: sqlite3.Row) -> DocumentRow:
    """A row of the query of `document_journal`."""
    values = dict(row)
    values["metadata"] = json.loads(values["metadata"])
    values["deleting"] = bool(values["deleting"])
    return DocumentRow(**values)
