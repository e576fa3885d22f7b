"""HTTP/1.1 on a socket, with bounds that uvicorn does not set. Knows bytes and timers, no routes.

A client gets a limited time to send a request's head and to take something of what it is sent, a
limited number of connections is open at once, and what is no HTTP is refused in the one error
shape.
"""

import asyncio
import json
import logging
import secrets
import socket
import sys
from typing import Any, Literal

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from imprint.server.config import Settings
from imprint.server.errors import STATUS_CODES, error_body
from imprint.server.security import SECURITY_HEADERS

logger = logging.getLogger(__name__)

LINGER_S = 5.0
"""How long what still comes is read and thrown away after an early answer: a connection that is
closed with unread bytes may lose the answer on its way."""
LAST_BYTES_S = 2
"""How long open responses may take to end when the server stops, after the drain."""
_CAN_RESPOND = (h11.IDLE, h11.SEND_RESPONSE)


class GuardedProtocol(H11Protocol):
    """One connection. Subclasses made by `uvicorn_config` carry the limits."""

    head_timeout_s: float
    write_timeout_s: float
    max_connections: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._over = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse one connection too many; else wait for a head."""
        super().connection_made(transport)
        # asyncio does so only where the socket names its protocol, which accepted ones do not: what
        # is written in two pieces would wait up to 40 ms for the client's acknowledgement
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(high=0)  # any byte that waits is watched
        if len(self.connections) > self.max_connections:
            message = f"{self.max_connections} connections are open; try again later"
            self._respond(503, message, code="queue_full", retry_after_s=1)
            self.transport.close()
        else:
            self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Bytes came in: maybe the rest of a head, maybe the first part of the next."""
        if not self._over:
            super().data_received(data)
            self._watch_head()

    def on_response_complete(self) -> None:
        """A response is sent; a body that still comes is read for a while and no longer."""
        if self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(LINGER_S, self._end_linger, self.cycle)
        super().on_response_complete()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take all that it is sent at once."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """It has taken all."""
        self._stop_write_timer()
        super().resume_writing()

    def _watch_writing(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        later = self.loop.call_later
        self._write_timer = later(self.write_timeout_s, self._end_stalled, waiting)

    def _end_stalled(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() < waiting:
            self._watch_writing()
            return
        logger.warning("a client took nothing of a response for %g s", self.write_timeout_s)
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _end_linger(self, cycle: object) -> None:
        if self._over or (self.cycle is cycle and self.conn.their_state is h11.SEND_BODY):
            self.transport.abort()

    def _watch_head(self) -> None:
        # Between two requests uvicorn's keep-alive timer runs, until the first byte of the next.
        waiting = self.conn.their_state is h11.IDLE
        if not waiting or (self.cycle is not None and not self.conn.trailing_data[0]):
            self._stop_head_timer()
        elif self._head_timer is None:
            self._start_head_timer()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._refuse_slow_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_slow_head(self) -> None:
        if self.conn.trailing_data[0]:
            self._respond(
                408, f"the head of the request took longer than {self.head_timeout_s:g} s"
            )
        else:
            self.transport.close()  # a connection on which nothing was ever asked

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn, in its handler of h11's error, for what is no HTTP."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            self._respond(431, "the head of the request is too long")
        else:
            self._respond(400, "this is not a request that HTTP/1.1 allows", code="invalid_http")

    def _respond(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Answer for the app and say no more; without an answer where one has begun."""
        self._over = True
        self._stop_head_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in _CAN_RESPOND:
            self.transport.abort()
            return
        body = json.dumps(error_body(status, message, code=code or STATUS_CODES[status])).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-Id": f"req_{secrets.token_hex(12)}",
            **SECURITY_HEADERS,
        }
        if retry_after_s is not None:
            headers["Retry-After"] = str(retry_after_s)
        head = h11.Response(
            status_code=status, headers=list(headers.items()), reason=STATUS_PHRASES[status]
        )
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self._end_linger, self.cycle)


def uvicorn_config(
    app: FastAPI, settings: Settings, *, lifespan: Literal["on", "off"] = "off"
) -> uvicorn.Config:
    """How uvicorn serves the app: by this protocol, within the settings' limits."""
    limits = {
        "head_timeout_s": settings.head_timeout_s,
        "write_timeout_s": settings.write_timeout_s,
        "max_connections": settings.max_connections,
    }
    return uvicorn.Config(
        app,
        http=type("Protocol", (GuardedProtocol,), limits),
        h11_max_incomplete_event_size=settings.max_head_bytes,
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_BYTES_S,
    )
