"""What is not let in, and how fast that is said; what is let go because nobody asks for it."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from typing import Any

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts

from imprint.server.app import create_app
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
        text = (await client.get("/metrics")).text
        assert 'imprint_admission_rejections_total{reason="queue_full"} 40.0' in text
        # what is there already is no more work, once the journal has the time to say so
        while (again := await post(client, "0")).status_code == 503:
            await asyncio.sleep(0.01)
        assert (again.status_code, again.json()["id"]) == (200, ids[0])
        pool.say(ids[0], AdaptationDone(adaptation_id=ids[0], status="succeeded"))
        while (await post(client, "room again")).status_code != 202:
            await asyncio.sleep(0.01)


async def refused_by_its_head(client: httpx.AsyncClient, path: str, declared: int) -> bool:
    """Whether a request is answered whose body never comes."""
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {declared}\r\n\r\n"
    )
    writer.write(head.encode())
    try:
        async with asyncio.timeout(0.5):
            answer = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        return False
    finally:
        writer.close()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in answer.lower()
    return True


@pytest.mark.anyio
async def test_a_full_queue_is_told_before_the_body_comes(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    full = {"max_active_adaptations": 1, "max_active_requests": 1}
    works = ["/v1/answers", "/v1/completions", "/v1/chat/completions"]
    async with serve(settings.model_copy(update=full), pool) as client:
        assert (await post(client, "the only one")).status_code == 202
        completion = {"model": "tiny", "prompt": "x", "max_tokens": 4}
        asking = asyncio.create_task(client.post("/v1/completions", json=completion))
        while client.app.state.services.intake.num_requests == 0:
            await asyncio.sleep(0.005)
        for path in works:
            assert await refused_by_its_head(client, path, 10)
        assert await refused_by_its_head(client, PATH, 10**6)
        assert not await refused_by_its_head(client, PATH, 10)  # it may be known
        assert not await refused_by_its_head(client, "/v1/documents", 10**6)
        again = await client.post(
            "/v1/answers", json={}, headers={"Idempotency-Key": "may have been answered"}
        )
        assert again.status_code == 400
        text = (await client.get("/metrics")).text
        for path in (PATH, *works):
            line = f'imprint_http_requests_total{{method="POST",route="{path}",status="503"}} 1.0'
            assert line in text
        asking.cancel()


@pytest.mark.anyio
async def test_a_busy_journal_does_not_hold_up_a_refusal(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    settings = settings.model_copy(update={"max_active_adaptations": 1})
    async with serve(settings, pool) as client:
        assert (await post(client, "the only one")).status_code == 202
        go_on = threading.Event()
        busy = asyncio.create_task(client.app.state.services.journal(lambda _: go_on.wait(20)))
        try:
            assert_full(await asyncio.wait_for(post(client, "another"), 10))
        finally:
            go_on.set()
            await busy


def test_no_request_waits_for_a_thread(settings: Settings, pool: Any) -> None:
    """FastAPI runs what is not `async` in a pool of threads."""

    def calls(dependant: Dependant) -> list[Any]:
        return [dependant.call, *(c for d in dependant.dependencies for c in calls(d))]

    contexts = iter_route_contexts(create_app(settings, pool).routes)
    routes = [found.original_route for found in contexts]
    routes = [route for route in routes if isinstance(route, APIRoute)]
    assert len(routes) > 20
    for route in routes:
        for call in calls(route.dependant):
            assert inspect.iscoroutinefunction(call), (route.path, call)


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
