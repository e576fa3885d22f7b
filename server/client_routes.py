"""What the call of each route says, and how its reply is read: the methods of both clients.

Sends nothing. The signatures and descriptions here are those of the clients' methods.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from imprint.server.client_calls import Call
from imprint.server.client_errors import BadReplyError, ClientError, parse_object
from imprint.server.client_types import (
    Adaptation,
    AdaptationEvent,
    AnswerRequest,
    AppendedDocument,
    Document,
    Page,
    present,
)

Item = TypeVar("Item")
Json = dict[str, Any]
_STREAM = {"Accept": "text/event-stream"}
_FILE = {"Content-Type": "application/octet-stream"}


# ---- documents


def create_document(
    text: str,
    *,
    title: str | None = None,
    metadata: dict[str, str] | None = None,
    expires_after_s: float | None = None,
) -> Call[Document]:
    """Store a text, to be studied and asked by its id."""
    body = present(text=text, title=title, metadata=metadata, expires_after_s=expires_after_s)
    return _post("/v1/documents", _document, body, once=True)


def upload_document(
    name: str,
    data: bytes,
    *,
    title: str | None = None,
    metadata: dict[str, str] | None = None,
    expires_after_s: float | None = None,
) -> Call[Document]:
    """Store the text of a file: txt, md, html, pdf or docx, told by its name and content."""
    noted = None if metadata is None else json.dumps(metadata)
    fields = present(title=title, metadata=noted, expires_after_s=expires_after_s)
    return _post("/v1/documents", _document, fields, file=(name, data), once=True)


def append_document(
    document_id: str,
    text: str,
    *,
    version: int | None = None,
    method: Json | None = None,
    seed: int | None = None,
) -> Call[AppendedDocument]:
    """Add to a document, which gets a next version, and start to read what is new.

    `version` is the one that is meant: refused where the document has another by now. With a
    `method`, the new version is adapted, too.
    """
    body = present(text=text, version=version, method=method, seed=seed)
    path = f"{_path('documents', document_id)}/append"
    return _post(path, lambda data: AppendedDocument.from_body(parse_object(data)), body, once=True)


def document(document_id: str) -> Call[Document]:
    """One document."""
    return _get(_path("documents", document_id), _document)


def document_text(document_id: str) -> Call[str]:
    """A document's text."""
    return _get(f"{_path('documents', document_id)}/content", _text("text"))


def documents_page(*, limit: int = 20, after: str | None = None) -> Call[Page[Document]]:
    """Documents, newest first, behind the id `after`; at most 100."""
    return _get("/v1/documents", _page(Document.from_body), present(limit=limit, after=after))


def delete_document(document_id: str) -> Call[None]:
    """Forget the document and its adaptations; returns when no memory and no file holds them."""
    return Call(method="DELETE", path=_path("documents", document_id), parse=_nothing)


# ---- adaptations


def adapt(
    document: str | None = None,
    *,
    document_id: str | None = None,
    method: Json | None = None,
    seed: int | None = None,
    priority: int | None = None,
    timeout_s: float | None = None,
    expires_after_s: float | None = None,
    idle_expires_after_s: float | None = None,
    metadata: dict[str, str] | None = None,
) -> Call[Adaptation]:
    """Start studying a document, or find the job that already does; see `wait`."""
    body = present(
        document=document,
        document_id=document_id,
        method=method,
        seed=seed,
        priority=priority,
        timeout_s=timeout_s,
        expires_after_s=expires_after_s,
        idle_expires_after_s=idle_expires_after_s,
        metadata=metadata,
    )
    return _post("/v1/adaptations", _adaptation, body, once=True)


def adaptation(adaptation_id: str) -> Call[Adaptation]:
    """The job as it is now."""
    return _get(_path("adaptations", adaptation_id), _adaptation)


def adaptations_page(*, limit: int = 20, after: str | None = None) -> Call[Page[Adaptation]]:
    """Jobs, newest first, behind the id `after`; at most 100."""
    return _get("/v1/adaptations", _page(Adaptation.from_body), present(limit=limit, after=after))


def cancel(adaptation_id: str) -> Call[Adaptation]:
    """Ask the job to stop; it ends within a quantum."""
    return _post(f"{_path('adaptations', adaptation_id)}/cancel", _adaptation, None)


def delete(adaptation_id: str) -> Call[None]:
    """Forget the adaptation; returns when no memory and no file holds it."""
    return Call(method="DELETE", path=_path("adaptations", adaptation_id), parse=_nothing)


def events_page(
    adaptation_id: str, *, limit: int = 100, after: int = 0
) -> Call[Page[AdaptationEvent]]:
    """What has happened to a job behind event number `after`, oldest first; at most 100."""
    path = f"{_path('adaptations', adaptation_id)}/events"
    return _get(path, _page(_event), {"limit": limit, "after": after})


def stream_events(adaptation_id: str, after: str | None) -> Call[bytes]:
    """A job's events as they happen, behind the id `after`."""
    headers = _STREAM if after is None else {**_STREAM, "Last-Event-ID": after}
    path = f"{_path('adaptations', adaptation_id)}/events"
    return Call(method="GET", path=path, parse=bytes, headers=headers)


def study(adaptation_id: str, *, limit: int = 16, after: int = 0) -> Call[Json]:
    """What the steps behind step `after` tried: positions, truth, rollouts, rewards."""
    path = f"{_path('adaptations', adaptation_id)}/study"
    return _get(path, parse_object, {"limit": limit, "after": after})


def study_profile(adaptation_id: str) -> Call[Json]:
    """The document's entropy in at most 240 pieces, in nats."""
    return _get(f"{_path('adaptations', adaptation_id)}/study/profile", parse_object)


