"""Real processes that die, hang or meet a full disk at every point where something is written or
said: no job is lost, and each leaves the adapter that it would have left undisturbed."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow
STUDY: dict[str, Any] = {
    "type": "refine", "steps": 5, "patience": 100, "positions": 4, "group_size": 2, "lora_rank": 2,
}  # fmt: skip
READ = {"type": "read"}
TEXTS = [f"Keeper {name} hid the lamp oil below the stairs. " * 6 for name in "ABCDE"]


def study_all(server: Any) -> list[str]:
    return [server.adapt(text, method=STUDY) for text in TEXTS]


def kinds(server: Any, id: str) -> list[str]:
    return [event["kind"] for event in server.events(id)]


def assert_each_step_once(server: Any, id: str) -> None:
    steps = [e["data"]["step"] for e in server.events(id) if e["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_workers_that_die_at_any_point_lose_nothing(live: Any) -> None:
    plan = (
        "worker-0.1/step@2=kill,worker-1.1/artefact_write@3=kill,"
        "worker-2.1/artefact_rename@4=kill,worker-3.1/message_send@12=kill,"
        "worker-4.1/message_receive@1=kill"
    )
    server = live("--workers", "5", plan=plan)
    assert "faults on purpose" in server.log.read_text()
    server.wait_for_workers(5)
    ids = study_all(server)
    jobs = [server.ended(id) for id in ids]
    assert {job["status"] for job in jobs} <= {"succeeded", "rejected"}, jobs
    for id in ids:
        assert_each_step_once(server, id)
    restarts = {worker["name"]: worker["restarts"] for worker in server.workers()}
    assert restarts == {f"worker-{i}": {"killed": 1} for i in range(5)}
    assert sum("resumed" in kinds(server, id) for id in ids) >= 3
    assert not list((server.data / "adapters" / "progress").rglob("*.safetensors"))
    disturbed = [server.checksum(id) for id in ids]
    for id in ids:
        assert server.http.delete(f"/v1/adaptations/{id}").json()["deleted"]
    calm_ids = study_all(server)  # the processes of now have no faults
    for id in calm_ids:
        server.ended(id)
        assert "requeued" not in kinds(server, id)
    assert [server.checksum(id) for id in calm_ids] == disturbed


def test_a_server_that_dies_at_any_point_keeps_its_promises(live: Any) -> None:
    promised: list[str] = []
    for plan in (
        "api/journal_write@9=kill",
        "api/message_receive@9=kill",
    ):
        server = live(plan=plan)
        for text in TEXTS:
            try:
                promised.append(server.adapt(f"{plan} {text}", method=STUDY))
            except httpx.TransportError:
                break
        assert server.process.wait(60) == -9
    server = live()
    assert promised
    for id in promised:
        assert server.ended(id)["status"] in ("succeeded", "rejected")
        assert_each_step_once(server, id)


def test_a_hung_worker_costs_only_its_own_jobs_and_only_a_step(live: Any) -> None:
    plan = "worker-0.1/step@3=hang"
    server = live("--workers", "2", "--heartbeat-timeout-s", "4", plan=plan)
    server.wait_for_workers(2)
    hung = server.adapt(TEXTS[0], method={**STUDY, "steps": 8})
    other = server.adapt(TEXTS[1], method=READ)
    assert server.ended(other)["status"] == "succeeded"
    server.wait(lambda: kinds(server, hung).count("step") == 2)
    asked = {"adaptation": other, "questions": ["Where?"], "focus": False, "max_tokens": 4}
    num_answers = 0
    while server.job(hung)["attempt"] < 2:  # all the while, the other worker answers
        assert server.http.post("/v1/answers", json=asked).status_code == 200
        num_answers += 1
    assert num_answers > 5
    assert server.ended(hung)["status"] in ("succeeded", "rejected")
    events = {event["kind"]: event["data"] for event in server.events(hung)}
    assert events["requeued"]["reason"] == "hung"
    assert events["resumed"]["step"] == 2
    assert_each_step_once(server, hung)
    assert "requeued" not in kinds(server, other)
    assert [worker["restarts"] for worker in server.workers()] == [{"hung": 1}, {}]


def test_a_full_disk_and_a_store_that_goes_away(live: Any) -> None:
    # the adapter of the first document, after the checkpoints before and of its two steps
    server = live("--adapter-host-bytes", "0", plan="worker-0/artefact_write@2-4=full")
    server.wait_for_workers()
    id = server.adapt(TEXTS[0], method={**STUDY, "steps": 2})
    assert server.ended(id)["status"] in ("succeeded", "rejected")
    assert "store_failed" in [event["data"].get("reason") for event in server.events(id)]
    found = server.metrics()
    assert found['imprint_adaptation_checkpoints_total{outcome="unwritten"}'] == 2

    store, away = server.data / "adapters", server.data / "away"
    store.rename(away)
    asked = {"adaptation": id, "questions": ["Where?"], "focus": False, "max_tokens": 4}
    refused = server.http.post("/v1/answers", json=asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_failed")
    waits = server.adapt(TEXTS[1], method=READ)
    server.wait(lambda: "requeued" in kinds(server, waits))
    doomed: list[httpx.Response] = []
    deletion = threading.Thread(
        target=lambda: doomed.append(server.http.delete(f"/v1/adaptations/{id}"))
    )
    deletion.start()
    server.wait(lambda: f"evict of {id} ended: store_failed" in server.log.read_text())
    assert not store.exists()  # nobody makes an empty one
    assert deletion.is_alive()  # nobody can say that nothing holds it
    away.rename(store)
    deletion.join(60)
    assert doomed[0].json()["deleted"]
    assert not list(store.rglob(f"{id}*"))
    assert server.ended(waits)["status"] == "succeeded"
    answer = server.http.post("/v1/answers", json={**asked, "adaptation": waits})
    assert answer.status_code == 200
