"""A real Prometheus scrapes a real server: every metric, dashboard and alert. Tiny model."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from support.live_server import LiveServer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
DOCUMENT = "The canary lives in the third house, and its number is 4711. " * 30
STUDY = {
    "type": "refine", "steps": 2, "positions": 4, "group_size": 2, "lora_rank": 2,
    "learning_rate": 0.05, "probe_confidence": 0.0, "neutral_margin": 100.0,
}  # fmt: skip
PLANNED = """
    build_info model_info http_requests_total http_request_duration_seconds requests_total
    requests_running requests_waiting request_queue_time_seconds admission_rejections_total
    request_deadline_exceeded_total adaptation_duration_seconds
    adaptation_phase_duration_seconds adaptation_steps_total adaptation_rollout_tokens_total
    adaptation_document_tokens adaptation_reward adaptation_entropy_nats adaptation_grad_norm
    adaptation_probe_gain_nats adaptations_total time_to_first_token_seconds
    inter_token_latency_seconds prompt_tokens_total generation_tokens_total
    engine_step_duration_seconds engine_steps_total engine_batch_size
    engine_last_step_timestamp_seconds adapters adapter_bytes adapter_capacity_bytes
    adapter_hits_total adapter_misses_total adapter_evictions_total slots worker_up
    worker_restarts_total worker_heartbeat_age_seconds oom_total gpu_memory_bytes
