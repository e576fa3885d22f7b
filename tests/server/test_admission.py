"""What is not let in, and how fast that is said; what is let go because nobody asks for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from imprint.server.config import Settings
from imprint.server.messages import AdaptationDone, Heartbeat, WorkerStats

PATH = "/v1/adaptations"
GENEROUS_S = 1.0
"""Far above what a refusal takes, far below what queueing behind the others would."""


async def post(client: httpx.AsyncClient, document: str, **body: Any) -> httpx.Response:
    return await client.post(PATH, json={"document": document, **body})


async def timed(request: Any) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    response = await request
    return response, time.monotonic() - began


def assert_full(response: httpx.Response) -> None:
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "queue_full"
    assert 1 <= int(response.headers["Retry-After"]) <= 120


@pytest.mark.anyio
async def test_ten_times_too_many_documents_are_refused_at_once(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    pool.worker.stats = Heartbeat(time=0.0, stats=WorkerStats(backlog_s=7.0))
    settings = settings.model_copy(update={"max_active_adaptations": 4})
    async with serve(settings, pool) as client:
        ids = [(await post(client, f"{i}")).json()["id"] for i in range(4)]
        long = "too much " * 20_000  # not tokenized for nothing
        refused = [await timed(post(client, f"{long}{i}")) for i in range(20)]
        for response, _ in refused:
            assert_full(response)
            assert response.headers["Retry-After"] == "7"
        together = await asyncio.gather(*(timed(post(client, f"more {i}")) for i in range(20)))
        for response, _ in together:
            assert_full(response)
        durations = sorted(took_s for _, took_s in (*refused, *together))
        assert durations[len(durations) // 2] < GENEROUS_S
        again = await post(client, "0")  # what is there already is no more work
        assert (again.status_code, again.json()["id"]) == (200, ids[0])
        text = (await client.get("/metrics")).text
        assert 'imprint_admission_rejections_total{reason="queue_full"} 40.0' in text
        pool.say(ids[0], AdaptationDone(adaptation_id=ids[0], status="succeeded"))
        while (await post(client, "room again")).status_code != 202:
            await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_documents_are_admitted_by_bytes(serve: Any, settings: Settings, pool: Any) -> None:
    pool.hold = True
    settings = settings.model_copy(update={"max_active_bytes": 1000})
    async with serve(settings, pool) as client:
        assert (await post(client, "x" * 900)).status_code == 202
        refused = await post(client, "y" * 200)
        assert_full(refused)
        assert "at most 1000 may be" in refused.json()["error"]["message"]
        assert (await post(client, "y" * 100)).status_code == 202


@pytest.mark.anyio
async def test_an_estimate_is_shown_as_soon_as_there_is_one(
    client: httpx.AsyncClient, pool: Any
) -> None:
    pool.hold = True
    id = (await post(client, "hello")).json()["id"]
    assert (await client.get(f"{PATH}/{id}")).json()["estimated_finish"] is None
    stats = WorkerStats(adaptation_finish_s={id: 30.0})
    pool.worker.stats = Heartbeat(time=0.0, stats=stats)
    shown = (await client.get(f"{PATH}/{id}")).json()["estimated_finish"]
    assert 25 < shown - time.time() <= 30


async def ready(client: httpx.AsyncClient, document: str, **body: Any) -> str:
    id = str((await post(client, document, **body)).json()["id"])
    while (await client.get(f"{PATH}/{id}")).json()["status"] != "succeeded":
        await asyncio.sleep(0.01)
    return id


async def ask(client: httpx.AsyncClient, id: str) -> httpx.Response:
    body = {"adaptation": id, "questions": ["Who?"], "focus": False}
    return await client.post("/v1/answers", json=body)


@pytest.mark.anyio
async def test_an_adapter_that_nobody_asks_is_freed(
    serve: Any, settings: Settings, pool: Any
) -> None:
    settings = settings.model_copy(update={"adapter_idle_s": 3600.0})
    async with serve(settings, pool) as client:
        retention = client.app.state.services.retention
        idle = await ready(client, "idle", idle_expires_after_s=0.05)
        asked = await ready(client, "asked", idle_expires_after_s=0.05)
        other = await ready(client, "other")
        shown = (await client.get(f"{PATH}/{other}")).json()
        assert shown["idle_expires_after_s"] == 3600.0
        async with asyncio.timeout(10):
            await asyncio.sleep(0.06)
            async with retention.using(asked):  # a long answer
                await retention.sweep()
            assert pool.evicted == [idle]
            assert (await ask(client, asked)).status_code == 200
            gone = await ask(client, idle)
            assert (gone.status_code, gone.json()["error"]["code"]) == (410, "adapter_idle")
            assert (await client.get(f"{PATH}/{asked}")).json()["used_at"] is not None
            while asked not in pool.evicted:
                await retention.sweep()
        assert (await client.get(f"{PATH}/{asked}")).json()["status"] == "expired"
        assert (await client.get(f"{PATH}/{other}")).json()["status"] == "succeeded"
