"""The asyncio client is the other one, awaited: the same calls, waits and errors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from imprint.server.client import (
    AnswerRequest,
    ApiError,
    AsyncImprintClient,
    ClientError,
    ImprintClient,
    ServerUnreachableError,
)
from imprint.server.config import Settings
from imprint.server.keys import KeyRing

pytestmark = pytest.mark.anyio
KEY = "sk-alice-0123456789"


def methods(client: type) -> dict[str, list[str]]:
    """Public methods with the names of their parameters."""
    found = inspect.getmembers(client, inspect.isfunction)
    return {
        name: list(inspect.signature(function).parameters)
        for name, function in found
        if not name.startswith("_")
    }


def test_both_clients_have_the_same_methods() -> None:
    assert methods(ImprintClient) == methods(AsyncImprintClient)


@pytest.fixture
async def asked(serve: Any, settings: Settings, pool: Any) -> Any:
    keyed = settings.model_copy(update={"api_keys": KeyRing.parse(f"alice:{KEY}")})
    async with serve(keyed, pool) as http:
        url = str(http.base_url).rstrip("/")
        async with AsyncImprintClient(url, api_key=KEY) as client:
            yield client


async def test_a_document_is_stored_studied_and_asked(asked: AsyncImprintClient) -> None:
    assert await asked.is_ready()
    stored = await asked.create_document("a harbour", title="Harbour")
    assert (await asked.document(stored.id)).body["title"] == "Harbour"
    assert await asked.document_text(stored.id) == "a harbour"
    filed = await asked.upload_document("note.md", b"# A note", title="Note")
    page = await asked.documents_page(limit=1)
    assert ([item.id for item in page.items], page.has_more) == ([filed.id], True)
    rest = await asked.documents_page(after=page.last_id)
    assert ([item.id for item in rest.items], rest.has_more) == ([stored.id], False)
    assert [item.id async for item in asked.documents()] == [filed.id, stored.id]

    job = await asked.adapt(document_id=stored.id)
    kinds: list[str] = []
    job = await asked.wait(job.id, lambda event: kinds.append(event.kind))
    assert (job.status, kinds[-1]) == ("succeeded", "succeeded")
    assert [item.id async for item in asked.adaptations()] == [job.id]
    request = AnswerRequest(questions=("what?",), document_id=stored.id)
    assert (await asked.answer(request))["answers"][0]["answer"] == "forty two"
    objects = [record["object"] async for record in asked.stream_answer(request)]
    assert objects[-1] == "answers"
    cards = [card["id"] async for card in asked.models()]
    studied = f"{cards[0]}:{job.id}"
    assert studied in cards[1:]
    assert (await asked.model(studied))["id"] == studied
    happened = await asked.events_page(job.id)
    assert [event.kind for event in happened.items] == [
        kind for kind in kinds if kind != "progress"
    ]
    await asked.delete(job.id)
    await asked.delete_document(stored.id)
    with pytest.raises(ApiError) as caught:
        await asked.document(stored.id)
    assert (caught.value.status, caught.value.code) == (404, "document_not_found")


async def test_text_in_openais_shapes(asked: AsyncImprintClient) -> None:
    reply = await asked.complete({"model": "tiny", "prompt": "x"})
    assert reply["choices"][0]["text"].strip() == "forty two"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    assert (await asked.chat(body))["choices"][0]["message"]["content"].strip() == "forty two"
    chunks = [chunk async for chunk in asked.stream_chat(body)]
    assert chunks[0]["object"] == "chat.completion.chunk"
    pieces = [piece async for piece in asked.stream_complete({"model": "tiny", "prompt": "x"})]
    assert pieces[0]["object"] == "text_completion"
    tokens = (await asked.tokenize("a harbour", return_token_strs=True))["tokens"]
    assert await asked.detokenize(tokens) == "a harbour"
    assert (await asked.version())["model"] == "tiny"
    assert "imprint_http_requests_total" in await asked.metrics()


async def test_a_document_grows_and_what_is_no_adapter_is_refused(
    asked: Any, tmp_path: Path
) -> None:
    stored = await asked.create_document("a harbour", expires_after_s=3600, metadata={"a": "b"})
    added = await asked.append_document(stored.id, " by the sea", version=1)
    assert (added.document.id, added.document.body["version"]) == (stored.id, 2)
    assert await asked.document_text(stored.id) == "a harbour by the sea"
    assert (await asked.wait(added.adaptation.id)).status == "succeeded"
    with pytest.raises(ApiError) as caught:
        await asked.append_document(stored.id, "!", version=1)
    assert caught.value.status == 409
    filed = await asked.upload_document("a.txt", b"text", metadata={"c": "d"}, expires_after_s=9)
    assert filed.body["metadata"] == {"c": "d"}
    assert filed.body["expires_at"] is not None
    file = tmp_path / "file"
    file.write_bytes(b"no adapter")
    with pytest.raises(ApiError) as caught:
        await asked.import_adapter(file)
    assert caught.value.code == "adapter_torn"


async def test_an_unknown_key_is_said(asked: AsyncImprintClient) -> None:
    async with AsyncImprintClient(asked.url, api_key="x" * 20) as stranger:
        with pytest.raises(ApiError) as caught:
            await stranger.documents_page()
    assert caught.value.code == "invalid_api_key"


async def test_overload_is_waited_out() -> None:
    refused = httpx.Response(
        429,
        json={"error": {"message": "no", "param": None, "code": "rate_limit_exceeded"}},
        headers={"Retry-After": "3"},
    )
    replies = [refused, httpx.Response(200, json={"data": []})]
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    transport = httpx.MockTransport(lambda _: replies.pop(0))
    async with AsyncImprintClient("http://imprint", transport=transport, sleep=sleep) as client:
        assert [card async for card in client.models()] == []
    assert slept == [3.0]


async def test_a_stream_that_breaks_off_is_an_error() -> None:
    text = f"data: {json.dumps({'object': 'answer.delta'})}\n\n"
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    request = AnswerRequest(questions=("x",), adaptation="adp_1")
    async with AsyncImprintClient("http://imprint", transport=transport) as client:
        with pytest.raises(ServerUnreachableError, match="before it was complete"):
            _ = [record async for record in client.stream_answer(request)]


@pytest.mark.parametrize("id", ["", ".", ".."])
async def test_what_is_no_id_is_not_sent(id: str) -> None:
    async with AsyncImprintClient("http://127.0.0.1:1") as client:
        with pytest.raises(ClientError, match="is no id"):
            await client.adaptation(id)


async def test_an_id_stays_in_its_place() -> None:
    asked: list[bytes] = []

    def reply(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path)
        return httpx.Response(200, json={"id": "adp_1", "status": "queued"})

    transport = httpx.MockTransport(reply)
    with ImprintClient("http://imprint", transport=transport) as client:
        client.adaptation("../models?x#y")
    assert asked == [b"/v1/adaptations/..%2Fmodels%3Fx%23y"]
