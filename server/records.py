"""What the rows of adaptations and events look like in Python. Opens no file."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

ACTIVE = ("queued", "running")
READY = ("succeeded", "rejected")
TERMINAL = (*READY, "failed", "cancelled", "expired")
IMPORT = "import"
"""The type of the method of an adaptation whose adapter came as a file; no client can name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredText:
    """A version of a document that the journal holds."""

    document_id: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedFile:
    """An adapter's file, whose document is known in tokens only."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAdaptation:
    """What a request asks for, complete enough to run it again in another process."""

    id: str
    owner: str
    text: str | StoredText | ImportedFile
    """What to study: text that came with the request, or a stored document's; or what stands for
    a text that nobody knows."""
    model: str
    method: dict[str, Any]
    seed: int
    num_tokens: int
    pinned: bool
    """Asked for by name; otherwise made for an answer, and cancelled with it."""
    priority: int = 0
    timeout_s: float | None = None
    expires_after_s: float | None = None
    idle_expires_after_s: float | None = None
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationRow:
    """One adaptation as the journal knows it."""

    number: int
    id: str
    owner: str
    sha256: str
    model: str
    method: dict[str, Any]
    seed: int
    status: str
    pinned: bool
    cancel_requested: bool
    deleting: bool
    attempt: int
    restarts: int
    num_tokens: int
    num_bytes: int
    nbytes: int
    priority: int
    timeout_s: float | None
    expires_after_s: float | None
    idle_expires_after_s: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    used_at: float | None
    metadata: dict[str, str]
    document_id: str | None
    """The owner's newest document with this content; None where it was only sent along."""
    progress: dict[str, Any]
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    usage: dict[str, Any]

    @property
    def active(self) -> bool:
        """Queued or running."""
        return self.status in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One event; `sequence` counts from 1 within its adaptation, without gaps."""

    sequence: int
    created_at: float
    kind: str
    data: dict[str, Any]


def adaptation_row(row: sqlite3.Row) -> AdaptationRow:
    """A row of `adaptations`, its JSON columns read."""
    values = dict(row)
    for name in ("method", "metadata", "progress", "usage"):
        values[name] = json.loads(values[name])
    for name in ("error", "result"):
        values[name] = None if values[name] is None else json.loads(values[name])
    for name in ("pinned", "cancel_requested", "deleting"):
        values[name] = bool(values[name])
    return AdaptationRow(**values)


def event_row(row: sqlite3.Row) -> EventRow:
    """A row of `events`."""
    return EventRow(
        sequence=row["sequence"],
        created_at=row["created_at"],
        kind=row["kind"],
        data=json.loads(row["data"]),
    )
