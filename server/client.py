"""A small typed client of the HTTP interface, used by the command line. Imports no torch.

Synchronous. Waits as the server asks (`Retry-After`) and tries again, for a bounded time: every
POST that it sends may safely be sent twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import httpx

from imprint.server.client_errors import (
    ApiError,
    BadReplyError,
    ClientError,
    ServerUnreachableError,
    api_error,
    failure,
    parse_object,
)
from imprint.server.sse import parse_events

__all__ = [
    "TERMINAL_STATUSES",
    "Adaptation",
    "AdaptationEvent",
    "AnswerRequest",
    "ApiError",
    "BadReplyError",
    "ClientError",
    "ImprintClient",
    "ServerUnreachableError",
]

_RETRIED_STATUSES = frozenset({409, 429, 503})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_DONE = "[DONE]"
_POLL_S = 0.2
TERMINAL_STATUSES = frozenset({"succeeded", "rejected", "failed", "cancelled", "expired"})
"""Statuses after which an adaptation changes no more."""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """One adaptation job as the server describes it."""

    id: str
    status: str
    body: dict[str, Any]
    """The whole JSON object."""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the server's object; raises `BadReplyError` for another one."""
        if not isinstance(body.get("id"), str) or not isinstance(body.get("status"), str):
            raise BadReplyError("the server's reply is not an adaptation; is it an Imprint server?")
        return cls(body["id"], body["status"], body)

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in TERMINAL_STATUSES


@dataclass(frozen=True, slots=True)
class AdaptationEvent:
    """Something that happened to an adaptation; `data` holds its numbers."""

    id: str | None
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRequest:
    """Questions about one document, or about the document of an adaptation; None means default."""

    questions: tuple[str, ...]
    document: str | None = None
    adaptation: str | None = None
    """Id of an adaptation, instead of a document."""
    focus: bool | dict[str, Any] | None = None
    """Whether to adapt for the questions; an object overrides fields of that adaptation."""
    method: dict[str, Any] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if (self.document is None) == (self.adaptation is None):
            raise ValueError("give either a document or the id of an adaptation")

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return _present(**asdict(self))


class ImprintClient:
    """Talks to one server. A context manager; close it when done."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8765",
        *,
        timeout_s: float = 600.0,
        max_wait_s: float = 300.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_s` bounds the wait for bytes, `max_wait_s` all waits between tries together."""
        if not url.startswith(("http://", "https://")):
            raise ClientError(f"the server's address must start with http:// or https://: {url}")
        try:
            host = httpx.URL(url).host
        except httpx.InvalidURL as error:
            raise ClientError(f"the server's address cannot be read: {url} ({error})") from None
        self.url = url.rstrip("/")
        self._max_wait_s = max_wait_s
        self._sleep = sleep
        timeout = httpx.Timeout(timeout_s, connect=min(10.0, timeout_s))
        self._http = httpx.Client(
            base_url=self.url,
            timeout=timeout,
            transport=transport,
            # a proxy named in the environment cannot reach this machine's own servers
            trust_env=host not in _LOOPBACK,
        )

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
        return self._json("GET", "/health")

    def adapt(
        self,
        document: str,
        *,
        method: dict[str, Any] | None = None,
        seed: int | None = None,
        timeout_s: float | None = None,
    ) -> Adaptation:
        """Start studying a document, or find the job that already does; see `wait`."""
        body = _present(document=document, method=method, seed=seed, timeout_s=timeout_s)
        return Adaptation.from_body(self._json("POST", "/v1/adaptations", body))

    def adaptation(self, adaptation_id: str) -> Adaptation:
        """The job as it is now."""
        return Adaptation.from_body(self._json("GET", f"/v1/adaptations/{adaptation_id}"))

    def cancel(self, adaptation_id: str) -> Adaptation:
        """Ask the job to stop; it ends within a quantum."""
        return Adaptation.from_body(self._json("POST", f"/v1/adaptations/{adaptation_id}/cancel"))

    def delete(self, adaptation_id: str) -> None:
        """Forget the adaptation; returns when no memory and no file holds it."""
        with self._send("DELETE", f"/v1/adaptations/{adaptation_id}") as response:
            response.read()

    def events(self, adaptation_id: str, *, after: str | None = None) -> Iterator[AdaptationEvent]:
        """A job's events (those later than the id `after`) until it ends, live.

        A connection that breaks is taken up again where it broke.
        """
        path = f"/v1/adaptations/{adaptation_id}/events"
        while True:
            headers = {"Accept": "text/event-stream"}
            if after is not None:
                headers["Last-Event-ID"] = after
            progressed = False
            try:
                for event_id, body in self._stream("GET", path, headers=headers):
                    progressed, after = True, event_id or after
                    data = body.get("data")
                    kind = str(body.get("kind", ""))
                    yield AdaptationEvent(event_id, kind, data if isinstance(data, dict) else {})
            except ServerUnreachableError:
                if not progressed:
                    raise
                continue
            return

    def wait(
        self, adaptation_id: str, on_event: Callable[[AdaptationEvent], None] | None = None
    ) -> Adaptation:
        """Follow a job to its end and return it."""
        after: str | None = None
        while True:
            for event in self.events(adaptation_id, after=after):
                after = event.id or after
                if on_event is not None:
                    on_event(event)
            job = self.adaptation(adaptation_id)
            if job.is_terminal:
                return job
            self._sleep(_POLL_S)

    def answer(self, request: AnswerRequest) -> dict[str, Any]:
        """Read or adapt as needed, then answer; returns the reply when all answers are there."""
        return self._json("POST", "/v1/answers", request.body())

    def stream_answer(self, request: AnswerRequest) -> Iterator[dict[str, Any]]:
        """The same as a stream of objects: progress, text and, last, the whole reply."""
        body = {**request.body(), "stream": True}
        for _, event in self._stream("POST", "/v1/answers", body=body):
            yield event

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._send(method, path, body=body) as response:
            return parse_object(response.read())

    def _stream(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[tuple[str | None, dict[str, Any]]]:
        with self._send(method, path, body=body, headers=headers) as response:
            for event in parse_events(response.iter_lines()):
                if event.data == _DONE:
                    return
                record = parse_object(event.data)
                if set(record) == {"error"}:
                    raise api_error(record, status=200)
                yield event.id, record
        raise ServerUnreachableError(f"{self.url} ended the stream before it was complete")

    @contextmanager
    def _send(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        """An accepted response, its body still to be read; waits and retries as the server asks."""
        waited_s = 0.0
        while True:
            request = self._http.build_request(method, path, json=body, headers=headers)
            try:
                response = self._http.send(request, stream=True)
                if not response.is_success:
                    response.read()
            except httpx.TransportError as error:
                raise self._unreachable(error) from error
            if response.is_success:
                break
            refusal = failure(response)
            delay_s = refusal.retry_after_s
            if refusal.status not in _RETRIED_STATUSES or delay_s is None:
                raise refusal
            if waited_s + delay_s > self._max_wait_s:
                raise refusal
            self._sleep(delay_s)
            waited_s += delay_s
        try:
            yield response
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        finally:
            response.close()

    def _unreachable(self, error: httpx.TransportError) -> ServerUnreachableError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerUnreachableError(f"no server answers at {self.url}; is it running?")
        if isinstance(error, httpx.TimeoutException):
            return ServerUnreachableError(f"{self.url} did not answer in time")
        return ServerUnreachableError(f"the connection to {self.url} broke: {error}")


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
