"""The journal's SQLite file: opened, brought up to date, written all or nothing. Knows no rows.

What is written is on the disk when a transaction ends: `synchronous=FULL`, since a 202 must survive
a power cut, and in WAL mode NORMAL may lose the last commits. The lock beside the file is this
server's: others may read the journal, to back it up, and none may run its jobs.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imprint.adapters import faults
from imprint.server.journal_schema import MIGRATIONS


class JournalError(Exception):
    """The journal file cannot be used; the message names it and says why."""


class JournalUnavailableError(Exception):
    """The journal cannot be read or written now: the disk is full, or the file is not there. What
    was asked has not been done; later it may work."""


IN_USE = "another server is using it; give this one another data_dir"


class JournalFile:
    """The open file. Not for use from two threads at once."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; raises JournalError when it is no journal of this version."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold documents
        self._path = path
        self._lock = _locked(path.with_suffix(".lock"))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            # Deleted text is overwritten, not only unlinked.
            for pragma in (
                *("busy_timeout=2000", "journal_mode=WAL"),
                *("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"),
            ):
                self._db.execute(f"PRAGMA {pragma}")
            self._inode = _inode(path)
            self._migrate()
        except (sqlite3.DatabaseError, OSError) as error:
            self.close()
            reason = IN_USE if "locked" in str(error) else str(error)
            raise JournalError(f"{path} cannot be used as a journal: {reason}") from error
        except JournalError as error:
            self.close()
            raise JournalError(f"{path}: {error}") from error

    def _migrate(self) -> None:
        newest = len(MIGRATIONS)
        with self.transaction() as db:
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found > newest:
                raise JournalError(
                    f"made by a later version of Imprint (format {found}, this one reads up to "
                    f"{newest}); use another data_dir"
                )
            for migration in MIGRATIONS[found:]:
                for statement in migration.split(";\n"):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version={newest}")

    def close(self) -> None:
        """Checkpoints and closes the file."""
        self._db.close()
        os.close(self._lock)

    @property
    def db(self) -> sqlite3.Connection:
        """For reading; everything is written in a `transaction`."""
        return self._db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing. Raises sqlite3.OperationalError or OSError where the disk does not
        take it; then nothing was written, and the next transaction may succeed."""
        self._refuse_a_lost_file()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            faults.at("journal_write")
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite has rolled back by itself after some errors
                self._db.execute("ROLLBACK")
            raise

    def _refuse_a_lost_file(self) -> None:
        """A file without a name takes everything, and is gone with this process."""
        if _inode(self._path) != self._inode:
            raise OSError(f"{self._path} is not the file any more that was opened")


def _inode(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _locked(path: Path) -> int:
    """An open file that nobody else can lock until this process closes it or dies: two servers on
    one journal would run each job twice. Raises JournalError, OSError."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise JournalError(f"{path.parent}: {IN_USE}") from None
    return lock
