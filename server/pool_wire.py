"""The socket between a pool and its workers. Knows frames, no messages.

On one machine it is a file in a folder of its own. For workers on others it is a TCP port, where
everything is encrypted, and only who has the key of this pool's workers is listened to (CurveZMQ).
"""

import asyncio
import shutil
import tempfile
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from imprint.server.worker_config import WireKeys

SETTLE_MS = 50


class Wire:
    """The socket of a running pool; made on its event loop."""

    def __init__(self, host: str | None = None, port: int = 0) -> None:
        """`host`: an address of this machine that workers on others reach; None where there are
        none, and then only this user may enter the folder. Raises OSError for a port in use."""
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        # work in flight is bounded, so the socket need not be; a message must never be dropped
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.worker_keys: WireKeys | None = None
        self._folder: str | None = None
        self._authenticator: AsyncioAuthenticator | None = None
        if host is None:
            self._folder = tempfile.mkdtemp(prefix="imprint-")
            address = f"ipc://{self._folder}/pool"
        else:
            self._lock()
            shown = f"[{host}]" if ":" in host else host
            address = f"tcp://{shown}:{port or '*'}"
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"{address}: {error}") from None
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _lock(self) -> None:
        """Keys for this pool's lifetime."""
        server, secret = zmq.curve_keypair()
        public, worker_secret = zmq.curve_keypair()
        self.socket.setsockopt(zmq.IPV6, 1)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.worker_keys = WireKeys(
            server=server.decode(), public=public.decode(), secret=worker_secret.decode()
        )
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=_Only(public))

    async def settle(self) -> None:
        """Let what has arrived be taken in: the last words of a worker that has ended."""
        while await self.socket.poll(SETTLE_MS):
            await asyncio.sleep(0)

    def close(self) -> None:
        """Leave no socket, thread or file."""
        self.socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Only:
    """Whoever has one key."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: Any) -> bool:
        """Asked for every connection."""
        return bool(key == self._public)


def connect(socket: "zmq.Socket[bytes]", endpoint: str, keys: WireKeys | None) -> None:
    """The worker's side. On a network a connection that breaks is not made again: what was said
    meanwhile would be lost unnoticed; the pool misses the worker's heartbeats and replaces it."""
    if keys is not None:
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    socket.connect(endpoint)
