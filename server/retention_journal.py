"""Which adapters on disk the journal still stands for. Functions of the journal; opens no file."""

from collections.abc import Iterable

from imprint.server.journal import Journal


def strays(journal: Journal, adapter_ids: Iterable[str]) -> list[str]:
    """Those of these adapters that are of no adaptation which runs, is ready or is being deleted.

    A process that died has left them: before it could free one that is written down as gone, or say
    that one was made.
    """
    rows = journal.db.execute(
        "SELECT id FROM adaptations WHERE deleting=1"
        " OR status IN ('queued','running','succeeded','rejected')"
    )
    kept = {row["id"] for row in rows}
    return [id for id in adapter_ids if id not in kept]
