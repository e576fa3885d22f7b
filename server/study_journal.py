"""What the journal keeps of a study so that it can be shown: entropies, and each step's rollouts.

Functions for the journal's thread. Entropies and token ids say much about a document's text, so
they live as long as it: with a job that is active or ready, and no longer.
"""

import struct
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import msgspec

from imprint.server.journal import Journal
from imprint.server.messages import StepBranches


@dataclass(frozen=True, slots=True)
class StudyRow:
    """What was kept when the document had been read."""

    entropies: bytes
    """A little-endian float16 a token: entropy in nats of what follows it."""
    ends: bytes | None
    """A little-endian uint32 a token: characters of the text up to its end. None until asked."""


def add_reading(journal: Journal, id: str, entropies: bytes) -> None:
    """Keep the entropies of an active job's document, with the event `read`; once."""
    values = struct.unpack(f"<{len(entropies) // 2}e", entropies)
    mean = round(fmean(values), 4) if values and all(map(isfinite, values)) else None
    with journal.transaction() as db:
        added = db.execute(
            "INSERT OR IGNORE INTO studies SELECT number, ?, NULL FROM adaptations WHERE id=?"
            " AND status IN ('queued','running')",
            (entropies, id),
        ).rowcount
        if added:
            journal.add_event(id, "read", {"num_tokens": len(values), "entropy_mean": mean})


def add_step(journal: Journal, id: str, step: StepBranches) -> None:
    """Keep what a step tried; of a step that is known already, the newest."""
    with journal.transaction() as db:
        db.execute(
            "INSERT OR REPLACE INTO study_steps SELECT adaptation, ?, ? FROM studies"
            " JOIN adaptations ON number=adaptation WHERE id=?",
            (step.step, msgspec.json.encode(step).decode(), id),
        )


def set_ends(journal: Journal, id: str, ends: bytes) -> None:
    """Keep where the tokens of the text end."""
    with journal.transaction() as db:
        db.execute(
            "UPDATE studies SET ends=? WHERE adaptation="
            "(SELECT number FROM adaptations WHERE id=?)",
            (ends, id),
        )


def reading(journal: Journal, id: str) -> StudyRow | None:
    """What was kept of the reading; None where the document is not read yet, or gone."""
    with journal.transaction() as db:
        row = db.execute(
            "SELECT entropies, ends FROM studies JOIN adaptations ON number=adaptation WHERE id=?",
            (id,),
        ).fetchone()
    return None if row is None else StudyRow(row["entropies"], row["ends"])


def steps(journal: Journal, id: str, *, after: int, limit: int) -> list[StepBranches]:
    """What the steps behind step `after` tried, in order."""
    with journal.transaction() as db:
        rows = db.execute(
            "SELECT data FROM study_steps s JOIN adaptations ON number=s.adaptation"
            " WHERE id=? AND step>? ORDER BY step LIMIT ?",
            (id, after, limit),
        ).fetchall()
    return [msgspec.json.decode(row["data"], type=StepBranches) for row in rows]
