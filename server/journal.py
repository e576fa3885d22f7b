"""What the server has promised, in SQLite: documents, adaptations, events. Knows no jobs, no HTTP.

Synchronous and single-threaded on purpose. The service calls it in one thread of its own, never on
the event loop: a commit waits for the disk, and a large document takes a while to write; meanwhile
answers stream on. One thread also means one order of transactions and no contention.
"""

import hashlib
import json
import time
from contextlib import nullcontext
from typing import Any

from imprint.server.journal_file import JournalFile
from imprint.server.records import (
    ACTIVE,
    TERMINAL,
    AdaptationRow,
    EventRow,
    ImportedFile,
    NewAdaptation,
    StoredText,
    adaptation_row,
    event_row,
)

UNBOUNDED = 1 << 62
_ADAPTATION = (
    "SELECT a.*, (SELECT d.id FROM document_versions v JOIN documents d ON v.document=d.number"
    " WHERE v.sha256=a.sha256 AND d.owner=a.owner AND d.deleting=0 ORDER BY d.number DESC LIMIT 1)"
    " AS document_id FROM adaptations a"
)


class JournalFullError(Exception):
    """As many adaptations are active, or as many bytes of their documents, as may be."""


class OwnerFullError(JournalFullError):
    """One owner has its share of that."""


class DocumentGoneError(Exception):
    """The document is deleted, or is another version by now."""


