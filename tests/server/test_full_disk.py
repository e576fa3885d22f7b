"""A disk that is full, or gone, and comes back: what clients hear, and that no job is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from imprint.server.journal import Journal
from imprint.server.messages import (
    AdaptationDone,
    AdaptationEvent,
    AdaptationFailed,
    AdaptationStarted,
    RequestFailed,
)

PATH = "/v1/adaptations"


async def create(client: httpx.AsyncClient, document: str = "hello") -> str:
    response = await client.post(PATH, json={"document": document})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


async def status_of(client: httpx.AsyncClient, id: str) -> str:
    return str((await client.get(f"{PATH}/{id}")).json()["status"])


async def until(condition: Any) -> None:
    async with asyncio.timeout(15):
        while not await condition():
            await asyncio.sleep(0.01)


async def told(client: httpx.AsyncClient, id: str) -> list[tuple[str, Any]]:
    """The events of an ended job: kinds, with steps or reasons."""
    await client.get(f"{PATH}/{id}/events", headers={"Accept": "text/event-stream"})
    page = (await client.get(f"{PATH}/{id}/events")).json()["data"]
    return [(e["kind"], e["data"].get("step", e["data"].get("reason"))) for e in page]


def step(id: str, number: int) -> AdaptationEvent:
    return AdaptationEvent(adaptation_id=id, kind="step", data={"step": number, "steps": 3})


def full(id: str) -> AdaptationFailed:
    text = "the adapter could not be written or read: No space left on device"
    return AdaptationFailed(adaptation_id=id, code="store_failed", message=text)


def fill_disk(journal: Journal) -> None:
    """What SQLite meets on a full disk: no page more than there is."""
    pages = journal.db.execute("PRAGMA page_count").fetchone()[0]
    journal.db.execute(f"PRAGMA max_page_count={pages}")


def free_disk(journal: Journal) -> None:
    journal.db.execute("PRAGMA max_page_count=1000000")


@pytest.mark.anyio
async def test_a_full_journal_refuses_what_is_new_and_keeps_what_was_promised(
    client: httpx.AsyncClient, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    journal = client.app.state.services.journal  # type: ignore[attr-defined]
    pool.hold = True
    id = await create(client)
    await until(lambda: _given(pool, id))
    await journal(fill_disk)
    refused = await client.post(PATH, json={"document": "x" * 200_000})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "journal_unavailable"
    assert refused.headers["Retry-After"] == "30"
    long = {"notes": "n" * 50_000}  # more than the free space of the last page
    pool.say(id, AdaptationStarted(adaptation_id=id, attempt=1))
    pool.say(id, AdaptationEvent(adaptation_id=id, kind="step", data={"step": 1, **long}))
    pool.say(id, step(id, 2), step(id, 3))
    pool.say(id, AdaptationDone(adaptation_id=id, status="succeeded"))
    await until(lambda: _logged(caplog, "the journal cannot be written"))
    assert (await client.get("/health/live")).status_code == 200
    assert await status_of(client, id) in ("queued", "running")  # reading goes on
    await journal(free_disk)
    await until(lambda: _has(client, id, "succeeded"))
    kinds = [("queued", None), ("running", None), *(("step", n) for n in (1, 2, 3))]
    assert await told(client, id) == [*kinds, ("succeeded", None)]
    assert (await client.post(PATH, json={"document": "x" * 200_000})).status_code == 202


async def _logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def _given(pool: Any, *ids: str) -> bool:
    return set(ids) <= set(pool.queues)


async def _has(client: httpx.AsyncClient, id: str, status: str) -> bool:
    return await status_of(client, id) == status


@pytest.mark.anyio
async def test_a_job_whose_adapter_the_disk_did_not_take_is_tried_again(
    client: httpx.AsyncClient, pool: Any
) -> None:
    pool.hold = True
    id = await create(client)
    await until(lambda: _given(pool, id))
    pool.say(id, AdaptationStarted(adaptation_id=id, attempt=1), step(id, 1), full(id))
    await until(lambda: _resubmitted(pool, id))
    pool.say(id, AdaptationStarted(adaptation_id=id, attempt=1))
    pool.say(id, AdaptationDone(adaptation_id=id, status="succeeded"))
    assert await told(client, id) == [
        *[("queued", None), ("running", None), ("step", 1), ("requeued", "store_failed")],
        *[("running", None), ("succeeded", None)],
    ]
    text = (await client.get("/metrics")).text
    assert 'imprint_requests_running{kind="adaptation"} 0.0' in text
    assert 'imprint_requests_waiting{kind="adaptation"} 0.0' in text


async def _resubmitted(pool: Any, id: str) -> bool:
    return [work.adaptation_id for work in pool.adapts].count(id) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_a_job_that_waits_for_the_disk_can_be_given_up(
    client: httpx.AsyncClient, pool: Any, how: str
) -> None:
    pool.hold = True
    id = await create(client)
    await until(lambda: _given(pool, id))
    pool.say(id, AdaptationStarted(adaptation_id=id, attempt=1), full(id))
    await until(lambda: _requeued(client, id))
    if how == "cancel":
        response = await client.post(f"{PATH}/{id}/cancel")
        assert response.json()["status"] == "cancelled"
    else:
        assert (await client.delete(f"{PATH}/{id}")).json()["deleted"]
    assert len(pool.adapts) == 1


async def _requeued(client: httpx.AsyncClient, id: str) -> bool:
    page = (await client.get(f"{PATH}/{id}/events")).json()["data"]
    return "requeued" in [event["kind"] for event in page]


@pytest.mark.anyio
async def test_a_client_that_waits_for_an_answer_hears_of_it_at_once(
    client: httpx.AsyncClient, pool: Any
) -> None:
    pool.adaptation_script = lambda id: [AdaptationStarted(adaptation_id=id, attempt=1), full(id)]
    asked = {"document": "hello", "questions": ["Who?"]}
    response = await client.post("/v1/answers", json=asked)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "store_failed"
    assert int(response.headers["Retry-After"]) > 0


@pytest.mark.anyio
async def test_an_adapter_whose_folder_is_away_is_not_given_up(
    client: httpx.AsyncClient, pool: Any
) -> None:
    id = await create(client)
    await until(lambda: _has(client, id, "succeeded"))
    text = "the adapter could not be written or read: the store's folder is not there"
    pool.answer_script = lambda work: [
        RequestFailed(request_id=work.request_id, code="store_failed", message=text)
    ]
    asked = {"adaptation": id, "questions": ["Who?"], "focus": False}
    response = await client.post("/v1/answers", json=asked)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_failed")
    assert pool.evicted == []
    del pool.answer_script  # the folder is back
    assert (await client.post("/v1/answers", json=asked)).status_code == 200
