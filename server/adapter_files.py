"""Adapters as files that leave and enter the server. Knows paths and bytes; loads no torch.

Names are made here, never taken from a client, so that no id and no file name leads anywhere else.
"""

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import anyio.to_thread

from imprint.adapters.exchange import ForeignAdapter, ForeignAdapterError, read_foreign
from imprint.adapters.files import FileFolder
from imprint.server.errors import InvalidRequestError

PIECE_BYTES = 2**18
_to_thread = anyio.to_thread.run_sync


class AdapterFiles:
    """The store's folder, and beside it what is being taken in."""

    def __init__(self, store: Path | str) -> None:
        self._adapters = FileFolder(store)
        self._imports = FileFolder(Path(store) / "imports")

    async def open(self, id: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        """Bytes of an adapter's file, and the file piece by piece; raises KeyError.

        The file is open when this returns: deleting the adapter takes nothing from the reader.
        """
        try:
            file = await _to_thread(lambda: self._adapters.path(id).open("rb"))
        except FileNotFoundError:
            raise KeyError(id) from None
        return os.fstat(file.fileno()).st_size, _pieces(file)

    async def take_in(self, id: str, body: AsyncIterator[bytes]) -> None:
        """Write a body to where the import `id` will find it. Nothing is left of a broken one."""
        path = self._imports.path(id)
        with await _to_thread(lambda: path.open("wb")) as file:
            try:
                async for piece in body:
                    await _to_thread(file.write, piece)
            except BaseException:
                path.unlink()
                raise

    async def check(self, id: str, *, model_hash: str) -> ForeignAdapter:
        """What the file of an import says of itself; raises InvalidRequestError naming what is
        wrong with it."""
        try:
            return await _to_thread(
                lambda: read_foreign(self._imports.path(id), model_hash=model_hash)
            )
        except ForeignAdapterError as error:
            raise InvalidRequestError(str(error), code=error.code) from None

    def drop(self, id: str) -> None:
        """Remove the file of an import; one that is not there is fine."""
        with suppress(FileNotFoundError):
            self._imports.path(id).unlink()

    def sweep(self, active: set[str]) -> None:
        """Remove what imports have left that a dead process had begun."""
        for id in set(self._imports.ids()) - active:
            self.drop(id)


async def _pieces(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    with file:
        while piece := await _to_thread(file.read, PIECE_BYTES):
            yield piece
