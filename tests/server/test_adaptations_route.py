"""`/v1/adaptations`: nothing lost, nothing twice, over races, deletions and restarts."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from imprint.server import messages
from imprint.server.config import Settings

pytestmark = pytest.mark.anyio
PATH = "/v1/adaptations"
SSE = {"Accept": "text/event-stream"}


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the server is about to do."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def create(client: httpx.AsyncClient, document: str = "hello", **more: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"document": document, **more})
    assert response.status_code in (200, 202), response.text
    created: dict[str, Any] = response.json()
    return created


async def get(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"{PATH}/{id}")).json()
    return found


async def read_events(client: httpx.AsyncClient, id: str, last: str = "") -> list[dict[str, Any]]:
    headers = {**SSE, **({"Last-Event-ID": last} if last else {})}
    text = (await client.get(f"{PATH}/{id}/events", headers=headers)).text
    assert text.endswith("data: [DONE]\n\n")
    lines = [line for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def done(id: str, status: str = "succeeded") -> messages.AdaptationDone:
    return messages.AdaptationDone(adaptation_id=id, status=status)


def started(id: str, attempt: int = 1) -> messages.AdaptationStarted:
    return messages.AdaptationStarted(adaptation_id=id, attempt=attempt)


def step(id: str, number: int) -> messages.AdaptationEvent:
    return messages.AdaptationEvent(adaptation_id=id, kind="step", data={"step": number})


async def test_the_life_of_a_job(client: httpx.AsyncClient, pool: Any) -> None:
    first = await client.post(
        PATH,
        json={
            "document": "hello",
            "metadata": {"a": "b"},
            "seed": 3,
            "timeout_s": 60,
            "priority": 2,
        },
    )
    assert first.status_code == 202
    job = first.json()
    assert first.headers["location"] == f"{PATH}/{job['id']}"
    assert (job["object"], job["status"], job["metadata"]) == ("adaptation", "queued", {"a": "b"})
    kinds = [event["kind"] for event in await read_events(client, job["id"])]
    assert kinds == ["queued", "running", "step", "succeeded"]
    job = await get(client, job["id"])
    assert job["status"] == "succeeded"
    assert job["result"]["accepted"]
    assert job["usage"] == {"tokens_forward": 10, "rollout_tokens": 3}
    assert job["progress"] == {"phase": "adapt", "step": 1, "steps": 2, "num_tokens": 5}
    assert job["adapter_bytes"] == 77
    work = pool.adapts[0]
    assert (work.seed, work.timeout_s, work.attempt, work.priority) == (3, 60, 1, 2)
    assert work.method["type"] == "refine"
    again = await client.post(PATH, json={"document": "hello", "seed": 3})
    assert (again.status_code, again.json()["id"]) == (200, job["id"])
    assert len(pool.works) == 1


async def test_many_creators_get_one_job(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold = True
    replies = await asyncio.gather(*(create(client) for _ in range(20)))
    assert len({reply["id"] for reply in replies}) == 1
    assert len(pool.works) == 1


async def test_a_full_queue_refuses_but_finds(serve: Any, settings: Settings, pool: Any) -> None:
    pool.hold = True
    async with serve(settings.model_copy(update={"max_active_adaptations": 2}), pool) as client:
        first = await create(client, "a")
        await create(client, "b")
        refused = await client.post(PATH, json={"document": "c"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert (await create(client, "a"))["id"] == first["id"]
        pool.say(first["id"], done(first["id"]))
        await read_events(client, first["id"])
        await create(client, "c")
        text = (await client.get("/metrics")).text
        assert 'imprint_admission_rejections_total{reason="queue_full"} 1.0' in text


async def test_a_job_outlives_its_creator(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold = True
    job = await create(client)
    await until(lambda: pool.works)
    assert (await get(client, job["id"]))["status"] == "queued"
    assert pool.abandoned == []


async def test_events_are_live_and_complete(client: httpx.AsyncClient, pool: Any) -> None:
    """A page, then live, then again behind an id: each event once, in order."""
    pool.hold = True
    id = (await create(client))["id"]
    await until(lambda: id in pool.queues)
    seen: list[str] = []
    async with client.stream("GET", f"{PATH}/{id}/events", headers=SSE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        pool.say(id, started(id), *(step(id, number) for number in range(150)))
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                seen.append(line.removeprefix("id: "))
            if line == "id: 100":
                pool.say(id, *(step(id, number) for number in range(150, 300)), done(id))
    assert seen == [str(number) for number in range(1, 304)]
    rest = await read_events(client, id, last="300")
    assert [event["sequence"] for event in rest] == [301, 302, 303]
    assert rest[-1]["kind"] == "succeeded"
    page = (await client.get(f"{PATH}/{id}/events?limit=2&after=5")).json()
    assert ([e["sequence"] for e in page["data"]], page["has_more"]) == ([6, 7], True)
    assert page["last_id"] == 7


async def test_progress_and_keep_alives_come_between_events(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    async with serve(settings.model_copy(update={"keep_alive_s": 0.05}), pool) as client:
        id = (await create(client))["id"]
        await until(lambda: id in pool.queues)
        progress = {"phase": "read", "step": 0, "steps": 2, "num_tokens": 7}
        event = messages.AdaptationEvent(adaptation_id=id, kind="progress", data=progress)
        lines: list[str] = []
        async with client.stream("GET", f"{PATH}/{id}/events", headers=SSE) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if line == ": keep-alive" and lines.count(line) == 1:
                    pool.say(id, event)
                if '"progress"' in line:
                    pool.say(id, done(id))
        assert lines[-2:] == ["data: [DONE]", ""]
        assert (await get(client, id))["progress"] == progress


@pytest.mark.parametrize("last", ["x", "-1", "1" * 30, "٣"])
async def test_a_bad_last_event_id_is_refused(client: httpx.AsyncClient, last: str) -> None:
    id = (await create(client))["id"]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": last.encode()}
    response = await client.get(f"{PATH}/{id}/events", headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Last-Event-ID")


async def test_event_streams_are_bounded(serve: Any, settings: Settings, pool: Any) -> None:
    pool.hold = True
    async with serve(settings.model_copy(update={"max_event_streams": 1}), pool) as client:
        id = (await create(client))["id"]
        url = f"{PATH}/{id}/events"
        async with client.stream("GET", url, headers=SSE) as response:
            lines = response.aiter_lines()  # a name keeps the stream open
            await anext(lines)
            refused = await client.get(url, headers=SSE)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        feed = client.app.state.services.events
        await until(lambda: feed.num_streams == 0)
        pool.say(id, done(id))
        assert (await read_events(client, id))[-1]["kind"] == "succeeded"


async def test_a_failure_is_told(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold = True
    id = (await create(client))["id"]
    await until(lambda: id in pool.queues)
    failed = messages.AdaptationFailed(adaptation_id=id, code="invalid_method", message="short")
    pool.say(id, failed)
    assert (await read_events(client, id))[-1]["kind"] == "failed"
    job = await get(client, id)
    assert job["error"] == {"code": "invalid_method", "message": "short", "param": None}
    assert (await create(client))["id"] != id


async def test_a_pool_that_breaks_its_word_fails_the_job(client: Any, pool: Any) -> None:
    pool.submit = lambda work: 1 / 0
    id = (await create(client))["id"]
    assert (await read_events(client, id))[-1]["data"]["code"] == "internal_error"


async def test_a_worker_that_dies_is_written_down(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold = True
    id = (await create(client))["id"]
    await until(lambda: id in pool.queues)
    again = messages.AdaptationRequeued(adaptation_id=id, attempt=2, reason="killed")
    pool.say(id, started(id), again, started(id, attempt=2), done(id))
    kinds = [event["kind"] for event in await read_events(client, id)]
    assert kinds == ["queued", "running", "requeued", "running", "succeeded"]
    assert (await get(client, id))["attempt"] == 2


async def test_cancel(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold = True
    id = (await create(client))["id"]
    await until(lambda: id in pool.queues)
    for _ in range(2):
        cancelled = await client.post(f"{PATH}/{id}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert pool.cancelled == [id]
    assert (await create(client))["id"] != id


async def test_delete_frees_before_it_answers(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold_evict = asyncio.Event()
    id = (await create(client))["id"]
    await read_events(client, id)
    deletion = asyncio.create_task(client.delete(f"{PATH}/{id}"))
    again = asyncio.create_task(client.delete(f"{PATH}/{id}"))
    while (await client.get(f"{PATH}/{id}")).status_code != 404:
        await asyncio.sleep(0.005)
    assert (await client.get(PATH)).json()["data"] == []
    assert not deletion.done()
    pool.hold_evict.set()
    assert (await deletion).json() == {"id": id, "object": "adaptation", "deleted": True}
    assert (await again).status_code in (200, 404)
    assert (await client.delete(f"{PATH}/{id}")).status_code == 404
    assert pool.evicted == [id]


async def test_delete_of_a_running_job_cancels_it_first(
    client: httpx.AsyncClient, pool: Any
) -> None:
    pool.hold = True
    id = (await create(client))["id"]
    await until(lambda: id in pool.queues)
    pool.say(id, started(id))
    async with client.stream("GET", f"{PATH}/{id}/events", headers=SSE) as response:
        lines = response.aiter_lines()
        await anext(lines)
        assert (await client.delete(f"{PATH}/{id}")).status_code == 200
        rest = [line async for line in lines]
    assert pool.cancelled == [id]
    assert pool.evicted == [id]
    assert rest[-2:] == ["data: [DONE]", ""]
    assert (await client.get(f"{PATH}/{id}")).status_code == 404
    text = (await client.get("/metrics")).text
    assert 'imprint_requests_running{kind="adaptation"} 0.0' in text
    assert 'imprint_requests_waiting{kind="adaptation"} 0.0' in text


async def test_pages(client: httpx.AsyncClient) -> None:
    ids = [(await create(client, str(number)))["id"] for number in range(5)]
    page = (await client.get(PATH, params={"limit": 2})).json()
    assert [job["id"] for job in page["data"]] == [ids[4], ids[3]]
    assert (page["object"], page["has_more"], page["last_id"]) == ("list", True, ids[3])
    page = (await client.get(PATH, params={"limit": 9, "after": page["last_id"]})).json()
    assert [job["id"] for job in page["data"]] == [ids[2], ids[1], ids[0]]
    assert not page["has_more"]


async def test_expired_is_gone(client: Any, pool: Any) -> None:
    id = (await create(client, expires_after_s=0.001))["id"]
    await read_events(client, id)
    await client.app.state.services.retention.sweep()
    assert pool.evicted == [id]
    assert (await get(client, id))["status"] == "expired"
    asked = {"adaptation": id, "questions": ["a"]}
    response = await client.post("/v1/answers", json=asked)
    assert (response.status_code, response.json()["error"]["code"]) == (410, "adaptation_expired")
    assert (await create(client))["id"] != id


async def test_unfinished_jobs_go_on_after_a_restart(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    async with serve(settings, pool) as client:
        running = (await create(client, "a"))["id"]
        queued = (await create(client, "b"))["id"]
        await until(lambda: len(pool.queues) == 2)
        pool.say(running, started(running), step(running, 1))
        while len((await client.get(f"{PATH}/{running}/events")).json()["data"]) < 3:
            await asyncio.sleep(0.005)
    assert pool.closed
    assert sorted(pool.abandoned) == sorted([running, queued])
    second = type(pool)()
    async with serve(settings, second) as client:
        kinds = [event["kind"] for event in await read_events(client, running)]
        assert kinds[:3] == ["queued", "running", "step"]
        assert kinds[3:] == ["requeued", "running", "step", "succeeded"]
        assert (await read_events(client, queued))[-1]["kind"] == "succeeded"
        assert [work.tokens for work in second.adapts] == [work.tokens for work in pool.adapts]


async def test_cancelled_and_deleted_jobs_do_not_come_back(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    pool.hold_evict = asyncio.Event()
    async with serve(settings, pool) as client:
        cancelled = (await create(client, "a"))["id"]
        deleted = (await create(client, "b"))["id"]
        await until(lambda: len(pool.queues) == 2)
        pool.cancel = lambda id: asyncio.sleep(0)  # a worker that does not answer
        tasks = [
            asyncio.create_task(client.post(f"{PATH}/{cancelled}/cancel")),
            asyncio.create_task(client.delete(f"{PATH}/{deleted}")),
        ]
        while (await client.get(f"{PATH}/{deleted}")).status_code != 404:
            await asyncio.sleep(0.005)
        journal = client.app.state.services.journal
        while not (await journal(type(journal._journal).get, cancelled)).cancel_requested:
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
    second = type(pool)()
    async with serve(settings, second) as client:
        assert (await get(client, cancelled))["status"] == "cancelled"
        await until(lambda: second.evicted == [deleted])
        assert (await client.get(f"{PATH}/{deleted}")).status_code == 404
        assert second.works == []


async def test_a_job_that_kills_the_server_is_given_up(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    async with serve(settings, pool) as client:
        id = (await create(client))["id"]
        await until(lambda: id in pool.queues)
        journal = client.app.state.services.journal
        for _ in range(5):
            await journal(type(journal._journal).requeue, id, reason="server_died", died=True)
    async with serve(settings, type(pool)()) as client:
        job = await get(client, id)
        assert (job["status"], job["error"]["code"]) == ("failed", "worker_died")


async def test_a_job_for_another_model_fails_clearly(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    async with serve(settings, pool) as client:
        id = (await create(client))["id"]
    async with serve(settings.model_copy(update={"model_name": "other"}), type(pool)()) as client:
        job = await get(client, id)
        assert (job["status"], job["error"]["code"]) == ("failed", "model_not_available")


async def test_event_streams_end_when_the_server_drains(client: Any, pool: Any) -> None:
    pool.hold = True
    id = (await create(client))["id"]
    async with client.stream("GET", f"{PATH}/{id}/events", headers=SSE) as response:
        lines = response.aiter_lines()
        await anext(lines)
        client.app.state.services.jobs.drain()
        rest = [line async for line in lines]
    assert '"draining"' in rest[-4]
    assert rest[-2] == "data: [DONE]"
