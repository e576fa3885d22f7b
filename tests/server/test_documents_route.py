"""`/v1/documents`: stored once, studied and asked by id, deleted with all that came of it."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from imprint.server.config import Settings

pytestmark = pytest.mark.anyio
PATH = "/v1/documents"
TEXT = "The code is 42."


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the server is about to do."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def post(
    client: httpx.AsyncClient, path: str = PATH, status: int = 201, **body: Any
) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    reply: dict[str, Any] = response.json()
    return reply["error"] if status >= 400 else reply


async def test_a_document_is_stored(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"text": TEXT, "title": "t", "metadata": {"a": "b"}})
    made = response.json()
    assert (response.status_code, response.headers["location"]) == (201, f"{PATH}/{made['id']}")
    assert (made["object"], made["title"], made["metadata"]) == ("document", "t", {"a": "b"})
    assert (made["num_tokens"], made["bytes"], made["version"]) == (len(TEXT), len(TEXT), 1)
    assert (await client.get(f"{PATH}/{made['id']}")).json() == made
    content = (await client.get(f"{PATH}/{made['id']}/content")).json()
    assert (content["text"], content["references"]) == (TEXT, [])


async def test_pages_of_documents(client: httpx.AsyncClient) -> None:
    ids = [(await post(client, text=f"text {number}"))["id"] for number in range(5)]
    first = (await client.get(PATH, params={"limit": 2})).json()
    assert [item["id"] for item in first["data"]] == ids[:2:-1]
    assert first["has_more"]
    rest = (await client.get(PATH, params={"limit": 3, "after": first["last_id"]})).json()
    assert [item["id"] for item in rest["data"]] == ids[2::-1]
    assert not rest["has_more"]


async def test_studied_and_asked_by_id(client: httpx.AsyncClient, pool: Any) -> None:
    document = await post(client, text=TEXT)
    asked = {"document_id": document["id"], "questions": ["What is the code?"]}
    answer = await post(client, "/v1/answers", 200, **asked)
    assert answer["adaptation"]["document_id"] == document["id"]
    read = {"type": "read"}
    path = "/v1/adaptations"
    by_id = await post(client, path, 200, document_id=document["id"], method=read)
    by_text = await post(client, path, 200, document=TEXT, method=read)
    assert by_id["id"] == by_text["id"] == answer["adaptation"]["id"]
    (adapt,) = pool.adapts
    assert len(adapt.tokens) == document["num_tokens"]


async def test_deleting_takes_the_adaptations_with_it(client: httpx.AsyncClient, pool: Any) -> None:
    document = await post(client, text=TEXT)
    adapted = await post(client, "/v1/adaptations", 202, document_id=document["id"])
    pool.hold = True
    running = await post(client, "/v1/adaptations", 202, document_id=document["id"], seed=1)
    other = await post(client, "/v1/adaptations", 202, document="another text")
    await until(lambda: running["id"] in pool.queues)
    gone = await client.delete(f"{PATH}/{document['id']}")
    assert gone.json() == {"id": document["id"], "object": "document", "deleted": True}
    assert sorted(pool.evicted) == sorted([adapted["id"], running["id"]])
    for id in (adapted["id"], running["id"]):
        assert (await client.get(f"/v1/adaptations/{id}")).status_code == 404
    assert (await client.get(f"/v1/adaptations/{other['id']}")).status_code == 200
    for method, path in (
        ("GET", f"{PATH}/{document['id']}"),
        ("GET", f"{PATH}/{document['id']}/content"),
        ("DELETE", f"{PATH}/{document['id']}"),
        ("GET", f"{PATH}?after={document['id']}"),
    ):
        response = await client.request(method, path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "document_not_found"
    error = await post(client, "/v1/adaptations", 404, document_id=document["id"])
    assert (error["code"], error["param"]) == ("document_not_found", "document_id")


async def test_documents_expire(client: Any, pool: Any) -> None:
    short = await post(client, text=TEXT, expires_after_s=0.01)
    adapted = await post(client, "/v1/adaptations", 202, document_id=short["id"])
    kept = await post(client, text="kept", expires_after_s=60)
    await asyncio.sleep(0.02)
    await client.app.state.services.retention.sweep()
    await until(lambda: adapted["id"] in pool.evicted)
    listed = (await client.get(PATH)).json()["data"]
    assert [item["id"] for item in listed] == [kept["id"]]


async def test_documents_outlive_the_server(serve: Any, settings: Settings, pool: Any) -> None:
    async with serve(settings, pool) as client:
        made = await post(client, text=TEXT)
    async with serve(settings, pool) as client:
        assert (await client.get(f"{PATH}/{made['id']}")).json() == made


async def test_wrong_documents(serve: Any, settings: Settings, pool: Any) -> None:
    small = settings.model_copy(update={"max_document_tokens": 50})
    async with serve(small, pool) as client:
        error = await post(client, status=413, text="x" * 51)
        assert (error["code"], error["param"]) == ("document_too_large", "text")
        assert (await post(client, status=400, text=""))["param"] == "text"
        assert (await post(client, status=400, text="x", titel="y"))["code"] == "unknown_parameter"
        for body in (b"{", b"[" * 100_000, b'{"text": "\xff"}', b'{"text": %s}' % (b"9" * 5000)):
            json_type = {"Content-Type": "application/json"}
            refused = await client.post(PATH, content=body, headers=json_type)
            code = refused.json()["error"]["code"]
            assert (refused.status_code, code) == (400, "invalid_json")
        adapt, ask = "/v1/adaptations", "/v1/answers"
        both = {"document": "x", "document_id": "doc_x"}
        assert (await post(client, adapt, 400, **both))["code"] == "invalid_request"
        assert (await post(client, ask, 400, questions=["q"], **both))["code"] == "invalid_request"
        error = await post(client, ask, 404, questions=["q"], document_id="doc_x")
        assert (error["code"], error["param"]) == ("document_not_found", "document_id")
        client.app.state.services.jobs.drain()
        assert (await post(client, status=503, text="x"))["code"] == "draining"
