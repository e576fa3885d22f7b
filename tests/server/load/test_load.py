"""The load generator: arrivals, figures, and one small run against a real server."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from imprint.server.commands.bench_serve import TARGETS, table
from imprint.server.load.arrivals import document, plan, poisson, question
from imprint.server.load.benchmark import LoadBenchmark, run_load_benchmark
from imprint.server.load.figures import percentile, ratio, spread
from imprint.server.load.open_loop import OpenLoop, Outcomes, figures_of
from imprint.server.load.served import Readings
from imprint.server.load.targets import Effort
from imprint.server.load.traffic import Answered
from imprint.server.step_times import QUANTUM, WINDOW_S, StepTimes


def test_arrivals_are_a_poisson_process_of_their_seed() -> None:
    arrivals = poisson(20.0, 500.0, "question", 3)
    assert arrivals == poisson(20.0, 500.0, "question", 3)
    assert arrivals != poisson(20.0, 500.0, "question", 4)
    assert [a.number for a in arrivals] == list(range(len(arrivals)))
    assert len(arrivals) == pytest.approx(10_000, abs=5 * math.sqrt(10_000))
    times = [0.0, *(a.at_s for a in arrivals)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    longer = sum(gap > 1 / 20 for gap in gaps) / len(gaps)
    assert longer == pytest.approx(math.exp(-1), abs=0.03)  # exponential gaps
    assert poisson(0.0, 500.0, "document", 3) == []


def test_a_plan_has_both_kinds_in_order() -> None:
    both = plan(question_rate=5.0, document_rate=1.0, duration_s=50.0, seed=1)
    assert [a.at_s for a in both] == sorted(a.at_s for a in both)
    assert {a.kind for a in both} == {"question", "document"}
    assert document(100, 1) == document(100, 1) != document(100, 2)
    assert question(1) == question(1)


def test_figures() -> None:
    values = [float(i) for i in range(1, 101)]
    assert spread(values) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert percentile([3.0, 1.0], 0.5) == 1.0
    assert spread([]) == {}
    assert ratio([1.0, 4.0, 3.0], [2.0, 2.0, 3.0]) == {"median": 1.0, "min": 0.5, "max": 2.0}
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_readings_sum_what_has_the_labels() -> None:
    text = (
        "# TYPE imprint_hits counter\n"
        'imprint_hits_total{tier="host",worker="0"} 2\n'
        'imprint_hits_total{tier="host",worker="1"} 3\n'
        'imprint_hits_total{tier="disk",worker="0"} 5\n'
    )
    readings = Readings(text)
    assert readings.sum("hits_total", tier="host") == 5
    assert readings.by("hits_total", "worker") == {"0": 7, "1": 3}
    assert readings.sum("nothing") == 0


def test_the_longest_quantum_is_forgotten_after_a_while() -> None:
    now = 0.0
    times = StepTimes(clock=lambda: now)

    def quantum(duration_s: float) -> None:
        nonlocal now
        with times.whole(), times.part(QUANTUM):
            now += duration_s

    quantum(0.3)
    quantum(0.1)
    assert times.longest_quantum_s == pytest.approx(0.3)
    now = WINDOW_S + 0.1
    quantum(0.2)
    assert times.longest_quantum_s == pytest.approx(0.3)
    now = 2 * WINDOW_S + 0.1
    assert times.longest_quantum_s == pytest.approx(0.2)
    now = 9 * WINDOW_S
    assert times.longest_quantum_s == 0
    (spent,) = times.take()
    assert (spent.labels, spent.value) == ({"part": QUANTUM}, pytest.approx(0.6))


def test_refusals_are_timed_apart_from_failures() -> None:
    outcomes = Outcomes(
        answered=[
            Answered(error="queue_full", total_s=0.01),
            Answered(error="queue_full", total_s=0.03),
            Answered(error="worker_died", total_s=9.0),
            Answered(total_s=1.0, first_s=0.5, num_tokens=4),
        ],
        last_answer=14.0,
        last_study=10.0,
    )
    found = figures_of(outcomes, 10.0)
    assert found["refused_or_failed"] == {"queue_full": 2, "worker_died": 1}
    assert found["refusal_s"] == {"p50": 0.01, "p95": 0.03, "p99": 0.03, "max": 0.03}
    assert found["answers_per_s"] == 0.25
    assert found["answer_s"]["max"] == 1.0


@pytest.mark.slow
def test_a_small_run(tiny_checkpoint: Path) -> None:
    config = LoadBenchmark(
        url=None,
        model=tiny_checkpoint,
        revision="",
        threads=1,
        host_bytes=100_000,
        num_studied=3,
        num_many=12,
        load=OpenLoop(
            question_rate=10.0,
            document_rate=1.0,
            duration_s=2.0,
            warm_up_s=0.2,
            document_tokens=64,
            max_tokens=4,
            method={"type": "read"},
            seed=0,
        ),
        effort=Effort(
            rounds=1,
            questions=4,
            max_tokens=4,
            waits=4,
            wait_rate=20.0,
            background_tokens=600,
            seed=0,
        ),
    )
    said: list[str] = []
    numbers: dict[str, Any] = run_load_benchmark(config, said.append)
    assert json.loads(json.dumps(numbers)) == numbers
    loop = numbers["open_loop"]
    assert loop["refused_or_failed"] == {}
    assert loop["questions"] > 0
    assert set(loop["time_to_first_text_s"]) == {"p50", "p95", "p99", "max"}
    assert {"api", "worker-0"} <= loop["peak_memory_bytes"].keys()
    throughput = numbers["throughput"]
    shares = throughput["share_with_delta"]
    assert (shares["many_documents"], shares["no_deltas"]) == (1.0, 0.0)
    assert throughput["adapters_found"]["disk"] > 0
    assert numbers["waiting"]["longest_quantum_s"] > 0
    assert 0 < numbers["own_time"]["own_share"]["value"] < 1
    assert numbers["own_time"]["mean_batch_size"] > 16
    lines = list(table(numbers))
    assert all(any(title in line for line in lines) for title, *_ in TARGETS)
    assert said[0] == "starting a server"
