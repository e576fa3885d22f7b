"""The client for asyncio: `imprint.server.client.ImprintClient`, awaited. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from imprint.server import client_calls as calls
from imprint.server import client_routes as routes
from imprint.server.client_calls import Call, Patience
from imprint.server.client_errors import ServerUnreachableError, failure
from imprint.server.client_files import NewFile, async_pieces
from imprint.server.client_methods import AsyncMethods
from imprint.server.client_types import Adaptation, AdaptationEvent, Page
from imprint.server.sse import EventReader

R = TypeVar("R")


class AsyncImprintClient(AsyncMethods):
    """Talks to one server. An async context manager; close it when done."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8765",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_wait_s: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`timeout_s` bounds the wait for bytes, `max_wait_s` all waits of a call together."""
        self.url = url.rstrip("/")
        self._max_wait_s = max_wait_s
        self._sleep = sleep
        options = calls.http_options(url, timeout_s, api_key)
        self._http = httpx.AsyncClient(transport=transport, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def is_live(self) -> bool:
        """Whether the server answers; False also when nothing does."""
        return await self._is("live")

    async def is_ready(self) -> bool:
        """Whether the server says that it can work; False also when nothing answers."""
        return await self._is("ready")

    async def events(
        self, adaptation_id: str, *, after: str | None = None
    ) -> AsyncIterator[AdaptationEvent]:
        """A job's events (those later than the id `after`) until it ends, live.

        A connection that breaks is taken up again where it broke.
        """
        while True:
            progressed = False
            try:
                async for event_id, body in self._stream(
                    routes.stream_events(adaptation_id, after)
                ):
                    progressed, after = True, event_id or after
                    yield AdaptationEvent.from_body(event_id, body)
            except ServerUnreachableError:
                if not progressed:
                    raise
                continue
            return

    async def wait(
        self, adaptation_id: str, on_event: Callable[[AdaptationEvent], None] | None = None
    ) -> Adaptation:
        """Follow a job to its end and return it; `on_event` hears of its progress."""
        after: str | None = None
        while True:
            async for event in self.events(adaptation_id, after=after):
                after = event.id or after
                if on_event is not None:
                    on_event(event)
            job = await self.adaptation(adaptation_id)
            if job.is_terminal:
                return job
            await self._sleep(calls.POLL_S)

    async def export_adapter(self, adaptation_id: str, path: Path | str) -> int:
        """Get an adapter as a safetensors file, for `import_adapter`; returns its bytes.

        It is written piece by piece, and begun anew where the connection breaks; under its name
        lies a whole file or none. Raises FileExistsError for a name that is taken, and OSError
        where the file cannot be written.
        """
        with NewFile(Path(path)) as file:
            await self._download(routes.adapter(adaptation_id), file)
            await asyncio.to_thread(file.keep)
            return file.num_bytes

    # ---- sending

    async def _is(self, state: str) -> bool:
        try:
            return (await self._http.get(f"/health/{state}")).is_success
        except httpx.TransportError:
            return False

    async def _do(self, call: Call[R]) -> R:
        return call.parse((await self._send(call, whole=True)).content)

    async def _walk(self, page: Callable[..., Call[Page[R]]]) -> AsyncIterator[R]:
        found = await self._do(page(limit=100))
        for item in found.items:
            yield item
        while found.has_more:
            found = await self._do(page(limit=100, after=found.last_id))
            for item in found.items:
                yield item

    async def _stream(self, call: Call[bytes]) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
        response = await self._send(call, whole=False)
        try:
            reader = EventReader()
            async for line in response.aiter_lines():
                event = reader.take(line)
                if event is None:
                    continue
                if event.data == calls.DONE:
                    return
                yield event.id, calls.stream_record(event)
        except httpx.TransportError as error:
            raise calls.unreachable(self.url, error) from error
        finally:
            await response.aclose()
        raise calls.cut_short(self.url)

    async def _records(self, call: Call[bytes]) -> AsyncIterator[dict[str, Any]]:
        async for _, record in self._stream(call):
            yield record

    async def _download(self, call: Call[bytes], file: NewFile) -> None:
        patience = self._patience(call)
        while True:
            response = await self._send(call, whole=False, patience=patience)
            file.restart()
            try:
                async for piece in response.aiter_bytes():
                    await asyncio.to_thread(file.write, piece)
                return
            except httpx.TransportError as error:
                delay_s = patience.after_break_s(error)
            finally:
                await response.aclose()
            await self._sleep(delay_s)

    def _patience(self, call: Call[Any]) -> Patience:
        return Patience(call, url=self.url, max_wait_s=self._max_wait_s)

    async def _send(
        self, call: Call[Any], *, whole: bool, patience: Patience | None = None
    ) -> httpx.Response:
        """An accepted response, `whole` or with its body still to be read; sends again where that
        may help."""
        patience = patience or self._patience(call)
        while True:
            arguments = call.request_arguments(async_pieces)
            request = self._http.build_request(call.method, call.path, **arguments)
            try:
                response = await self._http.send(request, stream=not whole)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.TransportError as error:
                delay_s = patience.after_break_s(error)
            else:
                delay_s = patience.after_refusal_s(failure(response))
            await self._sleep(delay_s)