class Journal(JournalFile):
    """Adaptations and their events. Not for use from two threads at once."""

    def create(
        self,
        new: NewAdaptation,
        *,
        max_active: int,
        max_active_bytes: int = UNBOUNDED,
        max_own: int = UNBOUNDED,
        max_own_bytes: int = UNBOUNDED,
    ) -> tuple[AdaptationRow, bool]:
        """The adaptation for this request, and whether it is new.

        One that is queued, running or ready already is returned instead of a second; raises
        JournalFullError where a new one would be one too many, OwnerFullError where it would be so
        for its owner alone, and DocumentGoneError.
        """
        with self.transaction():
            return self._create(new, (max_active, max_active_bytes), (max_own, max_own_bytes))

    def find(self, new: NewAdaptation) -> AdaptationRow | None:
        """The adaptation that this request would be given, if there is one already."""
        found = self._find(new, _content(new.text)[0])
        return None if found is None else adaptation_row(found)

    def _find(self, new: NewAdaptation, sha256: str) -> Any:
        return self._db.execute(
            f"{_ADAPTATION} WHERE owner=? AND sha256=? AND model=? AND method=? AND seed=?"
            " AND status IN ('queued','running','succeeded','rejected') AND deleting=0"
            " AND cancel_requested=0",
            (new.owner, sha256, new.model, json.dumps(new.method, sort_keys=True), new.seed),
        ).fetchone()

    def _create(
        self, new: NewAdaptation, bounds: tuple[int, int], own_bounds: tuple[int, int]
    ) -> tuple[AdaptationRow, bool]:
        sha256, num_bytes, data = _content(new.text)
        method = json.dumps(new.method, sort_keys=True)
        if isinstance(new.text, StoredText):
            self._check_document(new.text)
        found = self._find(new, sha256)
        if found is not None:
            if new.pinned and not found["pinned"]:
                self._pin(found["id"], new.expires_after_s)
            return adaptation_row(found), False
        if lack := _lack(self.active(new.owner), num_bytes, own_bounds):
            raise OwnerFullError(f"of yours, {lack}")
        if lack := _lack(self.active(), num_bytes, bounds):
            raise JournalFullError(lack)
        if data is not None:
            self._db.execute(
                "INSERT OR IGNORE INTO texts (sha256, text) VALUES (?, ?)", (sha256, data)
            )
        self._db.execute(
            "INSERT INTO adaptations (id, owner, sha256, model, method, seed, status, pinned,"
            " num_tokens, num_bytes, priority, timeout_s, expires_after_s, idle_expires_after_s,"
            " created_at, metadata)"
            " VALUES (?,?,?,?,?,?,'queued',?,?,?,?,?,?,?,?,?)",
            (
                *(new.id, new.owner, sha256, new.model, method, new.seed, new.pinned),
                *(new.num_tokens, num_bytes, new.priority, new.timeout_s),
                *(new.expires_after_s, new.idle_expires_after_s),
                *(time.time(), json.dumps(new.metadata)),
            ),
        )
        self._add_event(new.id, "queued", {})
        row = self.get(new.id)
        assert row is not None
        return row, True

    def _check_document(self, text: StoredText) -> None:
        found = self._db.execute(
            "SELECT 1 FROM documents d JOIN document_versions v ON v.document=d.number"
            " WHERE d.id=? AND d.deleting=0 AND v.sha256=?",
            (text.document_id, text.sha256),
        ).fetchone()
        if found is None:
            raise DocumentGoneError(text.document_id)

    def get(self, id: str) -> AdaptationRow | None:
        """The adaptation, also one that is being deleted."""
        row = self._db.execute(f"{_ADAPTATION} WHERE id=?", (id,)).fetchone()
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
            f"{_ADAPTATION} WHERE owner=? AND deleting=0 AND status IN ({marks})"
            " AND number < coalesce((SELECT number FROM adaptations WHERE id=?), 1 << 62)"
            " ORDER BY number DESC LIMIT ?",
            (owner, *statuses, after, limit),
        )
        return [adaptation_row(row) for row in rows]

    def unfinished(self) -> list[AdaptationRow]:
        """What a start takes up again, oldest first: active ones and unfinished deletions."""
        rows = self._db.execute(
            f"{_ADAPTATION} WHERE status IN ('queued','running') OR deleting=1 ORDER BY number"
        )
        return [adaptation_row(row) for row in rows]

    def due(self, now: float) -> list[tuple[str, str]]:
        """Ready adaptations whose time is over, or that nobody has asked for too long, and which
        of the two."""
        rows = self._db.execute(
            "SELECT id, iif(expires_at <= ?1, 'adaptation_expired', 'adapter_idle') AS reason"
            " FROM adaptations WHERE deleting=0 AND status IN ('succeeded','rejected')"
            " AND (expires_at <= ?1"
            " OR max(finished_at, coalesce(used_at, 0)) + idle_expires_after_s <= ?1)",
            (now,),
        )
        return [(row["id"], row["reason"]) for row in rows]

    def touch(self, uses: dict[str, float]) -> None:
        """Adapters were asked at these times."""
        with self.transaction() as db:
            db.executemany(
                "UPDATE adaptations SET used_at=? WHERE id=?", [(at, id) for id, at in uses.items()]
            )

    def forget(self, ended_before: float) -> None:
        """Delete failed, cancelled and expired adaptations that ended before then."""
        with self.transaction() as db:
            db.execute(
                "DELETE FROM adaptations WHERE finished_at < ? AND deleting=0"
                " AND status IN ('failed','cancelled','expired')",
                (ended_before,),
            )

    def num_active(self) -> int:
        """Adaptations queued or running."""
        return self.active()[0]

    def active(self, owner: str | None = None) -> tuple[int, int]:
        """Adaptations queued or running, of all or of one owner, and the bytes of their
        documents."""
        query = (
            "SELECT count(*), coalesce(sum(num_bytes), 0) FROM adaptations"
            " WHERE status IN ('queued','running') AND (?1 IS NULL OR owner=?1)"
        )
        num_active, num_bytes = self._db.execute(query, (owner,)).fetchone()
        return num_active, num_bytes

    def parts(self, id: str) -> list[str]:
        """The texts that the adaptation's document consists of, in order."""
        row = self._db.execute("SELECT sha256 FROM adaptations WHERE id=?", (id,)).fetchone()
        return self.text_parts(row["sha256"])

    def text_parts(self, sha256: str) -> list[str]:
        """The text with this fingerprint: what it was at first, then what was appended to it."""
        rows = self._db.execute(
            "WITH RECURSIVE chain(sha256, depth) AS (VALUES (?, 0) UNION ALL"
            " SELECT t.parent, depth + 1 FROM texts t JOIN chain USING (sha256)"
            " WHERE t.parent IS NOT NULL)"
            " SELECT text FROM chain JOIN texts USING (sha256) ORDER BY depth DESC",
            (sha256,),
        )
        return [bytes(row["text"]).decode() for row in rows]

    def _pin(self, id: str, expires_after_s: float | None) -> None:
        """Keep the job even when the answer that made it goes away, and as long as asked now."""
        self._db.execute(
            "UPDATE adaptations SET pinned=1, expires_after_s=?, expires_at=finished_at+?"
            " WHERE id=?",
            (expires_after_s, expires_after_s, id),
        )

    def start(self, id: str, *, attempt: int) -> None:
        """A worker has begun."""
        with self.transaction() as db:
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
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE adaptations SET status='queued', attempt=coalesce(?, attempt),"
                " restarts=restarts+? WHERE id=? AND status IN ('queued','running')",
                (attempt, died, id),
            ).rowcount
            if changed:
                self._add_event(id, "requeued", {"reason": reason})

    def add_event(self, id: str, kind: str, data: dict[str, Any]) -> None:
        """Append an event, as part of the transaction if there is one; an adaptation that is gone
        is ignored."""
        with nullcontext() if self._db.in_transaction else self.transaction():
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
        with self.transaction() as db:
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
                self._drop_unused_text(id)
        return bool(changed)

    def expire(self, id: str, *, reason: str) -> bool:
        """A ready one's adapter is gone: adaptation_expired, adapter_idle, adapter_evicted,
        adapter_corrupt."""
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE adaptations SET status='expired', error=?"
                " WHERE id=? AND status IN ('succeeded','rejected')",
                (json.dumps({"code": reason, "message": reason, "param": None}), id),
            ).rowcount
            if changed:
                self._add_event(id, "expired", {"reason": reason})
                self._drop_unused_text(id)
        return bool(changed)

    def request_cancel(self, id: str) -> None:
        """Remember that an active adaptation is not wanted any more, over a restart too."""
        with self.transaction() as db:
            db.execute("UPDATE adaptations SET cancel_requested=1 WHERE id=?", (id,))

    def mark_deleting(self, id: str) -> None:
        """From now on it is not found; a restart goes on with the deletion."""
        with self.transaction() as db:
            db.execute("UPDATE adaptations SET deleting=1, cancel_requested=1 WHERE id=?", (id,))

    def delete(self, id: str) -> None:
        """Forget it, its events and a document nothing else uses, in the log file too."""
        with self.transaction() as db:
            db.execute("UPDATE adaptations SET status='expired' WHERE id=?", (id,))
            self._drop_unused_text(id)
            db.execute("DELETE FROM adaptations WHERE id=?", (id,))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _drop_unused_text(self, id: str) -> None:
        self._db.execute(  # what was kept of its study goes with the text
            "DELETE FROM studies WHERE adaptation IN (SELECT number FROM adaptations WHERE id=?"
            " AND status NOT IN ('queued','running','succeeded','rejected'))",
            (id,),
        )
        row = self._db.execute("SELECT sha256 FROM adaptations WHERE id=?", (id,)).fetchone()
        if row is not None:
            self.drop_unused_text(row["sha256"])

    def drop_unused_text(self, sha256: str | None) -> None:
        """Forget a text, and what it was appended to, where nothing uses them any more.

        A text is kept for its document, for jobs that still run and for adapters that may have to
        be made again. Belongs into a transaction.
        """
        while sha256 is not None:
            used = self._db.execute(
                "SELECT EXISTS (SELECT 1 FROM adaptations WHERE sha256=:sha256"
                " AND status IN ('queued','running','succeeded','rejected'))"
                " OR EXISTS (SELECT 1 FROM document_versions WHERE sha256=:sha256)"
                " OR EXISTS (SELECT 1 FROM texts WHERE parent=:sha256)",
                {"sha256": sha256},
            ).fetchone()[0]
            if used:
                return
            gone = self._db.execute(
                "DELETE FROM texts WHERE sha256=? RETURNING parent", (sha256,)
            ).fetchone()
            sha256 = None if gone is None else gone["parent"]

    def events(self, id: str, *, after: int, limit: int) -> list[EventRow]:
        """Events behind number `after`, in order."""
        rows = self._db.execute(
            "SELECT e.* FROM events e JOIN adaptations a ON e.adaptation=a.number"
            " WHERE a.id=? AND e.sequence>? ORDER BY e.sequence LIMIT ?",
            (id, after, limit),
        )
        return [event_row(row) for row in rows]


def _lack(active: tuple[int, int], num_bytes: int, bounds: tuple[int, int]) -> str:
    """Why one more document, of so many bytes, is one too many; empty where it is not."""
    (num_active, active_bytes), (most, most_bytes) = active, bounds
    if num_active >= most:
        return f"{num_active} adaptations are queued or running"
    if num_active and active_bytes + num_bytes > most_bytes:
        held = f"documents of {active_bytes} bytes are queued or running"
        return f"{held}, at most {most_bytes} may be"
    return ""


def _content(text: str | StoredText | ImportedFile) -> tuple[str, int, bytes | None]:
    """Fingerprint and bytes of a document; the bytes themselves where they are new."""
    if not isinstance(text, str):
        return text.sha256, text.num_bytes, None
    data = text.encode()
    return hashlib.sha256(data).hexdigest(), len(data), data
