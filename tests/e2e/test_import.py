"""An adapter leaves a real server and comes back: its answers are the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.adapters.adapter import FORMAT
from imprint.adapters.verified import read_verified, to_blob

STUDY: dict[str, Any] = {
    "type": "refine", "steps": 2, "positions": 2, "group_size": 2, "lora_rank": 2,
    "learning_rate": 0.05, "probe_confidence": 0.0, "neutral_margin": 100.0,
}  # fmt: skip
TEXT = "Anna hid the key under the third stone by the well, and nobody but the dog saw it. " * 3
FILE = {"Content-Type": "application/octet-stream"}


def said(server: Any, id: str) -> Any:
    """Tokens with their log-probabilities, which a single changed bit would change."""
    body = {"model": f"tiny:{id}", "prompt": "Who saw it?", "max_tokens": 12, "logprobs": 5}
    response = server.http.post("/v1/completions", json={**body, "temperature": 0})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def focused(server: Any, id: str) -> Any:
    body = {"adaptation": id, "questions": ["Who saw it?"], "max_tokens": 8, "temperature": 0}
    response = server.http.post("/v1/answers", json={**body, "focus": {"steps": 1}})
    assert response.status_code == 200, response.text
    return [(answer["answer"], answer["adapted"]) for answer in response.json()["answers"]]


def send(server: Any, data: bytes) -> dict[str, Any]:
    """The adaptation of an imported file, when it has ended."""
    response = server.http.post("/v1/adapters", content=data, headers=FILE)
    assert response.status_code == 202, response.text
    ended: dict[str, Any] = server.ended(response.json()["id"])
    return ended


@pytest.fixture
def server(live: Any) -> Any:
    started = live()
    started.wait_for_workers()
    return started


def test_there_and_back(server: Any, tmp_path: Path) -> None:
    for method in ({"type": "read"}, STUDY, {**STUDY, "scope": "lora"}):
        id = server.adapt(TEXT, method=method)
        old = server.ended(id)
        assert old["status"] == "succeeded", old
        data = server.http.get(f"/v1/adaptations/{id}/adapter").content
        before = said(server, id), focused(server, id), server.checksum(id)
        assert server.http.delete(f"/v1/adaptations/{id}").status_code == 200
        new = send(server, data)
        assert (new["status"], new["error"], new["usage"]) == ("succeeded", None, {})
        assert (new["num_tokens"], new["adapter_bytes"]) == (
            old["num_tokens"],
            old["adapter_bytes"],
        )
        assert new["result"]["accepted"] is (method["type"] == "refine")
        after = said(server, new["id"]), focused(server, new["id"]), server.checksum(new["id"])
        assert after == before
        assert server.http.delete(f"/v1/adaptations/{new['id']}").status_code == 200
    assert not [path for path in (server.data / "adapters").rglob("*") if path.is_file()]
    _check_what_does_not_fit(server, data, tmp_path)


def _check_what_does_not_fit(server: Any, data: bytes, tmp_path: Path) -> None:
    """Only a worker can tell; it goes on, and nothing is kept."""
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    tensors, manifest = read_verified(path, FORMAT)
    name = next(name for name in tensors if name.startswith("state."))
    for wrong in (torch.zeros(3), torch.full_like(tensors[name], float("nan"))):
        failed = send(server, to_blob({**tensors, name: wrong}, manifest, FORMAT))
        assert (failed["status"], failed["error"]["code"]) == ("failed", "adapter_does_not_fit")
        assert name in failed["error"]["message"]
    assert not [path for path in (server.data / "adapters").rglob("*") if path.is_file()]
    rejected = {**manifest, "outcome": "rejected"}
    plain = {key: value for key, value in tensors.items() if not key.startswith("delta.")}
    refused = send(server, to_blob(plain, rejected, FORMAT))
    assert (refused["status"], refused["result"]["accepted"]) == ("rejected", False)
    assert said(server, refused["id"])
