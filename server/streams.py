"""Sending: server-sent events with keep-alives, and work that ends when its client hangs up.

Knows ASGI and the shape of events; knows nothing of what they mean.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from imprint.server.config import Settings
from imprint.server.errors import ImprintError, error_body

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_LINE_ENDS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})
"""Legal in JSON, but line ends to clients that split text into lines."""
T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """Nobody waits for the response any more."""


def encode_event(data: object, *, id: int | None = None) -> bytes:
    """One event: JSON on one line, also for clients that know more line ends than SSE does."""
    head = "" if id is None else f"id: {id}\n"
    line = json.dumps(data, ensure_ascii=False).translate(_LINE_ENDS)
    return f"{head}data: {line}\n\n".encode()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    The request's body must have been read. Raises ClientDisconnectedError.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        await _stop(task, gone)


class EventStream(Response):
    """`text/event-stream` of encoded events, closed with `[DONE]`.

    A client that hangs up closes the generator; an error in mid-stream is one `error` event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], settings: Settings) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = settings.keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _stop(sending, gone)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        try:
            async with aclosing(self._with_keep_alives()) as chunks:
                async for chunk in chunks:
                    await _send(send, chunk)
        except ImprintError as error:
            await _send(send, encode_event(error.body()))
        except Exception:  # the status is sent: only an event can still say so
            logger.exception("a stream failed")
            body = error_body(500, "the server failed on this request", code="internal_error")
            await _send(send, encode_event(body))
        await _send(send, DONE, more=False)

    async def _with_keep_alives(self) -> AsyncGenerator[bytes, None]:
        while True:
            step = asyncio.ensure_future(anext(self._events, None))
            try:
                while not (await asyncio.wait({step}, timeout=self._keep_alive_s))[0]:
                    yield KEEP_ALIVE
                chunk = step.result()
            finally:
                if not step.done():
                    await _stop(step)
            if chunk is None:
                return
            yield chunk


async def open_stream(
    request: Request, events: AsyncGenerator[bytes, None], settings: Settings
) -> EventStream:
    """The stream, once its first event is there: until then an error still has its own status."""

    async def first_event() -> bytes:
        return await anext(events, b"")

    first = await until_disconnect(request, first_event())

    async def all_events() -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            yield first
            async for chunk in events:
                yield chunk

    return EventStream(all_events(), settings)


async def _send(send: Send, chunk: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
