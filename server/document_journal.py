"""Stored documents in the journal: created, appended to, listed, deleted. Knows no jobs, no HTTP.

Functions over an open `Journal`, for its one thread. The fingerprint of a text is the sha256 of
its bytes; that of an appended text is made of its predecessor's and of what was appended, because
the same characters in other parts are other tokens.
"""

import hashlib
import json
import time
from typing import Any

from imprint.server.document_records import DocumentRow, NewDocument, document_row
from imprint.server.journal import DocumentGoneError, Journal
from imprint.server.records import AdaptationRow

_DOCUMENT = (
    "SELECT d.number, d.id, d.owner, d.title, d.media_type, d.metadata, d.created_at,"
    " d.expires_at, d.deleting, v.version, v.sha256, v.num_tokens, v.num_bytes,"
    " v.created_at AS updated_at, json_array_length(d.source_references) AS num_references"
    " FROM documents d JOIN document_versions v ON v.document=d.number AND v.version="
    "(SELECT max(version) FROM document_versions WHERE document=d.number)"
)


def create_document(journal: Journal, new: NewDocument) -> DocumentRow:
    """Store a document; durable when this returns."""
    source, data = new.source, new.source.text.encode()
    sha256 = hashlib.sha256(data).hexdigest()
    now = time.time()
    expires_at = None if new.expires_after_s is None else now + new.expires_after_s
    with journal.transaction() as db:
        db.execute("INSERT OR IGNORE INTO texts (sha256, text) VALUES (?, ?)", (sha256, data))
        number = db.execute(
            "INSERT INTO documents (id, owner, title, media_type, source_references, metadata,"
            " created_at, expires_at) VALUES (?,?,?,?,?,?,?,?)",
            (
                *(new.id, new.owner, source.title, source.media_type),
                *(json.dumps(source.references), json.dumps(new.metadata), now, expires_at),
            ),
        ).lastrowid
        db.execute(
            "INSERT INTO document_versions VALUES (?, 1, ?, ?, ?, ?)",
            (number, sha256, new.num_tokens, len(data), now),
        )
    return _known(journal, new.id)


def append_text(journal: Journal, row: DocumentRow, text: str, num_tokens: int) -> DocumentRow:
    """Make the next version of a document. Raises DocumentGoneError where `row` is not the newest
    one any more."""
    data = text.encode()
    part = hashlib.sha256(data).hexdigest()
    sha256 = hashlib.sha256(f"{row.sha256}+{part}".encode()).hexdigest()
    with journal.transaction() as db:
        now_row = get_document(journal, row.id)
        if now_row is None or now_row.deleting or now_row.version != row.version:
            raise DocumentGoneError(row.id)
        db.execute(
            "INSERT OR IGNORE INTO texts (sha256, text, parent) VALUES (?, ?, ?)",
            (sha256, data, row.sha256),
        )
        db.execute(
            "INSERT INTO document_versions VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(row.number, row.version + 1, sha256, row.num_tokens + num_tokens),
                *(row.num_bytes + len(data), time.time()),
            ),
        )
    return _known(journal, row.id)


def get_document(journal: Journal, id: str) -> DocumentRow | None:
    """The document, also one that is being deleted."""
    row = journal.db.execute(f"{_DOCUMENT} WHERE d.id=?", (id,)).fetchone()
    return None if row is None else document_row(row)


def _known(journal: Journal, id: str) -> DocumentRow:
    row = get_document(journal, id)
    assert row is not None
    return row


def document_page(
    journal: Journal, owner: str, *, after: str | None, limit: int
) -> list[DocumentRow]:
    """The owner's documents, newest first, from behind `after`."""
    rows = journal.db.execute(
        f"{_DOCUMENT} WHERE d.owner=? AND d.deleting=0"
        " AND d.number < coalesce((SELECT number FROM documents WHERE id=?), 1 << 62)"
        " ORDER BY d.number DESC LIMIT ?",
        (owner, after, limit),
    )
    return [document_row(row) for row in rows]


