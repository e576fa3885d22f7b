"""The client for asyncio: `imprint.server.client.ImprintClient`, awaited. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import httpx

from imprint.server import client_calls as calls
from imprint.server.client_calls import Call, Result
from imprint.server.client_errors import ServerUnreachableError, failure
from imprint.server.client_types import (
    Adaptation,
    AdaptationEvent,
    AnswerRequest,
    Document,
    Page,
)
from imprint.server.sse import EventReader


class AsyncImprintClient:
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

    async def is_ready(self) -> bool:
        """Whether the server says that it can work; False also when nothing answers."""
        try:
            return (await self._http.get("/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def health(self) -> dict[str, Any]:
        """The server's own account of its state, workers included."""
        return await self._do(calls.get("/health"))

    # ---- documents

    async def create_document(
        self, text: str, *, title: str | None = None, metadata: dict[str, str] | None = None
    ) -> Document:
        """Store a text, to be studied and asked by its id."""
        return await self._do(calls.create_document(text, title, metadata))

    async def upload_document(
        self, name: str, data: bytes, *, title: str | None = None
    ) -> Document:
        """Store the text of a file: txt, md, html, pdf or docx, told by its name and content."""
        return await self._do(calls.upload_document(name, data, title))

    async def document(self, document_id: str) -> Document:
        """One document."""
        return await self._do(calls.document(document_id))

    async def document_text(self, document_id: str) -> str:
        """Its text."""
        return await self._do(calls.document_text(document_id))

    async def documents(self, *, limit: int = 20, after: str | None = None) -> Page[Document]:
        """Documents, newest first, behind the id `after`."""
        return await self._do(calls.documents(limit, after))

    async def delete_document(self, document_id: str) -> None:
        """Forget the document and its adaptations."""
        await self._do(calls.delete("documents", document_id))

    # ---- adaptations

    async def adapt(
        self,
        document: str | None = None,
        *,
        document_id: str | None = None,
        method: dict[str, Any] | None = None,
        seed: int | None = None,
        timeout_s: float | None = None,
    ) -> Adaptation:
        """Start studying a document, or find the job that already does; see `wait`."""
        return await self._do(calls.adapt(document, document_id, method, seed, timeout_s))

    async def adaptation(self, adaptation_id: str) -> Adaptation:
        """The job as it is now."""
        return await self._do(calls.adaptation(adaptation_id))

    async def adaptations(self, *, limit: int = 20, after: str | None = None) -> Page[Adaptation]:
        """Jobs, newest first, behind the id `after`."""
        return await self._do(calls.adaptations(limit, after))

    async def cancel(self, adaptation_id: str) -> Adaptation:
        """Ask the job to stop; it ends within a quantum."""
        return await self._do(calls.cancel(adaptation_id))

    async def delete(self, adaptation_id: str) -> None:
        """Forget the adaptation; returns when no memory and no file holds it."""
        await self._do(calls.delete("adaptations", adaptation_id))

    async def adapter(self, adaptation_id: str) -> bytes:
        """The adapter as a safetensors file."""
        return await self._do(calls.adapter(adaptation_id))

    async def events(
        self, adaptation_id: str, *, after: str | None = None
    ) -> AsyncIterator[AdaptationEvent]:
        """A job's events (those later than the id `after`) until it ends, live.

        A connection that breaks is taken up again where it broke.
        """
        path = calls.events_path(adaptation_id)
        while True:
            headers = {"Accept": "text/event-stream"}
            if after is not None:
                headers["Last-Event-ID"] = after
            progressed = False
            try:
                async for event_id, body in self._stream("GET", path, headers=headers):
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

    # ---- text

    async def models(self) -> list[dict[str, Any]]:
        """The base model, then the newest adapted ones, at most 1000 in all."""
        return await self._do(calls.models())

    async def answer(self, request: AnswerRequest) -> dict[str, Any]:
        """Read or adapt as needed, then answer; returns the reply when all answers are there."""
        return await self._do(calls.answer(request))

    async def stream_answer(self, request: AnswerRequest) -> AsyncIterator[dict[str, Any]]:
        """The same as a stream of objects: progress, text and, last, the whole reply."""
        body = {**request.body(), "stream": True}
        async for _, event in self._stream("POST", "/v1/answers", body=body):
            yield event

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, the body and the reply in OpenAI's shape."""
        return await self._do(calls.complete("/v1/completions", body))

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion, the body and the reply in OpenAI's shape."""
        return await self._do(calls.complete("/v1/chat/completions", body))

    async def stream_chat(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The same as a stream of chunks."""
        body = {**body, "stream": True}
        async for _, chunk in self._stream("POST", "/v1/chat/completions", body=body):
            yield chunk

    # ---- sending

    async def _do(self, call: Call[Result]) -> Result:
        async with self._send(call) as response:
            return call.parse(await response.aread())

    async def _stream(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
        call = Call(method=method, path=path, parse=bytes, body=body, headers=headers)
        async with self._send(call) as response:
            reader = EventReader()
            async for line in response.aiter_lines():
                event = reader.take(line)
                if event is None:
                    continue
                if event.data == calls.DONE:
                    return
                yield event.id, calls.stream_record(event)
        raise calls.cut_short(self.url)

    @asynccontextmanager
    async def _send(self, call: Call[Any]) -> AsyncIterator[httpx.Response]:
        """An accepted response, its body still to be read; waits and retries as the server asks."""
        patience = calls.Patience(self._max_wait_s)
        while True:
            request = self._http.build_request(call.method, call.path, **call.request_arguments())
            try:
                response = await self._http.send(request, stream=True)
                if not response.is_success:
                    await response.aread()
            except httpx.TransportError as error:
                raise calls.unreachable(self.url, error) from error
            if response.is_success:
                break
            await self._sleep(patience.delay_s(failure(response)))
        try:
            yield response
        except httpx.TransportError as error:
            raise calls.unreachable(self.url, error) from error
        finally:
            await response.aclose()
