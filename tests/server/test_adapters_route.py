"""Adapters as files: downloaded whole, and gone where they are gone."""

from typing import Any

import httpx
import pytest

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
