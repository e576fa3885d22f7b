"""Files that the client sends and gets piece by piece, however large they are. Sends nothing.

What is being got lies beside its place under another name: under the name that was asked for there
is a whole file or none.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final, Self

PIECE_BYTES: Final = 2**18


def pieces(path: Path) -> Iterator[bytes]:
    """A file from its beginning."""
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


async def async_pieces(path: Path) -> AsyncIterator[bytes]:
    """The same, read in threads."""
    with await asyncio.to_thread(path.open, "rb") as file:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece


class NewFile:
    """A context manager. What was written has its name once `keep` was called, and else is gone.

    Raises FileExistsError for a name that is taken, also by a file that came meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refuse_another()
        self._partial = path.with_name(f".{secrets.token_hex(8)}.partial")
        self._file = self._partial.open("xb")
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def restart(self) -> None:
        """Forget what was written."""
        self._file.seek(0)
        self._file.truncate()
        self.num_bytes = 0

    def write(self, piece: bytes) -> None:
        """Add to it."""
        self._file.write(piece)
        self.num_bytes += len(piece)

    def keep(self) -> None:
        """It is whole: give it its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._refuse_another()
        self._partial.rename(self._path)

    def _refuse_another(self) -> None:
        if self._path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._path))
