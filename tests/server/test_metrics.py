"""Metrics: declared once, named by the rules, counted from what workers say."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imprint.server.messages import Heartbeat, Observation, WorkerStats
from imprint.server.metrics import Metrics


def values(metrics: Metrics, workers: list[object] | None = None) -> dict[str, float]:
    text = metrics.render(workers or []).decode()  # type: ignore[arg-type]
    return {
        sample.name + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_follow_the_rules() -> None:
    metrics = Metrics()
    kinds = {m.name: m.type for m in metrics.registry.collect()}
    for name, kind in kinds.items():
        assert name.startswith("imprint_")
        assert not re.search(r"_(ms|percent|perc|kb|mb)$", name)
        assert kind == "counter" or not name.endswith("_total")
    labels = {label for m in metrics.registry.collect() for s in m.samples for label in s.labels}
    assert not {label for label in labels if label.endswith("id")}


@pytest.mark.parametrize(
    ("name", "value", "labels", "sample"),
    [
        ("engine_steps_total", 3.0, {}, "imprint_engine_steps_total"),
        ("engine_batch_size", 4.0, {}, "imprint_engine_batch_size_sum"),
        (
            "oom_total",
            1.0,
            {"phase": "read", "recovered": "true"},
            "imprint_oom_total|phase=read|recovered=true",
        ),
    ],
)
def test_observations_are_counted(
    name: str, value: float, labels: dict[str, str], sample: str
) -> None:
    metrics = Metrics()
    metrics.observe(Observation(name=name, value=value, labels=labels))
    assert values(metrics)[sample] == value


def test_steps_and_results() -> None:
    metrics = Metrics()
    metrics.observe_step({"reward_mean": 0.5, "grad_norm": None, "phase": "adapt"})
    metrics.observe_result({"probe_before": 2.0, "probe_after": 1.5}, {"rollout_tokens": 7}, 100)
    found = values(metrics)
    assert found["imprint_adaptation_steps_total"] == 1
    assert found["imprint_adaptation_reward_bucket|le=0.5"] == 1
    assert found["imprint_adaptation_reward_bucket|le=0.4"] == 0
    assert found["imprint_adaptation_grad_norm_count"] == 0
    assert found["imprint_adaptation_probe_gain_nats_bucket|le=0.5"] == 1
    assert found["imprint_adaptation_rollout_tokens_total"] == 7


class Worker:
    heartbeat_age_s = 0.5

    def __init__(self, name: str, up: bool, restarts: dict[str, int], stats: WorkerStats) -> None:
        self.name, self.up, self.restarts = name, up, restarts
        self.stats = Heartbeat(time=0.0, stats=stats)


def test_workers_are_summed_and_restarts_counted_once() -> None:
    metrics = Metrics()
    stats = WorkerStats(
        adaptations_running=2,
        slots_used=1,
        slots_free=3,
        adapters={"host": 2, "disk": 5},
        adapter_bytes={"host": 10},
    )
    workers: list[object] = [
        Worker("a", True, {"crashed": 2}, stats),
        Worker("b", True, {}, stats),
        Worker("c", False, {}, stats),
    ]
    values(metrics, workers)
    found = values(metrics, workers)
    assert found["imprint_slots|state=free"] == 6
    assert found["imprint_adapters|tier=host"] == 4
    assert found["imprint_adapters|tier=disk"] == 5  # one folder, shared
    assert found["imprint_worker_up|worker=c"] == 0
    assert found["imprint_worker_adaptations|state=running|worker=b"] == 2
    assert found["imprint_worker_restarts_total|reason=crashed"] == 2


def test_gauges_of_a_tier_return_to_zero() -> None:
    metrics = Metrics()
    full = WorkerStats(adapters={"host": 2}, adapter_bytes={"host": 10})
    values(metrics, [Worker("a", True, {}, full)])
    found = values(metrics, [Worker("a", True, {}, WorkerStats())])
    assert found["imprint_adapters|tier=host"] == 0
    assert found["imprint_adapter_bytes|tier=host"] == 0
