"""The socket between a pool and its workers, in a folder of its own. Knows frames, no messages."""

import asyncio
import shutil
import tempfile

import zmq
import zmq.asyncio

SETTLE_MS = 50


class Wire:
    """The socket of a running pool, in a folder that only this user may enter."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="imprint-")
        self._context = zmq.asyncio.Context()
        self.endpoint = f"ipc://{self._folder}/pool"
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        # work in flight is bounded, so the socket need not be; a message must never be dropped
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind(self.endpoint)

    async def settle(self) -> None:
        """Let what has arrived be taken in: the last words of a worker that has ended."""
        while await self.socket.poll(SETTLE_MS):
            await asyncio.sleep(0)

    def close(self) -> None:
        """Leave no socket, thread or file."""
        self.socket.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