def study_tokens(adaptation_id: str, *, limit: int = 2000, after: int = 0) -> Call[Json]:
    """The document behind token `after`, token by token, with the entropy in nats before each."""
    path = f"{_path('adaptations', adaptation_id)}/study/tokens"
    return _get(path, parse_object, {"limit": limit, "after": after})


def adapter(adaptation_id: str) -> Call[bytes]:
    """The adapter as a safetensors file."""
    return _get(f"{_path('adaptations', adaptation_id)}/adapter", bytes)


def import_adapter(path: Path | str) -> Call[Adaptation]:
    """Take in an adapter's file, of any server of the same model, sent in pieces; see `wait`.
    Raises OSError where it cannot be read."""
    file = Path(path)
    return _post("/v1/adapters", _adaptation, None, upload=file, headers=_FILE, once=True)


# ---- text


def answer(request: AnswerRequest) -> Call[Json]:
    """Read or adapt as needed, then answer; returns the reply when all answers are there."""
    return _post("/v1/answers", parse_object, request.body(), once=True)


def stream_answer(request: AnswerRequest) -> Call[bytes]:
    """The same as a stream of objects: progress, text and, last, the whole reply."""
    return _generate("/v1/answers", bytes, {**request.body(), "stream": True})


def complete(body: Json) -> Call[Json]:
    """A completion, the body and the reply in OpenAI's shape."""
    return _generate("/v1/completions", parse_object, body)


def stream_complete(body: Json) -> Call[bytes]:
    """The same as a stream of chunks."""
    return _generate("/v1/completions", bytes, {**body, "stream": True})


def chat(body: Json) -> Call[Json]:
    """A chat completion, the body and the reply in OpenAI's shape."""
    return _generate("/v1/chat/completions", parse_object, body)


def stream_chat(body: Json) -> Call[bytes]:
    """The same as a stream of chunks."""
    return _generate("/v1/chat/completions", bytes, {**body, "stream": True})


def tokenize(
    prompt: str | None = None,
    *,
    messages: Sequence[Json] | None = None,
    model: str | None = None,
    return_token_strs: bool | None = None,
) -> Call[Json]:
    """The tokens of a prompt, or of messages, as a completion would read them."""
    body = present(
        prompt=prompt,
        messages=None if messages is None else list(messages),
        model=model,
        return_token_strs=return_token_strs,
    )
    return _generate("/v1/tokenize", parse_object, body)


def detokenize(tokens: Sequence[int], *, model: str | None = None) -> Call[str]:
    """The text of tokens."""
    body = present(tokens=list(tokens), model=model)
    return _generate("/v1/detokenize", _text("prompt"), body)


# ---- the server


def models_page(*, limit: int = 1000, after: str | None = None) -> Call[Page[Json]]:
    """The base model, then adapted ones, newest first, behind the id `after`; at most 1000."""
    return _get("/v1/models", _page(dict), present(limit=limit, after=after))


def model(name: str) -> Call[Json]:
    """One model: `<base>`, `<base>:<adaptation id>` or `<base>:<document id>`."""
    return _get(_path("models", name), parse_object)


def health() -> Call[Json]:
    """The server's own account of its state, workers included."""
    return _get("/health", parse_object)


def version() -> Call[Json]:
    """Versions of the server and of what it runs on."""
    return _get("/version", parse_object)


def metrics() -> Call[str]:
    """All metrics, in the Prometheus text format."""
    return _get("/metrics", lambda data: data.decode("utf-8", "replace"))


# ---- what they share


def _get(path: str, parse: Callable[[bytes], Item], params: Json | None = None) -> Call[Item]:
    return Call(method="GET", path=path, parse=parse, params=params)


def _post(
    path: str,
    parse: Callable[[bytes], Item],
    body: Json | None,
    *,
    once: bool = False,
    upload: Path | None = None,
    headers: dict[str, str] | None = None,
    file: tuple[str, bytes] | None = None,
) -> Call[Item]:
    """`once` is for the routes that honour an Idempotency-Key; each call gets its own."""
    key = secrets.token_hex(16) if once else None
    return Call(
        method="POST",
        path=path,
        parse=parse,
        body=body,
        upload=upload,
        headers=headers,
        file=file,
        idempotency_key=key,
    )


def _generate(path: str, parse: Callable[[bytes], Item], body: Json) -> Call[Item]:
    """Of which the server keeps nothing."""
    return Call(method="POST", path=path, parse=parse, body=body, lasting=False)


def _path(kind: str, id: str) -> str:
    if id in ("", ".", ".."):
        raise ClientError(f"{id!r} is no id")
    return f"/v1/{kind}/{quote(id, safe='')}"


def _nothing(data: bytes) -> None:
    """What the reply says is not needed."""


def _adaptation(data: bytes) -> Adaptation:
    return Adaptation.from_body(parse_object(data))


def _document(data: bytes) -> Document:
    return Document.from_body(parse_object(data))


def _event(body: Json) -> AdaptationEvent:
    return AdaptationEvent.from_body(str(body.get("sequence", "")), body)


def _page(read: Callable[[Json], Item]) -> Callable[[bytes], Page[Item]]:
    def parse(data: bytes) -> Page[Item]:
        body = parse_object(data)
        items, last = body.get("data"), body.get("last_id")
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadReplyError("the server's reply is not a list; is it an Imprint server?")
        has_more = bool(body.get("has_more"))
        if has_more and last is None:
            raise BadReplyError("the server's list has more, and does not say behind what")
        return Page([read(item) for item in items], has_more, None if last is None else str(last))

    return parse


def _text(name: str) -> Callable[[bytes], str]:
    def parse(data: bytes) -> str:
        text = parse_object(data).get(name)
        if not isinstance(text, str):
            raise BadReplyError("the server's reply is not a text; is it an Imprint server?")
        return text

    return parse
