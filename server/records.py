"""The journal's tables, and what their rows look like in Python. Opens no file."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 1
ACTIVE = ("queued", "running")
READY = ("succeeded", "rejected")
TERMINAL = (*READY, "failed", "cancelled", "expired")

SCHEMA = """
CREATE TABLE documents (
    sha256 TEXT PRIMARY KEY,
    text BLOB NOT NULL
) STRICT;
CREATE TABLE adaptations (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    model TEXT NOT NULL,
    method TEXT NOT NULL,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL,
    pinned INTEGER NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    deleting INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0,
    num_tokens INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    nbytes INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL,
    timeout_s REAL,
    expires_after_s REAL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    expires_at REAL,
    metadata TEXT NOT NULL,
    progress TEXT NOT NULL DEFAULT '{}',
    error TEXT,
    result TEXT,
    usage TEXT NOT NULL DEFAULT '{}'
) STRICT;
CREATE UNIQUE INDEX one_of_a_kind ON adaptations(owner, sha256, model, method, seed)
    WHERE status IN ('queued', 'running', 'succeeded', 'rejected')
        AND deleting = 0 AND cancel_requested = 0;
CREATE INDEX by_status ON adaptations(status);
CREATE INDEX by_document ON adaptations(sha256);
CREATE TABLE events (
    adaptation INTEGER NOT NULL REFERENCES adaptations(number) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    created_at REAL NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (adaptation, sequence)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAdaptation:
    """What a request asks for, complete enough to run it again in another process."""

    id: str
    owner: str
    text: str
    model: str
    method: dict[str, Any]
    seed: int
    num_tokens: int
    pinned: bool
    """Asked for by name; otherwise made for an answer, and cancelled with it."""
    priority: int = 0
    timeout_s: float | None = None
    expires_after_s: float | None = None
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
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    metadata: dict[str, str]
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
