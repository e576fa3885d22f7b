"""`POST /v1/adapters`: what is taken in, what is refused, and that nothing is left of the rest."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from imprint.adapters.adapter import FORMAT
from imprint.adapters.document import DocumentReader
from imprint.adapters.verified import to_blob
from imprint.models import DeltaNet
from imprint.server.config import Settings
from imprint.server.keys import KeyRing
from imprint.server.records import IMPORT

pytestmark = pytest.mark.anyio
PATH = "/v1/adapters"
JOBS = "/v1/adaptations"
FILE = {"Content-Type": "application/octet-stream"}
KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789ab"}


def blob(model: DeltaNet, format: str = FORMAT, **manifest: Any) -> bytes:
    """The file of a document of 29 tokens, read by the model of the fake pool."""
    reader = DocumentReader(model, list(range(1, 30)), segment_tokens=8)
    list(reader.run())
    assert reader.adapter is not None
    known = {**reader.adapter.manifest, "model_hash": "0" * 64}
    return to_blob(reader.adapter.to_tensors(), {**known, **manifest}, format)


@pytest.fixture(scope="module")
def data(tiny_model: DeltaNet) -> bytes:
    return blob(tiny_model)


@pytest.fixture
def left(settings: Settings) -> Any:
    """What lies in the folder of imports."""
    return lambda: list((settings.data_dir / "adapters" / "progress" / "imports").iterdir())


async def send(client: httpx.AsyncClient, data: Any, **headers: str) -> httpx.Response:
    return await client.post(PATH, content=data, headers={**FILE, **headers})


async def ended(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    stream = {"Accept": "text/event-stream"}
    await client.get(f"{JOBS}/{id}/events", headers=stream)
    return dict((await client.get(f"{JOBS}/{id}")).json())


async def test_a_file_becomes_an_adaptation(client: Any, pool: Any, data: bytes, left: Any) -> None:
    response = await send(client, data)
    made = response.json()
    assert (response.status_code, made["method"]) == (202, {"type": "import"})
    assert response.headers["location"] == f"{JOBS}/{made['id']}"
    assert (made["num_tokens"], made["bytes"], made["document_id"]) == (29, len(data), None)
    assert (await ended(client, made["id"]))["status"] == "succeeded"
    (work,) = pool.adapts
    assert (work.adaptation_id, work.tokens) == (made["id"], [])
    assert (work.method, work.base_id) == ({"type": IMPORT}, "")
    again = await send(client, data)
    assert (again.status_code, again.json()["id"]) == (200, made["id"])
    assert left() == []
    assert (await client.delete(f"{JOBS}/{made['id']}")).status_code == 200
    assert pool.evicted == [made["id"]]
    assert (await send(client, data)).status_code == 202


async def test_what_is_sent_again_is_taken_in_once(
    client: Any, pool: Any, tiny_model: DeltaNet, data: bytes, left: Any
) -> None:
    key = {"Idempotency-Key": "k"}
    assert (await send(client, data[:-1], **key)).status_code == 400  # what is refused has no reply
    pool.hold = True
    first = await send(client, data, **key)
    second = await send(client, data, **key)
    assert (first.status_code, second.status_code) == (202, 202)
    assert (second.content, second.headers["idempotent-replayed"]) == (first.content, "true")
    assert second.headers["location"] == first.headers["location"]
    assert [path.stem for path in left()] == [first.json()["id"]]  # the job's, which waits
    other = await send(client, blob(tiny_model, seed=8), **key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    text = await client.post(JOBS, json={"document": "x"}, headers=key)
    assert (text.status_code, text.json()["error"]["code"]) == (409, "idempotency_key_reused")
    unusable = await send(client, data, **{"Idempotency-Key": ""})
    assert unusable.json()["error"]["code"] == "invalid_idempotency_key"
    assert len(left()) == len(pool.adapts) == 1
    assert (await client.delete(first.headers["location"])).status_code == 200
    assert (await send(client, data, **key)).json()["id"] != first.json()["id"]


async def test_its_study_is_not_kept(client: Any, data: bytes) -> None:
    id = (await send(client, data)).json()["id"]
    await ended(client, id)
    for view in ("", "/tokens", "/profile"):
        reply = await client.get(f"{JOBS}/{id}/study{view}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (410, "study_gone")
        assert "imported" in reply.json()["error"]["message"]
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["adapted"] for card in cards if id in card["id"]] == [True]  # as its worker said
    assert "rollout_tokens_total 0.0" in (await client.get("/metrics")).text


async def test_each_refusal_has_its_code(
    client: Any, tiny_model: DeltaNet, data: bytes, left: Any
) -> None:
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    for wrong, code in (
        (b"", "adapter_torn"),
        (data[:-1], "adapter_torn"),
        (flipped, "adapter_checksum_mismatch"),
        (blob(tiny_model, "imprint-adapter-0"), "adapter_format_mismatch"),
        (blob(tiny_model, model_hash="1" * 64), "adapter_model_mismatch"),
        (blob(tiny_model, model_hash="\x1b[31m\ud800"), "adapter_torn"),
        (blob(tiny_model, num_tokens=30), "adapter_manifest_invalid"),
        (blob(tiny_model, method="../../x"), "adapter_manifest_invalid"),
    ):
        response = await send(client, wrong)
        assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    for kind in ("application/json", "text/plain", "multipart/form-data"):
        assert (await send(client, data, **{"Content-Type": kind})).status_code == 415
    assert (await client.get(JOBS)).json()["data"] == []
    assert left() == []


async def test_no_name_in_the_manifest_leads_anywhere(
    client: Any, settings: Settings, tiny_model: DeltaNet
) -> None:
    before = set(settings.data_dir.rglob("*"))
    data = blob(tiny_model, id="../../../evil", adaptation_id="/tmp/evil", path="evil")
    name = {"Content-Disposition": 'attachment; filename="../../evil"'}
    made = (await send(client, data, **name)).json()
    assert (await ended(client, made["id"]))["status"] == "succeeded"
    async with asyncio.timeout(10):  # the file itself goes once the outcome is written down
        while set(settings.data_dir.rglob("*")) != before:
            await asyncio.sleep(0.01)


async def test_what_is_too_large(
    serve: Any, settings: Settings, pool: Any, data: bytes, left: Any
) -> None:
    async def undeclared() -> AsyncIterator[bytes]:
        yield data[:-1]
        yield data[-1:]

    small = settings.model_copy(update={"max_body_bytes": len(data) - 1})
    async with serve(small, pool) as client:
        for body in (data, undeclared()):
            response = await send(client, body)
            assert (response.status_code, response.json()["error"]["code"]) == (
                413,
                "body_too_large",
            )
        assert left() == []
    few = settings.model_copy(update={"max_document_tokens": 28})
    async with serve(few, pool) as client:
        response = await send(client, data)
        assert response.json()["error"]["code"] == "document_too_large"
        assert (response.status_code, left()) == (413, [])


async def test_no_room(serve: Any, settings: Settings, pool: Any, data: bytes, left: Any) -> None:
    pool.hold = True
    one = settings.model_copy(update={"max_active_adaptations": 1})
    async with serve(one, pool) as client:
        await client.post(JOBS, json={"document": "x"})
        response = await send(client, data)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert left() == []
    pool.info = None
    async with serve(settings, pool) as client:
        response = await send(client, data)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")


async def test_the_store_is_gone(client: Any, settings: Settings, data: bytes) -> None:
    shutil.rmtree(settings.data_dir / "adapters" / "progress" / "imports")
    response = await send(client, data)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_failed")


async def test_deletion_frees_what_waits(client: Any, pool: Any, data: bytes, left: Any) -> None:
    pool.hold = True
    id = (await send(client, data)).json()["id"]
    (path,) = left()
    assert (path.name, path.read_bytes()) == (f"{id}.safetensors", data)
    assert (await client.delete(f"{JOBS}/{id}")).status_code == 200
    assert left() == []


async def test_a_restart_goes_on(
    serve: Any, settings: Settings, pool: Any, data: bytes, left: Any
) -> None:
    pool.hold = True
    async with serve(settings, pool) as client:
        id = (await send(client, data)).json()["id"]
    (kept,) = left()
    Path(kept.with_name("adp_left.safetensors")).write_bytes(b"by a process that died")
    pool.hold = False
    async with serve(settings, pool) as client:
        assert (await ended(client, id))["status"] == "succeeded"
        assert (pool.adapts[-1].adaptation_id, pool.adapts[-1].tokens) == (id, [])
        assert left() == []


async def test_each_owner_has_its_own(
    serve: Any, settings: Settings, pool: Any, data: bytes
) -> None:
    ring = KeyRing.parse(",".join(f"{name}:{key}" for name, key in KEYS.items()))
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS.values())
    async with serve(settings.model_copy(update={"api_keys": ring}), pool) as client:
        assert (await send(client, data)).status_code == 401
        made = (await send(client, data, **alice)).json()["id"]
        assert (await client.get(f"{JOBS}/{made}", headers=bob)).status_code == 404
        theirs = await send(client, data, **bob)
        assert theirs.status_code == 202
        assert theirs.json()["id"] != made


async def test_nobody_asks_for_an_import_by_name(client: Any) -> None:
    body = {"document": "x", "method": {"type": IMPORT}}
    response = await client.post(JOBS, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "method.type")