"""
GPU_ONLY = {"gpu_memory_bytes"}
NO_SUCH_EVENT = {  # shown as zero; other tests make them happen
    "worker_restarts_total": "tests/e2e/test_worker_death.py",
    "oom_total": "tests/server/engine/test_faults.py",
}


class Live:
    """The server after its load, and the Prometheus that watched it."""

    def __init__(self, url: str, prometheus: str, data: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.prometheus = httpx.Client(base_url=prometheus, timeout=30)
        self.data = data

    def close(self) -> None:
        self.http.close()
        self.prometheus.close()

    def query(self, expression: str) -> list[float]:
        reply = self.prometheus.get("/api/v1/query", params={"query": expression}).json()
        assert reply["status"] == "success", (expression, reply)
        return [float(sample["value"][1]) for sample in reply["data"]["result"]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def prometheus_config(folder: Path, url: str) -> Path:
    """The shipped configuration, with this server as its target and no patience."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "imprint")
    job["scrape_interval"] = "1s"
    job["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    config["scrape_configs"] = [job]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def live(
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    wait_for: Callable[..., None],
    program: Callable[[str], str],
) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("monitoring")
    binary = program("prometheus")
    flags = (
        "--model",
        str(tiny_checkpoint),
        "--max-active-adaptations",
        "2",
        "--adapter-host-bytes",
        "1",
    )
    with ExitStack() as stack:
        server = stack.enter_context(LiveServer(folder / "data", *flags))
        server.wait_until_ready()
        port = free_port()
        command = [binary, f"--config.file={prometheus_config(folder, server.url)}"]
        command += [f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
        with (folder / "prometheus-log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        live = Live(server.url, f"http://127.0.0.1:{port}", folder / "data")
        stack.callback(live.close)
        wait_for(lambda: answers(live.prometheus, "/-/ready"), "a ready Prometheus")
        wait_for(lambda: live.query('up{job="imprint"} == 1'), "a scrape")
        put_load_on(live)
        seen = live.query("sum(imprint_http_requests_total)")
        wait_for(lambda: live.query("sum(imprint_http_requests_total)") > seen, "another scrape")
        wait_for(lambda: live.query("sum(imprint_adapter_misses_total) > 0"), "what a worker said")
        # what Prometheus saw first with all of its load has no rate: a little more of it
        study_and_ask(live)
        for name in ("request_queue_time_seconds", "quantum_duration_seconds"):
            rate = f"sum(rate(imprint_{name}_count[60s])) > 0"
            wait_for(lambda rate=rate: live.query(rate), f"the rate of {name}")
        wait_for(lambda: live.query("count_over_time(up[1m]) > 3"), "a few scrapes")
        yield live


def answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).is_success
    except httpx.TransportError:
        return False


def put_load_on(live: Live) -> None:
    """Some of everything: studies, answers, streams, refusals, deadlines, a lost adapter."""
    http = live.http
    job = http.post("/v1/adaptations", json={"document": DOCUMENT, "method": STUDY}).json()
    sse = {"Accept": "text/event-stream"}
    assert "[DONE]" in http.get(f"/v1/adaptations/{job['id']}/events", headers=sse).text
    focus = {"steps": 1}
    asked = {"adaptation": job["id"], "questions": ["Which number?"] * 2, "focus": focus}
    assert http.post("/v1/answers", json={**asked, "max_tokens": 12}).is_success
    complete = {"model": "tiny", "prompt": ["a", "bc"], "max_tokens": 12, "stream": True}
    assert "[DONE]" in http.post("/v1/completions", json=complete).text
    late = {**asked, "timeout_s": 0.01, "max_tokens": 64}
    assert http.post("/v1/answers", json=late).status_code == 504
    endless = {"type": "refine", "steps": 1000, "patience": 1000, "positions": 4, "lora_rank": 2}
    begun = [
        http.post("/v1/adaptations", json={"document": DOCUMENT + str(n), "method": endless})
        for n in range(3)
    ]
    assert [reply.status_code for reply in begun] == [202, 202, 503]
    for reply in begun[:2]:
        assert http.post(f"/v1/adaptations/{reply.json()['id']}/cancel").is_success
    kept = {"document": DOCUMENT, "questions": ["Where?"], "focus": focus, "max_tokens": 4}
    assert http.post("/v1/answers", json=kept).is_success
    (live.data / "adapters" / f"{job['id']}.safetensors").unlink()
    assert http.post("/v1/answers", json=asked).status_code == 410


def study_and_ask(live: Live) -> None:
    """One document, studied for its question."""
    asked = {"document": DOCUMENT, "questions": ["Which?"], "focus": {"steps": 1}, "max_tokens": 4}
    assert live.http.post("/v1/answers", json=asked).is_success


def families(text: str) -> dict[str, list[float]]:
    """Values by the name under which a metric is declared."""
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = [sample.value for sample in family.samples]
    return found


def test_every_metric_is_fed(live: Live) -> None:
    found = families(live.http.get("/metrics").text)
    assert [name for name in PLANNED.split() if f"imprint_{name}" not in found] == []
    silent = {name for name in PLANNED.split() if not any(found[f"imprint_{name}"])}
    at_rest = {"requests_running", "requests_waiting"}
    assert silent - at_rest == GPU_ONLY | set(NO_SUCH_EVENT)
    assert all((ROOT / path).exists() for path in NO_SUCH_EVENT.values())


def test_nothing_runs_after_the_load(live: Live) -> None:
    found = families(live.http.get("/metrics").text)
    assert set(found["imprint_requests_running"]) == set(found["imprint_requests_waiting"]) == {0}


def test_promtool_finds_no_fault_in_the_metrics(live: Live, program: Callable[[str], str]) -> None:
    text = live.http.get("/metrics").content
    command = [program("promtool"), "check", "metrics"]
    result = subprocess.run(command, input=text, capture_output=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr.decode()


def panels() -> list[Any]:
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel.get("targets", []):
                found.append(pytest.param(target["expr"], id=f"{path.stem}: {panel['title']}"))
    return found


@pytest.mark.parametrize("expression", panels())
def test_every_query_of_a_dashboard_has_data(live: Live, expression: str) -> None:
    concrete = expression.replace("$__rate_interval", "60s").replace("$instance", ".*")
    assert "$" not in concrete
    values = live.query(concrete)
    if any(name in expression for name in GPU_ONLY):
        assert values == []
    else:
        assert any(not math.isnan(value) for value in values), concrete


def test_dashboards_name_the_provisioned_data_source() -> None:
    path = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(path.read_text("utf-8"))["datasources"]
    for path in DASHBOARDS:
        uids = set(re.findall(r'"type": "prometheus",\s*"uid": "(\w+)"', path.read_text("utf-8")))
        assert uids == {source["uid"]}


def test_every_rule_is_evaluated(live: Live) -> None:
    groups = live.prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in rule_groups())
    assert {rule["health"] for rule in rules} == {"ok"}
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert firing == []


def rule_groups() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return groups


ALERTS = [rule for group in rule_groups() for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_the_rules(
    arguments: tuple[str, ...], program: Callable[[str], str]
) -> None:
    command = [program("promtool"), *arguments]
    result = subprocess.run(
        command, cwd=PROMETHEUS, capture_output=True, text=True, timeout=90, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_unit_tests_and_a_place_in_the_runbook(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text("utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == name]
    assert set(fires) == {True, False}, "a case in which it fires, and one in which it does not"
    path, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert anchor == name.lower()
    assert f"\n## {name}\n" in (ROOT / path).read_text("utf-8")
