"""One call to the server, when it is sent again, and what its failures are called. Sends nothing.

What each route's call says is in `client_routes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx

from imprint.server.client_errors import (
    ApiError,
    ClientError,
    ServerUnreachableError,
    api_error,
    parse_object,
)
from imprint.server.sse import ServerSentEvent

Result = TypeVar("Result")

DONE = "[DONE]"
POLL_S = 0.2
MAX_RESENDS = 5
FIRST_RESEND_S = 0.25
"""Doubled each time: a server that is replaced within 7 seconds is not missed."""
_RETRIED_STATUSES = frozenset({409, 429, 503})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Result]):
    """One request, and what its reply becomes."""

    method: str
    path: str
    parse: Callable[[bytes], Result]
    body: dict[str, Any] | None = None
    upload: Path | None = None
    """A file that is the body; its type is among `headers`."""
    headers: dict[str, str] | None = None
    params: dict[str, Any] | None = None
    file: tuple[str, bytes] | None = None
    """Name and content of a file; the body is sent as form fields beside it."""
    idempotency_key: str | None = None
    """Where the server honours one: it does such a call once, however often it is sent."""
    lasting: bool = True
    """Whether the server keeps something of it. What is generated is not kept, and given up when
    nobody waits for it any more."""

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice leaves no more behind than sending it once."""
        return self.method == "GET" or self.idempotency_key is not None or not self.lasting

    def request_arguments(self, pieces: Callable[[Path], Any]) -> dict[str, Any]:
        """Arguments of httpx's `build_request`; `pieces` reads the file that is sent, from its
        beginning. Raises OSError where there is none."""
        headers = dict(self.headers or {})
        if self.idempotency_key is not None:
            headers["Idempotency-Key"] = self.idempotency_key
        shared = {"headers": headers, "params": self.params}
        if self.file is not None:
            return {**shared, "files": {"file": self.file}, "data": self.body or {}}
        if self.upload is not None:
            headers["Content-Length"] = str(self.upload.stat().st_size)  # refused by its head alone
            return {**shared, "content": pieces(self.upload)}
        return {**shared, "json": self.body}


class Patience:
    """How long, and how often, one call may still be sent again."""

    def __init__(self, call: Call[Any], *, url: str, max_wait_s: float) -> None:
        self._call = call
        self._url = url
        self._left_s = max_wait_s
        self._num_breaks = 0

    def after_refusal_s(self, refusal: ApiError) -> float:
        """Seconds to wait, as the server asks; raises the refusal where waiting does not help."""
        delay_s = refusal.retry_after_s
        if refusal.status not in _RETRIED_STATUSES or delay_s is None or delay_s > self._left_s:
            raise refusal
        self._left_s -= delay_s
        return delay_s

    def after_break_s(self, error: httpx.TransportError) -> float:
        """Seconds to wait after a connection broke. Raises ServerUnreachableError where the call
        may have been done and must not be done twice, where nobody was there to begin with, and
        where it has been tried often enough."""
        connecting = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        broken = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
        delay_s = FIRST_RESEND_S * float(2**self._num_breaks)
        if (
            not self._call.repeatable
            or not (broken or connecting)
            or (connecting and self._num_breaks == 0)
            or self._num_breaks == MAX_RESENDS
            or delay_s > self._left_s
        ):
            raise unreachable(self._url, error) from error
        self._num_breaks += 1
        self._left_s -= delay_s
        return delay_s


def http_options(url: str, timeout_s: float, api_key: str | None) -> dict[str, Any]:
    """Arguments of an httpx client. Raises ClientError for what is no address or no key."""
    if not url.startswith(("http://", "https://")):
        raise ClientError(f"the server's address must start with http:// or https://: {url}")
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise ClientError(f"the server's address cannot be read: {url} ({error})") from None
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise ClientError("the API key must be printable ASCII")
    return {
        "base_url": url.rstrip("/"),
        "timeout": httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
        # a proxy named in the environment cannot reach this machine's own servers
        "trust_env": host not in _LOOPBACK,
        "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
    }


def unreachable(url: str, error: httpx.TransportError) -> ServerUnreachableError:
    """The error for a connection that could not be made, or broke."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ServerUnreachableError(f"no server answers at {url}; is it running?")
    if isinstance(error, httpx.TimeoutException):
        return ServerUnreachableError(f"{url} did not answer in time")
    return ServerUnreachableError(f"the connection to {url} broke: {error}")


def cut_short(url: str) -> ServerUnreachableError:
    """The error for a stream without its end."""
    return ServerUnreachableError(f"{url} ended the stream before it was complete")


def stream_record(event: ServerSentEvent) -> dict[str, Any]:
    """The object of an event; raises ApiError for an error in mid-stream."""
    record = parse_object(event.data)
    if set(record) == {"error"}:
        raise api_error(record, status=200)
    return record
