"""Adapters whose time is over are freed a few at a time, and one that hangs holds up no other; what
a process leaves behind that dies is freed at the next start."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from imprint.adapters.files import FileFolder
from imprint.server.config import Settings
from imprint.server.journal import Journal
from imprint.server.retention import MAX_EXPIRING

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the server is about to do."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def make_due(client: Any, number: int) -> list[str]:
    """So many adapters whose time is over, all of them at one stroke."""
    ids = []
    for i in range(number):
        body = {"document": f"document {i}", "expires_after_s": 3600}
        ids.append((await client.post("/v1/adaptations", json=body)).json()["id"])
    await until(lambda: client.app.state.services.jobs.num_active == 0)

    def let_time_pass(journal: Journal) -> None:
        with journal.transaction() as db:
            db.execute("UPDATE adaptations SET expires_at=1")

    await client.app.state.services.journal(let_time_pass)
    return ids


def slow(pool: Any, stuck: asyncio.Event) -> Any:
    """A pool of the same kind that hangs with the first adapter, and counts those at work."""

    class Slow(type(pool)):  # type: ignore[misc]
        first = ""
        num_now = most_at_once = 0

        async def evict(self, adapter_id: str) -> None:
            self.first = self.first or adapter_id
            self.num_now += 1
            self.most_at_once = max(self.most_at_once, self.num_now)
            if adapter_id == self.first:
                await stuck.wait()
            await asyncio.sleep(0)
            self.num_now -= 1
            await super().evict(adapter_id)

    return Slow()


async def test_one_that_hangs_holds_up_no_other(serve: Any, settings: Settings, pool: Any) -> None:
    stuck = asyncio.Event()
    hanging = slow(pool, stuck)
    async with serve(settings, hanging) as client:
        ids = await make_due(client, 3 * MAX_EXPIRING)
        await until(lambda: len(hanging.evicted) == len(ids) - 1)  # by the server's own sweep
        assert hanging.first not in hanging.evicted
        assert 1 < hanging.most_at_once <= MAX_EXPIRING
        stuck.set()
        await until(lambda: hanging.first in hanging.evicted)
    assert sorted(hanging.evicted) == sorted(ids)


async def test_files_that_no_adaptation_stands_for_are_freed_at_the_start(
    serve: Any, settings: Settings, pool: Any
) -> None:
    store = FileFolder(settings.pool_config().worker.store)
    async with serve(settings, pool) as client:
        expired, ready = await make_due(client, 2)
        pool.hold = True
        running = await client.post("/v1/adaptations", json={"document": "long"})
        gone = await client.post("/v1/adaptations", json={"document": "cancelled"})
        ids = [response.json()["id"] for response in (running, gone)]
        await client.post(f"/v1/adaptations/{ids[1]}/cancel")

        def die_here(journal: Journal) -> None:
            """What a death leaves between this and the eviction of the file."""
            with journal.transaction() as db:
                db.execute("UPDATE adaptations SET expires_at=NULL")
            assert journal.expire(expired, reason="adaptation_expired")

        await client.app.state.services.journal(die_here)
        for id in (expired, ready, *ids, "adp_0123456789", "notes-of-somebody"):
            store.write(id, b"bytes", durable=False)
    second = type(pool)()
    second.hold = True
    async with serve(settings, second):
        await until(lambda: len(second.evicted) == 3)
    assert sorted(second.evicted) == sorted([expired, ids[1], "adp_0123456789"])