def document_content(journal: Journal, row: DocumentRow) -> tuple[list[str], list[dict[str, Any]]]:
    """The parts of this version's text, and the places of its source."""
    found = journal.db.execute(
        "SELECT source_references FROM documents WHERE id=?", (row.id,)
    ).fetchone()
    references = [] if found is None else json.loads(found["source_references"])
    return journal.text_parts(row.sha256), references


def adaptations_of(journal: Journal, row: DocumentRow) -> list[str]:
    """The owner's adaptations of any version, but for content that another document has, too."""
    rows = journal.db.execute(
        "SELECT id FROM adaptations WHERE owner=?2 AND sha256 IN"
        " (SELECT sha256 FROM document_versions WHERE document=?1"
        "  EXCEPT SELECT v.sha256 FROM document_versions v JOIN documents d ON v.document=d.number"
        "  WHERE d.owner=?2 AND d.number<>?1 AND d.deleting=0)"
        " ORDER BY number",
        (row.number, row.owner),
    )
    return [found["id"] for found in rows]


def ready_adaptation(journal: Journal, row: DocumentRow) -> str | None:
    """The owner's newest adaptation of this version that can be asked; a studied one before one
    that only read."""
    found = journal.db.execute(
        "SELECT id FROM adaptations WHERE owner=? AND sha256=? AND deleting=0"
        " AND status IN ('succeeded','rejected') ORDER BY"
        " json_extract(method, '$.type')='refine' DESC, number DESC LIMIT 1",
        (row.owner, row.sha256),
    ).fetchone()
    return None if found is None else str(found["id"])


def base_adaptation(journal: Journal, row: AdaptationRow) -> str | None:
    """The owner's adaptation of the longest beginning of this one's document from which it can be
    read on: one whose end state is the base model's."""
    found = journal.db.execute(
        "WITH RECURSIVE chain(sha256, depth) AS (VALUES (?, 0) UNION ALL"
        " SELECT t.parent, depth + 1 FROM texts t JOIN chain USING (sha256)"
        " WHERE t.parent IS NOT NULL)"
        " SELECT id FROM adaptations a JOIN chain USING (sha256)"
        " WHERE depth > 0 AND owner=? AND model=? AND deleting=0"
        " AND (status='rejected' OR status='succeeded' AND"
        " coalesce(json_extract(method, '$.scope'), 'query_lora')='query_lora')"
        " ORDER BY depth, number DESC LIMIT 1",
        (row.sha256, row.owner, row.model),
    ).fetchone()
    return None if found is None else str(found["id"])


def mark_document_deleting(journal: Journal, id: str) -> None:
    """From now on it is not found; a restart goes on with the deletion."""
    with journal.transaction() as db:
        db.execute("UPDATE documents SET deleting=1 WHERE id=?", (id,))


def delete_document(journal: Journal, row: DocumentRow) -> None:
    """Forget the document and every text that nothing else uses, in the log file too."""
    with journal.transaction() as db:
        found = db.execute(
            "SELECT sha256 FROM document_versions WHERE document=? ORDER BY version DESC",
            (row.number,),
        ).fetchall()
        db.execute("DELETE FROM documents WHERE number=?", (row.number,))
        for version in found:
            journal.drop_unused_text(version["sha256"])
    journal.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def unfinished_deletions(journal: Journal) -> list[str]:
    """Documents whose deletion a restart goes on with."""
    rows = journal.db.execute("SELECT id FROM documents WHERE deleting=1 ORDER BY number")
    return [row["id"] for row in rows]


def due_documents(journal: Journal, now: float) -> list[str]:
    """Documents whose time is over."""
    rows = journal.db.execute(
        "SELECT id FROM documents WHERE expires_at <= ? AND deleting=0", (now,)
    )
    return [row["id"] for row in rows]
