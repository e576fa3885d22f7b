"""What the metrics show of a server that has worked: nothing is held once nothing is needed."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BUSY = (
    "imprint_requests_running", "imprint_requests_waiting", "imprint_worker_adaptations",
    "imprint_worker_requests", 'imprint_slots{state="used"}', "imprint_adapters",
    "imprint_adapter_bytes",
)  # fmt: skip
"""Gauges that are zero at rest; those with labels by the beginning of their names."""


def held(server: Any) -> dict[str, float]:
    return {name: value for name, value in server.metrics().items() if name.startswith(BUSY)}


def test_gauges_return_to_where_they_were(live: Any) -> None:
    """Two workers; adapters go by deletion and by expiry, a study by being cancelled."""
    server = live("--workers", "2")
    server.wait_for_workers(2)
    method = {"type": "refine", "steps": 1, "positions": 2, "group_size": 2, "lora_rank": 2}
    texts = [f"Keeper {name} hid the oil. " * 8 for name in "ABCD"]
    kept = [server.adapt(text, method=method) for text in texts[:2]]
    brief = [server.adapt(text, method=method, expires_after_s=1) for text in texts[2:]]
    for id in (*kept, *brief):
        server.wait(lambda id=id: server.job(id)["status"] not in ("queued", "running"))
    for id in kept:
        for focus in (False, True):
            asked = {"questions": ["Where?"], "max_tokens": 4, "adaptation": id, "focus": focus}
            assert server.http.post("/v1/answers", json=asked).status_code == 200
    server.wait(lambda: sum(v for name, v in held(server).items() if "adapters{" in name) > 0)
    cancelled = server.adapt("Nobody waits for it. " * 50, method={**method, "steps": 1000})
    assert server.http.post(f"/v1/adaptations/{cancelled}/cancel").status_code == 200
    for id in kept:
        assert server.http.delete(f"/v1/adaptations/{id}").json()["deleted"]
    server.wait(lambda: not any(held(server).values()))
    assert {server.job(id)["status"] for id in brief} == {"expired"}
    assert len(held(server)) >= 10
    assert not list((server.data / "adapters").rglob("*.safetensors"))
