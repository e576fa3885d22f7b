"""Adapters as files that leave the server. Knows paths and bytes; loads no torch.

A file's name is made of an id that the journal knows, never of what a client sent.
"""

import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import IO

import anyio.to_thread

from imprint.adapters.files import FileFolder

PIECE_BYTES = 2**18
_to_thread = anyio.to_thread.run_sync


class AdapterFiles:
    """The store's folder."""

    def __init__(self, store: Path | str) -> None:
        self._adapters = FileFolder(store)

    async def open(self, id: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        """Bytes of an adapter's file, and the file piece by piece; raises KeyError.

        The file is open when this returns: deleting the adapter takes nothing from the reader.
        """
        try:
            file = await _to_thread(lambda: self._adapters.path(id).open("rb"))
        except FileNotFoundError:
            raise KeyError(id) from None
        return os.fstat(file.fileno()).st_size, _pieces(file)


async def _pieces(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    with file:
        while piece := await _to_thread(file.read, PIECE_BYTES):
            yield piece
