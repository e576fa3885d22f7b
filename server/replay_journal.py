"""Replies that are kept for requests with an Idempotency-Key, in the journal. Knows no HTTP.

Functions over an open `Journal`, for its one thread. A reply may hold an answer, so it goes with
the document or the adaptation that it names: deleting either forgets it, and frees the key.
"""

import time
from dataclasses import dataclass
from typing import Final

from imprint.server.journal import Journal

KEEP_S: Final = 24 * 3600.0
MAX_REPLIES: Final = 1000
MAX_BYTES: Final = 32 * 2**20
"""Of one owner; beyond either, the oldest are forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptReply:
    """What a request was answered with."""

    request_sha256: str
    status: int
    location: str | None
    body: bytes


def get_reply(journal: Journal, owner: str, key: str) -> KeptReply | None:
    """The reply that was kept under this key, if it is young enough."""
    row = journal.db.execute(
        "SELECT * FROM replies WHERE owner=? AND key=? AND created_at > ?",
        (owner, key, time.time() - KEEP_S),
    ).fetchone()
    if row is None:
        return None
    return KeptReply(
        request_sha256=row["request_sha256"],
        status=row["status"],
        location=row["location"],
        body=bytes(row["body"]),
    )


def keep_reply(journal: Journal, owner: str, key: str, reply: KeptReply) -> None:
    """Keep it, in the place of one that is too old."""
    with journal.transaction() as db:
        db.execute(
            "INSERT OR REPLACE INTO replies (owner, key, request_sha256, status, location, body,"
            " created_at) VALUES (?,?,?,?,?,?,?)",
            (
                *(owner, key, reply.request_sha256, reply.status, reply.location, reply.body),
                time.time(),
            ),
        )
        db.execute(
            "DELETE FROM replies WHERE number IN (SELECT number FROM (SELECT number,"
            " row_number() OVER newest AS place, sum(length(body)) OVER newest AS bytes"
            " FROM replies WHERE owner=? WINDOW newest AS (ORDER BY number DESC))"
            " WHERE place > ? OR bytes > ?)",
            (owner, MAX_REPLIES, MAX_BYTES),
        )


def forget_replies(journal: Journal, now: float) -> None:
    """Those that are too old."""
    with journal.transaction() as db:
        db.execute("DELETE FROM replies WHERE created_at <= ?", (now - KEEP_S,))


def forget_replies_about(journal: Journal, id: str) -> None:
    """Those that name this document or adaptation."""
    with journal.transaction() as db:
        db.execute(
            "DELETE FROM replies WHERE instr(body, CAST(? AS BLOB)) > 0",
            (id,),
        )
