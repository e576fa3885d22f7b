"""Adapters as files: downloaded whole, and gone where they are gone."""

import asyncio
import os
from typing import Any

import httpx
import pytest

from imprint.server.config import Settings

pytestmark = pytest.mark.anyio


async def adapted(client: httpx.AsyncClient) -> str:
    """The id of an adaptation that can be asked."""
    id = str((await client.post("/v1/adaptations", json={"document": "text"})).json()["id"])
    await client.get(f"/v1/adaptations/{id}/events", headers={"Accept": "text/event-stream"})
    return id


async def test_an_adapter_is_downloaded(client: Any) -> None:
    id = await adapted(client)
    path = client.app.state.services.settings.data_dir / "adapters" / f"{id}.safetensors"
    data = bytes(range(256)) * 4000
    path.write_bytes(data)
    response = await client.get(f"/v1/adaptations/{id}/adapter")
    assert (response.status_code, response.content) == (200, data)
    assert response.headers["content-length"] == str(len(data))
    assert f'filename="{id}.safetensors"' in response.headers["content-disposition"]


async def test_an_adapter_that_is_gone(client: Any, pool: Any) -> None:
    id = await adapted(client)
    for _ in range(2):
        response = await client.get(f"/v1/adaptations/{id}/adapter")
        assert (response.status_code, response.json()["error"]["code"]) == (410, "adapter_evicted")
    assert (await client.get("/v1/adaptations/adp_x/adapter")).status_code == 404
    pool.hold = True
    running = (await client.post("/v1/adaptations", json={"document": "other"})).json()["id"]
    response = await client.get(f"/v1/adaptations/{running}/adapter")
    assert response.json()["error"]["code"] == "adaptation_not_ready"


async def test_a_download_ends_with_the_patience_for_its_reader(
    serve: Any, settings: Settings, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    size = 24 * 2**20  # more than the buffers of the two sockets take
    async with serve(settings.model_copy(update={"write_timeout_s": 0.2}), pool) as client:
        id = await adapted(client)
        path = client.app.state.services.settings.data_dir / "adapters" / f"{id}.safetensors"
        path.touch()
        os.truncate(path, size)
        head = f"GET /v1/adaptations/{id}/adapter HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

        async def ask() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            found = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            found[1].write(head)
            return found

        slow, writer = await ask()
        got = len(await slow.readuntil(b"\r\n\r\n")) * 0
        while got < size:  # longer than the timeout, and always some of it
            got += len(await slow.read(2**20))
            await asyncio.sleep(0.02)
        writer.close()
        assert "took nothing" not in caplog.text
        stalled, writer = await ask()
        async with asyncio.timeout(10):
            while "took nothing" not in caplog.text:
                await asyncio.sleep(0.01)
        got = 0
        try:
            while piece := await stalled.read(2**20):
                got += len(piece)
        except ConnectionError:
            pass
        assert got < size
        writer.close()
