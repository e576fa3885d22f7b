"""The client for asyncio: `imprint.server.client.ImprintClient`, awaited. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from imprint.server import client_calls as calls
from imprint.server import client_routes as routes
from imprint.server.client_calls import Call
from imprint.server.client_errors import ServerUnreachableError, failure
from imprint.server.client_types import Adaptation, AdaptationEvent, Document, Page
from imprint.server.sse import EventReader

P = ParamSpec("P")
R = TypeVar("R")


def _sent(
    make: Callable[P, Call[R]],
) -> Callable[Concatenate[AsyncImprintClient, P], Coroutine[Any, Any, R]]:
    """The method that sends this call."""

    @wraps(make)
    async def method(self: AsyncImprintClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._do(make(*args, **kwargs))

    return method


def _streamed(
    make: Callable[P, Call[bytes]],
) -> Callable[Concatenate[AsyncImprintClient, P], AsyncIterator[dict[str, Any]]]:
    """The method that sends this call and gives the objects of its reply as they come."""

    @wraps(make)
    async def method(
        self: AsyncImprintClient, /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator[dict[str, Any]]:
        async for _, record in self._stream(make(*args, **kwargs)):
            yield record

    return method


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

    async def is_live(self) -> bool:
        """Whether the server answers; False also when nothing does."""
        return await self._is("live")

    async def is_ready(self) -> bool:
        """Whether the server says that it can work; False also when nothing answers."""
        return await self._is("ready")

    health = _sent(routes.health)
    version = _sent(routes.version)
    metrics = _sent(routes.metrics)

    create_document = _sent(routes.create_document)
    upload_document = _sent(routes.upload_document)
    append_document = _sent(routes.append_document)
    document = _sent(routes.document)
    document_text = _sent(routes.document_text)
    documents_page = _sent(routes.documents_page)
    delete_document = _sent(routes.delete_document)

    adapt = _sent(routes.adapt)
    adaptation = _sent(routes.adaptation)
    adaptations_page = _sent(routes.adaptations_page)
    cancel = _sent(routes.cancel)
    delete = _sent(routes.delete)
    events_page = _sent(routes.events_page)
    study = _sent(routes.study)
    study_profile = _sent(routes.study_profile)
    study_tokens = _sent(routes.study_tokens)
    adapter = _sent(routes.adapter)
    import_adapter = _sent(routes.import_adapter)

    answer = _sent(routes.answer)
    stream_answer = _streamed(routes.stream_answer)
    complete = _sent(routes.complete)
    stream_complete = _streamed(routes.stream_complete)
    chat = _sent(routes.chat)
    stream_chat = _streamed(routes.stream_chat)
    tokenize = _sent(routes.tokenize)
    detokenize = _sent(routes.detokenize)
    models_page = _sent(routes.models_page)
    model = _sent(routes.model)

    def documents(self) -> AsyncIterator[Document]:
        """All documents, newest first, page by page."""
        return self._walk(routes.documents_page)

    def adaptations(self) -> AsyncIterator[Adaptation]:
        """All jobs, newest first, page by page."""
        return self._walk(routes.adaptations_page)

    def models(self) -> AsyncIterator[dict[str, Any]]:
        """The base model, then all adapted ones, newest first, page by page."""
        return self._walk(routes.models_page)

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

    async def _send(self, call: Call[Any], *, whole: bool) -> httpx.Response:
        """An accepted response, `whole` or with its body still to be read; sends again where that
        may help."""
        patience = calls.Patience(call, url=self.url, max_wait_s=self._max_wait_s)
        while True:
            request = self._http.build_request(call.method, call.path, **call.request_arguments())
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
