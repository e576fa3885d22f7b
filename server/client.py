"""A typed client of the HTTP interface, used by the command line. Imports no torch.

`ImprintClient` is synchronous, `AsyncImprintClient` the same for asyncio; most of their methods are
described in `client_routes.py`. Both wait as the server asks (`Retry-After`) and try again, for a
bounded time: what was refused so has not been done. Where a connection breaks, the call is sent
again if it may be sent twice: what reads, what makes something under an Idempotency-Key, and what
is generated, of which nothing is kept. A stream is sent again only before its first object: what
was given to the caller cannot be taken back. Deletions are not sent again: the second would find
nothing, and say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from imprint.server import client_calls as calls
from imprint.server import client_routes as routes
from imprint.server.async_client import AsyncImprintClient
from imprint.server.client_calls import Call, Patience
from imprint.server.client_errors import (
    ApiError,
    BadReplyError,
    ClientError,
    ServerUnreachableError,
    failure,
)
from imprint.server.client_files import NewFile, pieces
from imprint.server.client_methods import BlockingMethods
from imprint.server.client_types import (
    TERMINAL_STATUSES,
    Adaptation,
    AdaptationEvent,
    AnswerRequest,
    AppendedDocument,
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
    "AppendedDocument",
    "AsyncImprintClient",
    "BadReplyError",
    "ClientError",
    "Document",
    "ImprintClient",
    "Page",
    "ServerUnreachableError",
]

R = TypeVar("R")


class ImprintClient(BlockingMethods):
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

    def is_live(self) -> bool:
        """Whether the server answers; False also when nothing does."""
        return self._is("live")

    def is_ready(self) -> bool:
        """Whether the server says that it can work; False also when nothing answers."""
        return self._is("ready")

    def events(self, adaptation_id: str, *, after: str | None = None) -> Iterator[AdaptationEvent]:
        """A job's events (those later than the id `after`) until it ends, live.

        A connection that breaks is taken up again where it broke.
        """
        while True:
            progressed = False
            try:
                for event_id, body in self._stream(routes.stream_events(adaptation_id, after)):
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

    def export_adapter(self, adaptation_id: str, path: Path | str) -> int:
        """Get an adapter as a safetensors file, for `import_adapter`; returns its bytes.

        It is written piece by piece, and begun anew where the connection breaks; under its name
        lies a whole file or none. Raises FileExistsError for a name that is taken, and OSError
        where the file cannot be written.
        """
        with NewFile(Path(path)) as file:
            self._download(routes.adapter(adaptation_id), file)
            file.keep()
            return file.num_bytes

    # ---- sending

    def _is(self, state: str) -> bool:
        try:
            return self._http.get(f"/health/{state}").is_success
        except httpx.TransportError:
            return False

    def _do(self, call: Call[R]) -> R:
        return call.parse(self._send(call, whole=True).content)

    def _walk(self, page: Callable[..., Call[Page[R]]]) -> Iterator[R]:
        found = self._do(page(limit=100))
        yield from found.items
        while found.has_more:
            found = self._do(page(limit=100, after=found.last_id))
            yield from found.items

    def _stream(self, call: Call[bytes]) -> Iterator[tuple[str | None, dict[str, Any]]]:
        response = self._send(call, whole=False)
        try:
            for event in parse_events(response.iter_lines()):
                if event.data == calls.DONE:
                    return
                yield event.id, calls.stream_record(event)
        except httpx.TransportError as error:
            raise calls.unreachable(self.url, error) from error
        finally:
            response.close()
        raise calls.cut_short(self.url)

    def _records(self, call: Call[bytes]) -> Iterator[dict[str, Any]]:
        for _, record in self._stream(call):
            yield record

    def _download(self, call: Call[bytes], file: NewFile) -> None:
        patience = self._patience(call)
        while True:
            response = self._send(call, whole=False, patience=patience)
            file.restart()
            try:
                for piece in response.iter_bytes():
                    file.write(piece)
                return
            except httpx.TransportError as error:
                delay_s = patience.after_break_s(error)
            finally:
                response.close()
            self._sleep(delay_s)

    def _patience(self, call: Call[Any]) -> Patience:
        return Patience(call, url=self.url, max_wait_s=self._max_wait_s)

    def _send(
        self, call: Call[Any], *, whole: bool, patience: Patience | None = None
    ) -> httpx.Response:
        """An accepted response, `whole` or with its body still to be read; sends again where that
        may help."""
        patience = patience or self._patience(call)
        while True:
            arguments = call.request_arguments(pieces)
            request = self._http.build_request(call.method, call.path, **arguments)
            try:
                response = self._http.send(request, stream=not whole)
                if response.is_success:
                    return response
                response.read()
            except httpx.TransportError as error:
                delay_s = patience.after_break_s(error)
            else:
                delay_s = patience.after_refusal_s(failure(response))
            self._sleep(delay_s)
