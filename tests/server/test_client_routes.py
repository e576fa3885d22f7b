"""The client knows every route and field, sends again what may be sent again, and walks lists."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from imprint.server import client_routes as routes
from imprint.server import openai_schemas, schemas
from imprint.server.app import create_app
from imprint.server.client import (
    AnswerRequest,
    ApiError,
    AsyncImprintClient,
    BadReplyError,
    ImprintClient,
    ServerUnreachableError,
)
from imprint.server.client_calls import FIRST_RESEND_S, MAX_RESENDS

JOB = {"id": "adp_1", "object": "adaptation", "status": "queued"}
DOCUMENT = {"id": "doc_1", "object": "document", "num_tokens": 3}
ASKED = AnswerRequest(questions=("q",), document_id="doc_1")
KEY = "idempotency-key"


class Wire:
    """Replies to everything alike, or what it is told to first; remembers requests and waits."""

    def __init__(self, *first: httpx.Response | Exception) -> None:
        self.first = list(first)
        self.requests: list[httpx.Request] = []
        self.slept_s: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.first:
            reply = self.first.pop(0)
            if isinstance(reply, Exception):
                raise reply
            return reply
        if "text/event-stream" in request.headers["accept"] or b'"stream"' in request.content:
            return httpx.Response(200, text="data: [DONE]\n\n")
        body = {**DOCUMENT, **JOB, "adaptation": JOB, "text": "t", "prompt": "t", "data": []}
        return httpx.Response(200, json=body)

    def client(self, **options: Any) -> ImprintClient:
        transport = httpx.MockTransport(self)
        return ImprintClient("http://a", transport=transport, sleep=self.slept_s.append, **options)


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "adapt": ("text",),
    "answer": (ASKED,),
    "append_document": ("doc_1", "more"),
    "chat": ({},),
    "complete": ({},),
    "create_document": ("text",),
    "detokenize": ([1],),
    "stream_answer": (ASKED,),
    "stream_chat": ({},),
    "stream_complete": ({},),
    "tokenize": ("text",),
    "upload_document": ("a.txt", b"text"),
}
WITHOUT = {"adaptations", "close", "documents", "health", "metrics", "models", "version"}
WITHOUT |= {"adaptations_page", "documents_page", "models_page", "is_live", "is_ready"}


def call_everything(wire: Wire, folder: Path) -> None:
    """Every method but `wait`, which has no route of its own."""
    file = folder / "adapter"
    file.write_bytes(b"file")
    arguments = {
        **ARGUMENTS,
        "import_adapter": (file,),
        "export_adapter": ("id_1", folder / "new"),
    }
    with wire.client() as client:
        for name, method in inspect.getmembers(client, inspect.ismethod):
            if name.startswith("_") or name in ("close", "wait"):
                continue
            found = method(*arguments.get(name, () if name in WITHOUT else ("id_1",)))
            if isinstance(found, Iterator):
                list(found)


@pytest.fixture
def described(settings: Any, pool: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Every operation of the OpenAPI document, by method and path."""
    paths = create_app(settings, pool).openapi()["paths"]
    return {
        (method.upper(), path): operation
        for path, operations in paths.items()
        for method, operation in operations.items()
    }


def operation(request: httpx.Request, paths: Any) -> tuple[str, str]:
    for method, path in paths:
        pattern = re.sub(r"\\{.+?\\}", "[^/]+", re.escape(path))
        if method == request.method and re.fullmatch(pattern, request.url.path):
            return method, path
    raise AssertionError(f"no route: {request.method} {request.url.path}")


def test_every_route_has_a_method(described: Any, tmp_path: Path) -> None:
    wire = Wire()
    call_everything(wire, tmp_path)
    assert {operation(request, described) for request in wire.requests} == set(described)


def test_keys_are_sent_where_they_are_honoured(described: Any, tmp_path: Path) -> None:
    wire = Wire()
    call_everything(wire, tmp_path)
    honoured = {
        place
        for place, operation in described.items()
        for parameter in operation.get("parameters", ())
        if parameter["name"].lower() == KEY
    }
    whole = [request for request in wire.requests if b'"stream"' not in request.content]
    keyed = [request for request in whole if KEY in request.headers]
    assert {operation(request, described) for request in keyed} == honoured
    assert {operation(request, described) for request in whole if request not in keyed}.isdisjoint(
        honoured
    )
    assert len({request.headers[KEY] for request in keyed}) == len(keyed)


@pytest.mark.parametrize(
    ("call", "body", "left_out"),
    [
        # a server has one model; what a stream is, is another method
        (routes.adapt, schemas.CreateAdaptation, {"model"}),
        (routes.create_document, schemas.CreateDocument, set()),
        (routes.upload_document, schemas.UploadFields, set()),
        (routes.append_document, schemas.AppendText, set()),
        (routes.tokenize, openai_schemas.Tokenize, {"add_special_tokens", "add_generation_prompt"}),
        (routes.detokenize, openai_schemas.Detokenize, set()),
        (AnswerRequest, schemas.CreateAnswers, {"model", "stream"}),
    ],
)
def test_every_field_can_be_given(call: Any, body: type[BaseModel], left_out: set[str]) -> None:
    known = set(inspect.signature(call).parameters)
    assert set(body.model_fields) - known == left_out


def test_answer_requests_say_no_more_than_the_server_reads() -> None:
    fields = {field.name for field in dataclasses.fields(AnswerRequest)}
    assert fields < set(schemas.CreateAnswers.model_fields)


