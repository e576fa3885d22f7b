"""A typed client of the HTTP interface, used by the command line. Imports no torch.

`ImprintClient` is synchronous, `AsyncImprintClient` the same for asyncio. Both wait as the server
asks (`Retry-After`) and try again, for a bounded time: what was refused so has not been done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx

from imprint.server import client_calls as calls
from imprint.server.async_client import AsyncImprintClient
from imprint.server.client_calls import Call, Result
from imprint.server.client_errors import (
    ApiError,
    BadReplyError,
    ClientError,
    ServerUnreachableError,
    failure,
)
from imprint.server.client_types import (
    TERMINAL_STATUSES,
    Adaptation,
    AdaptationEvent,
    AnswerRequest,
    Document,
    Page,
)
from imprint.server.sse import parse_events

__all__ = [
    "TERMINAL_STATUSES",
    "Adaptation",
    "AdaptationEvent",
    "AnswerRequest",
    "ApiError",
    "AsyncImprintClient",
    "BadReplyError",
    "ClientError",
    "Document",
    "ImprintClient",
    "Page",
    "ServerUnreachableError",
]


class ImprintClient:
    """Talks to one server. A context manager; close it when done."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8765",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_wait_s: float = 300.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_s` bounds the wait for bytes, `max_wait_s` all waits of a call together."""
        self.url = url.rstrip("/")
        self._max_wait_s = max_wait_s
        self._sleep = sleep
        options = calls.http_options(url, timeout_s, api_key)
        self._http = httpx.Client(transport=transport, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def is_ready(self) -> bool:
        """Whether the server says that it can work; False also when nothing answers."""
        try:
            return self._http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def health(self) -> dict[str, Any]:
        """The server's own account of its state, workers included."""
        return self._do(calls.get("/health"))

    # ---- documents

    def create_document(
        self, text: str, *, title: str | None = None, metadata: dict[str, str] | None = None
    ) -> Document:
        """Store a text, to be studied and asked by its id."""
        return self._do(calls.create_document(text, title, metadata))

    def upload_document(self, name: str, data: bytes, *, title: str | None = None) -> Document:
        """Store the text of a file: txt, md, html, pdf or docx, told by its name and content."""
        return self._do(calls.upload_document(name, data, title))

    def document(self, document_id: str) -> Document:
        """One document."""
        return self._do(calls.document(document_id))

    def document_text(self, document_id: str) -> str:
        """Its text."""
        return self._do(calls.document_text(document_id))

    def documents(self, *, limit: int = 20, after: str | None = None) -> Page[Document]:
        """Documents, newest first, behind the id `after`."""
        return self._do(calls.documents(limit, after))

    def delete_document(self, document_id: str) -> None:
        """Forget the document and its adaptations."""
        self._do(calls.delete("documents", document_id))

    # ---- adaptations

    def adapt(
        self,
        document: str | None = None,
        *,
        document_id: str | None = None,
        method: dict[str, Any] | None = None,
        seed: int | None = None,
        timeout_s: float | None = None,
    ) -> Adaptation:
        """Start studying a document, or find the job that already does; see `wait`."""
        return self._do(calls.adapt(document, document_id, method, seed, timeout_s))

    def adaptation(self, adaptation_id: str) -> Adaptation:
        """The job as it is now."""
        return self._do(calls.adaptation(adaptation_id))

    def adaptations(self, *, limit: int = 20, after: str | None = None) -> Page[Adaptation]:
        """Jobs, newest first, behind the id `after`."""
        return self._do(calls.adaptations(limit, after))

    def cancel(self, adaptation_id: str) -> Adaptation:
        """Ask the job to stop; it ends within a quantum."""
        return self._do(calls.cancel(adaptation_id))

    def delete(self, adaptation_id: str) -> None:
        """Forget the adaptation; returns when no memory and no file holds it."""
        self._do(calls.delete("adaptations", adaptation_id))

    def adapter(self, adaptation_id: str) -> bytes:
        """The adapter as a safetensors file."""
        return self._do(calls.adapter(adaptation_id))

    def events(self, adaptation_id: str, *, after: str | None = None) -> Iterator[AdaptationEvent]:
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
                for event_id, body in self._stream("GET", path, headers=headers):
                    progressed, after = True, event_id or after
                    yield AdaptationEvent.from_body(event_id, body)
            except ServerUnreachableError:
                if not progressed:
                    raise
                continue
            return

    def wait(
        self, adaptation_id: str, on_event: Callable[[AdaptationEvent], None] | None = None
    ) -> Adaptation:
        """Follow a job to its end and return it; `on_event` hears of its progress."""
        after: str | None = None
        while True:
            for event in self.events(adaptation_id, after=after):
                after = event.id or after
                if on_event is not None:
                    on_event(event)
            job = self.adaptation(adaptation_id)
            if job.is_terminal:
                return job
            self._sleep(calls.POLL_S)

    # ---- text

    def models(self) -> list[dict[str, Any]]:
        """The base model, then the newest adapted ones, at most 1000 in all."""
        return self._do(calls.models())

    def answer(self, request: AnswerRequest) -> dict[str, Any]:
        """Read or adapt as needed, then answer; returns the reply when all answers are there."""
        return self._do(calls.answer(request))

    def stream_answer(self, request: AnswerRequest) -> Iterator[dict[str, Any]]:
        """The same as a stream of objects: progress, text and, last, the whole reply."""
        body = {**request.body(), "stream": True}
        for _, event in self._stream("POST", "/v1/answers", body=body):
            yield event

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, the body and the reply in OpenAI's shape."""
        return self._do(calls.complete("/v1/completions", body))

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion, the body and the reply in OpenAI's shape."""
        return self._do(calls.complete("/v1/chat/completions", body))

    def stream_chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The same as a stream of chunks."""
        body = {**body, "stream": True}
        for _, chunk in self._stream("POST", "/v1/chat/completions", body=body):
            yield chunk

    # ---- sending

    def _do(self, call: Call[Result]) -> Result:
        with self._send(call) as response:
            return call.parse(response.read())

    def _stream(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[tuple[str | None, dict[str, Any]]]:
        call = Call(method=method, path=path, parse=bytes, body=body, headers=headers)
        with self._send(call) as response:
            for event in parse_events(response.iter_lines()):
                if event.data == calls.DONE:
                    return
                yield event.id, calls.stream_record(event)
        raise calls.cut_short(self.url)

    @contextmanager
    def _send(self, call: Call[Any]) -> Iterator[httpx.Response]:
        """An accepted response, its body still to be read; waits and retries as the server asks."""
        patience = calls.Patience(self._max_wait_s)
        while True:
            request = self._http.build_request(call.method, call.path, **call.request_arguments())
            try:
                response = self._http.send(request, stream=True)
                if not response.is_success:
                    response.read()
            except httpx.TransportError as error:
                raise calls.unreachable(self.url, error) from error
            if response.is_success:
                break
            self._sleep(patience.delay_s(failure(response)))
        try:
            yield response
        except httpx.TransportError as error:
            raise calls.unreachable(self.url, error) from error
        finally:
            response.close()
