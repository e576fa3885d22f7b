"""What the server has promised, in SQLite: documents, adaptations, events. Knows no jobs, no HTTP.

Synchronous and single-threaded on purpose. The service calls it in one thread of its own, never on
the event loop: a commit waits for the disk (`synchronous=FULL`, since a 202 must survive a power
cut and in WAL mode NORMAL may lose the last commits), and a large document takes a while to write;
meanwhile answers stream on. One thread also means one order of transactions and no contention.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imprint.server.records import (
    ACTIVE,
    SCHEMA,
    SCHEMA_VERSION,
    TERMINAL,
    AdaptationRow,
    EventRow,
    NewAdaptation,
    adaptation_row,
    event_row,
)


class JournalError(Exception):
    """The journal file cannot be used; the message names it and says why."""


class JournalFullError(Exception):
    """As many adaptations are active as may be."""


class Journal:
    """The open file. Not for use from two threads at once."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; raises JournalError when it is no journal of this version."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold documents
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            # Locked for this process alone: two servers on one journal would run each job twice.
            # Deleted text is overwritten, not only unlinked.
            for pragma in (
                *("busy_timeout=2000", "locking_mode=EXCLUSIVE", "journal_mode=WAL"),
                *("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"),
            ):
                self._db.execute(f"PRAGMA {pragma}")
            self._migrate()
        except sqlite3.DatabaseError as error:
            self._db.close()
            reason = str(error)
            if "locked" in reason:
                reason = "another server is using it; give this one another data_dir"
            raise JournalError(f"{path} cannot be used as a journal: {reason}") from error
        except JournalError as error:
            self._db.close()
            raise JournalError(f"{path}: {error}") from error

    def _migrate(self) -> None:
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise JournalError(
                    f"made by another version of Imprint (format {version}, this one reads "
                    f"{SCHEMA_VERSION}); use another data_dir"
                )

    def close(self) -> None:
        """Checkpoints and closes the file."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def create(self, new: NewAdaptation, *, max_active: int) -> tuple[AdaptationRow, bool]:
        """The adaptation for this request, and whether it is new.

        One that is queued, running or ready already is returned instead of a second; raises
        JournalFullError where a new one would be one too many.
        """
        data = new.text.encode()
        sha256 = hashlib.sha256(data).hexdigest()
        method = json.dumps(new.method, sort_keys=True)
        with self._transaction() as db:
            found = db.execute(
                "SELECT * FROM adaptations"
                " WHERE owner=? AND sha256=? AND model=? AND method=? AND seed=?"
                " AND status IN ('queued','running','succeeded','rejected') AND deleting=0"
                " AND cancel_requested=0",
                (new.owner, sha256, new.model, method, new.seed),
            ).fetchone()
            if found is not None:
                if new.pinned and not found["pinned"]:
                    self._pin(found["id"], new.expires_after_s)
                return adaptation_row(found), False
            if self.num_active() >= max_active:
                raise JournalFullError
            db.execute("INSERT OR IGNORE INTO documents VALUES (?, ?)", (sha256, data))
            db.execute(
                "INSERT INTO adaptations (id, owner, sha256, model, method, seed, status, pinned,"
                " num_tokens, num_bytes, priority, timeout_s, expires_after_s, created_at,"
                " metadata)"
                " VALUES (?,?,?,?,?,?,'queued',?,?,?,?,?,?,?,?)",
                (
                    *(new.id, new.owner, sha256, new.model, method, new.seed, new.pinned),
                    *(new.num_tokens, len(data), new.priority, new.timeout_s),
                    *(new.expires_after_s, time.time(), json.dumps(new.metadata)),
                ),
            )
            self._add_event(new.id, "queued", {})
            row = self.get(new.id)
        assert row is not None
        return row, True

    def get(self, id: str) -> AdaptationRow | None:
        """The adaptation, also one that is being deleted."""
        row = self._db.execute("SELECT * FROM adaptations WHERE id=?", (id,)).fetchone()
        return None if row is None else adaptation_row(row)

    def page(
        self,
        owner: str,
        *,
        after: str | None,
        limit: int,
        statuses: tuple[str, ...] = (*ACTIVE, *TERMINAL),
    ) -> list[AdaptationRow]:
        """The owner's adaptations, newest first, from behind `after`."""
        marks = ",".join("?" * len(statuses))
        rows = self._db.execute(
            f"SELECT * FROM adaptations WHERE owner=? AND deleting=0 AND status IN ({marks})"
            " AND number < coalesce((SELECT number FROM adaptations WHERE id=?), 1 << 62)"
            " ORDER BY number DESC LIMIT ?",
            (owner, *statuses, after, limit),
        )
        return [adaptation_row(row) for row in rows]

    def unfinished(self) -> list[AdaptationRow]:
        """What a start takes up again, oldest first: active ones and unfinished deletions."""
        rows = self._db.execute(
            "SELECT * FROM adaptations WHERE status IN ('queued','running') OR deleting=1"
            " ORDER BY number"
        )
        return [adaptation_row(row) for row in rows]

    def due(self, now: float) -> list[str]:
        """Ready adaptations whose time is over."""
        rows = self._db.execute(
            "SELECT id FROM adaptations WHERE expires_at <= ? AND deleting=0"
            " AND status IN ('succeeded','rejected')",
            (now,),
        )
        return [row["id"] for row in rows]

    def forget(self, ended_before: float) -> None:
        """Delete failed, cancelled and expired adaptations that ended before then."""
        self._db.execute(
            "DELETE FROM adaptations WHERE finished_at < ? AND deleting=0"
            " AND status IN ('failed','cancelled','expired')",
            (ended_before,),
        )

    def num_active(self) -> int:
        """Adaptations queued or running."""
        query = "SELECT count(*) FROM adaptations WHERE status IN ('queued','running')"
        return int(self._db.execute(query).fetchone()[0])

    def text(self, id: str) -> str:
        """The adaptation's document."""
        row = self._db.execute(
            "SELECT text FROM documents JOIN adaptations USING (sha256) WHERE id=?", (id,)
        ).fetchone()
        return bytes(row["text"]).decode()

    def _pin(self, id: str, expires_after_s: float | None) -> None:
        """Keep the job even when the answer that made it goes away, and as long as asked now."""
        self._db.execute(
            "UPDATE adaptations SET pinned=1, expires_after_s=?, expires_at=finished_at+?"
            " WHERE id=?",
            (expires_after_s, expires_after_s, id),
        )

    def start(self, id: str, *, attempt: int) -> None:
        """A worker has begun."""
        with self._transaction() as db:
            db.execute(
                "UPDATE adaptations SET status='running', attempt=?,"
                " started_at=coalesce(started_at, ?) WHERE id=?",
                (attempt, time.time(), id),
            )
            self._add_event(id, "running", {"attempt": attempt})

    def requeue(
        self, id: str, *, reason: str, attempt: int | None = None, died: bool = False
    ) -> None:
        """An active one is to be taken up again: its worker died (`attempt` is the next), or
        this server did (`died`) or was stopped. One that has just ended stays as it is."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE adaptations SET status='queued', attempt=coalesce(?, attempt),"
                " restarts=restarts+? WHERE id=? AND status IN ('queued','running')",
                (attempt, died, id),
            ).rowcount
            if changed:
                self._add_event(id, "requeued", {"reason": reason})

    def add_event(self, id: str, kind: str, data: dict[str, Any]) -> None:
        """Append an event; an adaptation that is gone is ignored."""
        with self._transaction():
            self._add_event(id, kind, data)

    def _add_event(self, id: str, kind: str, data: dict[str, Any]) -> None:
        self._db.execute(
            "INSERT INTO events SELECT number, 1 + coalesce((SELECT max(sequence) FROM events"
            " WHERE adaptation=number), 0), ?, ?, ? FROM adaptations WHERE id=?",
            (time.time(), kind, json.dumps(data), id),
        )

    def last_step(self, id: str) -> int:
        """The last optimisation step that there is an event of; 0 before the first."""
        row = self._db.execute(
            "SELECT coalesce(max(json_extract(e.data, '$.step')), 0) FROM events e"
            " JOIN adaptations a ON e.adaptation=a.number WHERE a.id=? AND e.kind='step'",
            (id,),
        ).fetchone()
        return int(row[0])

    def finish(
        self,
        id: str,
        status: str,
        *,
        error: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
        usage: dict[str, Any] | None = None,
        nbytes: int = 0,
        progress: dict[str, Any] | None = None,
    ) -> bool:
        """Set an active adaptation's outcome and its last event. False: it had one already."""
        now = time.time()
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE adaptations SET status=?, finished_at=?, expires_at=?+expires_after_s,"
                " error=?, result=?, usage=?, nbytes=?, progress=?"
                " WHERE id=? AND status IN ('queued','running')",
                (
                    *(status, now, now, json.dumps(error) if error else None),
                    *(json.dumps(result) if result else None, json.dumps(usage or {}), nbytes),
                    *(json.dumps(progress or {}), id),
                ),
            ).rowcount
            if changed:
                self._add_event(id, status, error or result or {})
                self._drop_unused_document(id)
        return bool(changed)

    def expire(self, id: str, *, reason: str) -> bool:
        """A ready one's adapter is gone: adaptation_expired, adapter_evicted, adapter_corrupt."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE adaptations SET status='expired', error=?"
                " WHERE id=? AND status IN ('succeeded','rejected')",
                (json.dumps({"code": reason, "message": reason, "param": None}), id),
            ).rowcount
            if changed:
                self._add_event(id, "expired", {"reason": reason})
                self._drop_unused_document(id)
        return bool(changed)

    def request_cancel(self, id: str) -> None:
        """Remember that an active adaptation is not wanted any more, over a restart too."""
        self._db.execute("UPDATE adaptations SET cancel_requested=1 WHERE id=?", (id,))

    def mark_deleting(self, id: str) -> None:
        """From now on it is not found; a restart goes on with the deletion."""
        self._db.execute("UPDATE adaptations SET deleting=1, cancel_requested=1 WHERE id=?", (id,))

    def delete(self, id: str) -> None:
        """Forget it, its events and a document nothing else uses, in the log file too."""
        with self._transaction() as db:
            db.execute("UPDATE adaptations SET status='expired' WHERE id=?", (id,))
            self._drop_unused_document(id)
            db.execute("DELETE FROM adaptations WHERE id=?", (id,))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _drop_unused_document(self, id: str) -> None:
        # A text is kept for jobs that still run or whose adapter may have to be made again.
        self._db.execute(
            "DELETE FROM documents WHERE sha256=(SELECT sha256 FROM adaptations WHERE id=?)"
            " AND NOT EXISTS (SELECT 1 FROM adaptations a WHERE a.sha256=documents.sha256"
            " AND a.status IN ('queued','running','succeeded','rejected'))",
            (id,),
        )

    def events(self, id: str, *, after: int, limit: int) -> list[EventRow]:
        """Events behind number `after`, in order."""
        rows = self._db.execute(
            "SELECT e.* FROM events e JOIN adaptations a ON e.adaptation=a.number"
            " WHERE a.id=? AND e.sequence>? ORDER BY e.sequence LIMIT ?",
            (id, after, limit),
        )
        return [event_row(row) for row in rows]