BROKEN = httpx.ReadError("reset")


def test_what_makes_something_is_sent_again_under_one_key() -> None:
    wire = Wire(BROKEN, httpx.ConnectError("refused"), httpx.RemoteProtocolError("gone"))
    with wire.client() as client:
        assert client.adapt("text").id == "adp_1"
        client.adapt("text")
    keys = [request.headers[KEY] for request in wire.requests]
    assert len(set(keys[:4])) == 1
    assert len(set(keys)) == 2
    assert wire.slept_s == [FIRST_RESEND_S, 2 * FIRST_RESEND_S, 4 * FIRST_RESEND_S]


def test_a_refusal_of_what_was_sent_again_is_waited_out() -> None:
    error = {"error": {"message": "not yet", "code": "idempotency_key_in_use"}}
    wire = Wire(BROKEN, httpx.Response(409, json=error, headers={"Retry-After": "1"}))
    assert wire.client().create_document("text").id == JOB["id"]
    assert wire.slept_s == [FIRST_RESEND_S, 1.0]


@pytest.mark.parametrize(
    "send",
    [
        lambda client: client.chat({}),
        lambda client: client.complete({}),
        lambda client: client.tokenize("text"),
        lambda client: list(client.stream_answer(ASKED)),
        lambda client: list(client.stream_chat({})),
    ],
)
def test_what_is_not_kept_is_sent_again(send: Any) -> None:
    wire = Wire(BROKEN)
    send(wire.client())
    assert len(wire.requests) == 2
    assert wire.slept_s == [FIRST_RESEND_S]


def test_a_stream_is_not_sent_again_once_it_has_begun() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'data: {"object": "answer.delta"}\n\n'
        raise httpx.ReadError("reset")

    wire = Wire(httpx.Response(200, content=pieces()))
    stream = wire.client().stream_answer(ASKED)
    assert next(stream) == {"object": "answer.delta"}
    with pytest.raises(ServerUnreachableError, match="broke: reset"):
        next(stream)
    assert len(wire.requests) == 1


def test_a_deletion_is_not_sent_again() -> None:
    wire = Wire(BROKEN)
    with pytest.raises(ServerUnreachableError, match="the connection to http://a broke: reset"):
        wire.client().delete("adp_1")
    assert len(wire.requests) == 1


def test_methods_describe_themselves() -> None:
    assert list(inspect.signature(ImprintClient.adaptation).parameters) == ["self", "adaptation_id"]
    with Wire().client() as client:
        assert list(inspect.signature(client.adaptation).parameters) == ["adaptation_id"]
        assert client.documents.__name__ == "documents"
    assert AsyncImprintClient.adapt.__doc__ == routes.adapt.__doc__


@pytest.mark.parametrize("error", [httpx.ConnectError("no"), httpx.ReadTimeout("slow")])
def test_nobody_there_and_too_late_are_told_at_once(error: Exception) -> None:
    wire = Wire(error)
    with pytest.raises(ServerUnreachableError, match=r"no server answers|not answer in time"):
        wire.client().adapt("text")
    assert wire.slept_s == []


def test_sending_again_has_an_end() -> None:
    wire = Wire(*[BROKEN] * (MAX_RESENDS + 1))
    with pytest.raises(ServerUnreachableError, match="broke"):
        wire.client().health()
    assert len(wire.requests) == MAX_RESENDS + 1
    wire = Wire(BROKEN, BROKEN)
    with pytest.raises(ServerUnreachableError, match="broke"):
        wire.client(max_wait_s=1.5 * FIRST_RESEND_S).health()


def test_lists_are_walked_to_their_end() -> None:
    pages = [
        {"data": [{"id": "a"}, {"id": "b"}], "has_more": True, "last_id": "b"},
        {"data": [{"id": "c"}], "has_more": False, "last_id": "c"},
    ]
    wire = Wire(*(httpx.Response(200, json=page) for page in pages))
    assert [card["id"] for card in wire.client().models()] == ["a", "b", "c"]
    assert [request.url.params.get("after") for request in wire.requests] == [None, "b"]
    endless = Wire(httpx.Response(200, json={"data": [], "has_more": True, "last_id": None}))
    with pytest.raises(BadReplyError, match="has more"):
        list(endless.client().documents())


class LosesReplies(httpx.AsyncHTTPTransport):
    """A real connection on which the reply to every first sending is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        sending = f"{request.method} {request.url} {request.headers.get(KEY)}"
        if sending not in self.seen:
            self.seen.add(sending)
            await response.aread()
            await response.aclose()
            raise httpx.ReadError("the reply is lost", request=request)
        return response


@pytest.mark.anyio
async def test_a_lost_reply_makes_nothing_twice(client: Any, pool: Any) -> None:
    async def at_once(seconds: float) -> None:
        pass

    url = str(client.base_url).rstrip("/")
    async with AsyncImprintClient(url, transport=LosesReplies(), sleep=at_once) as lossy:
        made = await lossy.create_document("a text")
        added = await lossy.append_document(made.id, " and more", version=1)
        assert added.document.body["version"] == 2
        await lossy.adapt("another", seed=1)
        await lossy.answer(AnswerRequest(questions=("q",), document="a third"))
        assert [found.id async for found in lossy.documents()] == [made.id]
        assert len(pool.adapts) == 3  # appended, adapted, read for the answer
        assert len(pool.generates) == 1
        with pytest.raises(ServerUnreachableError):
            await lossy.delete_document(made.id)
        with pytest.raises(ApiError):
            await lossy.document(made.id)
