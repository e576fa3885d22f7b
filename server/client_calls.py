"""What each call to the server says and how its reply is read, for both clients. Sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from imprint.server.client_errors import (
    ApiError,
    BadReplyError,
    ClientError,
    ServerUnreachableError,
    api_error,
    parse_object,
)
from imprint.server.client_types import Adaptation, AnswerRequest, Document, Page, present
from imprint.server.sse import ServerSentEvent

Result = TypeVar("Result")

DONE = "[DONE]"
POLL_S = 0.2
_RETRIED_STATUSES = frozenset({409, 429, 503})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Result]):
    """One request, and what its reply becomes."""

    method: str
    path: str
    parse: Callable[[bytes], Result]
    body: dict[str, Any] | None = None
    headers: dict[str, str] | None = None
    params: dict[str, Any] | None = None
    file: tuple[str, bytes] | None = None
    """Name and content of a file; the body is sent as form fields beside it."""

    def request_arguments(self) -> dict[str, Any]:
        """Arguments of httpx's `build_request`."""
        shared = {"headers": self.headers, "params": self.params}
        if self.file is not None:
            return {**shared, "files": {"file": self.file}, "data": self.body or {}}
        return {**shared, "json": self.body}


class Patience:
    """How long one call may still wait before it is sent again."""

    def __init__(self, max_wait_s: float) -> None:
        self._left_s = max_wait_s

    def delay_s(self, refusal: ApiError) -> float:
        """Seconds to wait, as the server asks; raises the refusal where waiting does not help."""
        delay_s = refusal.retry_after_s
        if refusal.status not in _RETRIED_STATUSES or delay_s is None or delay_s > self._left_s:
            raise refusal
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


def get(path: str) -> Call[dict[str, Any]]:
    """Whatever object is there."""
    return Call(method="GET", path=path, parse=parse_object)


def adapt(
    document: str | None,
    document_id: str | None,
    method: dict[str, Any] | None,
    seed: int | None,
    timeout_s: float | None,
) -> Call[Adaptation]:
    """Start an adaptation."""
    body = present(
        document=document, document_id=document_id, method=method, seed=seed, timeout_s=timeout_s
    )
    return Call(method="POST", path="/v1/adaptations", parse=_adaptation, body=body)


def adaptation(id: str) -> Call[Adaptation]:
    """One adaptation."""
    return Call(method="GET", path=_path("adaptations", id), parse=_adaptation)


def adaptations(limit: int, after: str | None) -> Call[Page[Adaptation]]:
    """A page of adaptations."""
    params = present(limit=limit, after=after)
    return Call(
        method="GET", path="/v1/adaptations", parse=_page(Adaptation.from_body), params=params
    )


def cancel(id: str) -> Call[Adaptation]:
    """Stop an adaptation."""
    return Call(method="POST", path=f"{_path('adaptations', id)}/cancel", parse=_adaptation)


def delete(kind: str, id: str) -> Call[bytes]:
    """Delete a resource; what the reply says is not needed."""
    return Call(method="DELETE", path=_path(kind, id), parse=bytes)


def events_path(id: str) -> str:
    """Where the events of an adaptation are."""
    return f"{_path('adaptations', id)}/events"


def adapter(id: str) -> Call[bytes]:
    """An adapter's file."""
    return Call(method="GET", path=f"{_path('adaptations', id)}/adapter", parse=bytes)


def create_document(
    text: str, title: str | None, metadata: dict[str, str] | None
) -> Call[Document]:
    """Store a text."""
    body = present(text=text, title=title, metadata=metadata)
    return Call(method="POST", path="/v1/documents", parse=_document, body=body)


def upload_document(name: str, data: bytes, title: str | None) -> Call[Document]:
    """Store a file's text."""
    fields = present(title=title)
    return Call(
        method="POST", path="/v1/documents", parse=_document, body=fields, file=(name, data)
    )


def document(id: str) -> Call[Document]:
    """One document."""
    return Call(method="GET", path=_path("documents", id), parse=_document)


def document_text(id: str) -> Call[str]:
    """A document's text."""
    return Call(method="GET", path=f"{_path('documents', id)}/content", parse=_text)


def documents(limit: int, after: str | None) -> Call[Page[Document]]:
    """A page of documents."""
    params = present(limit=limit, after=after)
    return Call(method="GET", path="/v1/documents", parse=_page(Document.from_body), params=params)


def models() -> Call[list[dict[str, Any]]]:
    """The first page of models, at most 1000."""
    return Call(method="GET", path="/v1/models", parse=_data)


def answer(request: AnswerRequest) -> Call[dict[str, Any]]:
    """Ask."""
    return Call(method="POST", path="/v1/answers", parse=parse_object, body=request.body())


def complete(path: str, body: dict[str, Any]) -> Call[dict[str, Any]]:
    """A completion or chat completion."""
    return Call(method="POST", path=path, parse=parse_object, body=body)


def _path(kind: str, id: str) -> str:
    if id in ("", ".", ".."):
        raise ClientError(f"{id!r} is no id")
    return f"/v1/{kind}/{quote(id, safe='')}"


def _adaptation(data: bytes) -> Adaptation:
    return Adaptation.from_body(parse_object(data))


def _document(data: bytes) -> Document:
    return Document.from_body(parse_object(data))


def _data(data: bytes) -> list[dict[str, Any]]:
    items = parse_object(data).get("data")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BadReplyError("the server's reply is not a list; is it an Imprint server?")
    return items


def _page(read: Callable[[dict[str, Any]], Result]) -> Callable[[bytes], Page[Result]]:
    def parse(data: bytes) -> Page[Result]:
        items = [read(item) for item in _data(data)]
        body = parse_object(data)
        last = body.get("last_id")
        return Page(items, bool(body.get("has_more")), None if last is None else str(last))

    return parse


def _text(data: bytes) -> str:
    text = parse_object(data).get("text")
    if not isinstance(text, str):
        raise BadReplyError("the server's reply is not a text; is it an Imprint server?")
    return text
