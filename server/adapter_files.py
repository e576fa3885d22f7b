"""Adapters as files that leave and enter the server. Knows paths and bytes; loads no torch.

A file's name is made of an id that the server made, never of what a client sent.
"""

import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import IO

import anyio.to_thread

from imprint.adapters.exchange import ForeignAdapter, ForeignAdapterError, read_foreign
from imprint.adapters.files import FileFolder, ProgressFolder
from imprint.server.errors import InvalidRequestError, TooLargeError, WorkFailedError

PIECE_BYTES = 2**18
_to_thread = anyio.to_thread.run_sync


class AdapterFiles:
    """The store's folder, and beside it what is being taken in."""

    def __init__(self, store: Path | str, *, max_tokens: int) -> None:
        self._adapters = FileFolder(store)
        self._imports = ProgressFolder(store).imports
        self._max_tokens = max_tokens

    async def open(self, id: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        """Bytes of an adapter's file, and the file piece by piece; raises KeyError.

        The file is open when this returns: deleting the adapter takes nothing from the reader.
        """
        try:
            file = await _to_thread(lambda: self._adapters.path(id).open("rb"))
        except FileNotFoundError:
            raise KeyError(id) from None
        return os.fstat(file.fileno()).st_size, _pieces(file)

    async def take_in(
        self, id: str, body: AsyncIterator[bytes], *, model_hash: str
    ) -> tuple[ForeignAdapter, int]:
        """Write a body to where the import `id` will find it, and check it: what it says of
        itself, and its bytes. Whatever goes wrong, nothing is left of it.

        Raises InvalidRequestError naming what is wrong, TooLargeError, and WorkFailedError where
        the disk does not take it.
        """
        path = self._imports.path(id)
        try:
            await _write(path, body)
            await _to_thread(self._imports.sync)
            adapter = await _to_thread(lambda: read_foreign(path, model_hash=model_hash))
            if adapter.num_tokens > self._max_tokens:
                raise TooLargeError(
                    f"its document has {adapter.num_tokens} tokens; at most {self._max_tokens} "
                    "are taken",
                    code="document_too_large",
                )
            return adapter, path.stat().st_size
        except ForeignAdapterError as error:
            path.unlink()
            raise InvalidRequestError(str(error), code=error.code) from None
        except OSError as error:
            path.unlink(missing_ok=True)
            message = f"the file could not be written: {error.strerror}"
            raise WorkFailedError("store_failed", message) from None
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    async def discard(self, id: str) -> None:
        """Delete the file of an import that nothing comes of."""
        await _to_thread(lambda: self._imports.path(id).unlink(missing_ok=True))


async def _write(path: Path, body: AsyncIterator[bytes]) -> None:
    with await _to_thread(lambda: path.open("wb")) as file:
        async for piece in body:
            await _to_thread(file.write, piece)
        await _to_thread(lambda: _sync(file))


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


async def _pieces(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    with file:
        while piece := await _to_thread(file.read, PIECE_BYTES):
            yield piece
