"""`/v1/documents/{id}/append`: a new version, read on from the old one."""

from typing import Any

import httpx
import pytest

from imprint.server.config import Settings

pytestmark = pytest.mark.anyio


async def post(client: httpx.AsyncClient, path: str, status: int, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    reply: dict[str, Any] = response.json()
    return reply["error"] if status >= 400 else reply


async def adapt(client: httpx.AsyncClient, **body: Any) -> str:
    """The id of an adaptation that has ended."""
    id = str((await post(client, "/v1/adaptations", 202, **body))["id"])
    await end_of(client, id)
    return id


async def end_of(client: httpx.AsyncClient, id: str) -> None:
    await client.get(f"/v1/adaptations/{id}/events", headers={"Accept": "text/event-stream"})


async def test_what_is_appended_is_read_on(client: httpx.AsyncClient, pool: Any) -> None:
    document = await post(client, "/v1/documents", 201, text="The first part.")
    path = f"/v1/documents/{document['id']}"
    await adapt(client, document_id=document["id"], method={"scope": "lora"})
    base = await adapt(client, document_id=document["id"], method={"type": "read"})
    grown = await post(client, f"{path}/append", 202, text=" The second.")
    assert (grown["version"], grown["num_tokens"]) == (2, document["num_tokens"] + 12)
    assert grown["adaptation"]["method"] == {"type": "read"}
    assert grown["adaptation"]["document_id"] == document["id"]
    await end_of(client, grown["adaptation"]["id"])
    adapted = pool.adapts[-1]
    assert adapted.base_id == base, "not the one that was read with its delta"
    assert adapted.tokens[: document["num_tokens"]] == pool.adapts[0].tokens
    assert (await client.get(f"{path}/content")).json()["text"] == "The first part. The second."
    assert (await client.get(f"/v1/adaptations/{base}")).json()["status"] == "succeeded"

    third = await post(client, f"{path}/append", 202, text="!", method={"steps": 2}, seed=7)
    assert (third["version"], third["adaptation"]["method"]["steps"]) == (3, 2)
    await end_of(client, third["adaptation"]["id"])
    assert pool.adapts[-1].base_id == adapted.adaptation_id
    assert pool.adapts[0].base_id == ""


async def test_an_append_that_is_refused_changes_nothing(
    serve: Any, settings: Settings, pool: Any
) -> None:
    small = settings.model_copy(update={"max_document_tokens": 50, "max_active_adaptations": 1})
    async with serve(small, pool) as client:
        document = await post(client, "/v1/documents", 201, text="x" * 40)
        path = f"/v1/documents/{document['id']}/append"
        assert (await post(client, path, 413, text="x" * 11))["code"] == "document_too_large"
        assert (await post(client, path, 400, text="x", method={"steps": 0}))["param"]
        error = await post(client, path, 409, text="x", version=2)
        assert (error["code"], error["param"]) == ("version_conflict", "version")
        pool.hold = True
        await post(client, "/v1/adaptations", 202, document="another")
        assert (await post(client, path, 503, text="x"))["code"] == "queue_full"
        kept = (await client.get(f"/v1/documents/{document['id']}")).json()
        assert kept == document


async def test_deleting_takes_every_version(client: httpx.AsyncClient, pool: Any) -> None:
    document = await post(client, "/v1/documents", 201, text="one")
    path = f"/v1/documents/{document['id']}"
    first = await adapt(client, document_id=document["id"])
    second = (await post(client, f"{path}/append", 202, text="two", version=1))["adaptation"]["id"]
    assert (await client.delete(path)).status_code == 200
    assert sorted(pool.evicted) == sorted([first, second])
