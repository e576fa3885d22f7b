"""One trace from the HTTP request to the last token, and none where nobody asked for one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from imprint.server.app import create_app
from imprint.server.config import Settings
from imprint.server.messages import SpanRecord, Spans
from imprint.server.otel import OtelTracer, otlp_tracer
from imprint.server.work_trace import MAX_SPANS, WorkTrace

CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{CLIENT_TRACE}-b7ad6b7169203331-01"
ANSWER = {"document": "A bell rang.", "questions": ["When?"]}


def span_id(traceparent: str) -> int:
    return int(traceparent.split("-")[2], 16)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_one_trace_holds_request_jobs_and_what_the_worker_reports(
    settings: Settings, pool: Any
) -> None:
    exporter = InMemorySpanExporter()
    tracer = OtelTracer(exporter)
    app = create_app(settings, pool, tracer)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        headers = {"traceparent": TRACEPARENT, "X-Request-Id": "mine-1"}
        reply = await client.post("/v1/answers", json=ANSWER, headers=headers)
        assert reply.status_code == 200, reply.text
        assert (await client.get("/health/ready")).status_code == 200
        (generate,) = pool.generates
        assert pool.on_span is not None
        pool.on_span(
            SpanRecord(traceparent=generate.traceparent, name="decode", began=10.0, ended=12.5)
        )
    tracer.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /v1/answers", "adaptation", "generate", "decode"}
    ids = {name: span.context.span_id for name, span in spans.items() if span.context}
    parents = {name: span.parent.span_id for name, span in spans.items() if span.parent}
    assert {span.context.trace_id for span in spans.values() if span.context} == {
        int(CLIENT_TRACE, 16)
    }
    assert parents["POST /v1/answers"] == span_id(TRACEPARENT)
    assert parents["adaptation"] == parents["generate"] == ids["POST /v1/answers"]
    assert parents["decode"] == ids["generate"] == span_id(generate.traceparent)
    assert ids["adaptation"] == span_id(pool.adapts[0].traceparent)
    assert generate.http_request == pool.adapts[0].http_request == "mine-1"
    assert spans["decode"].end_time - spans["decode"].start_time == 2_500_000_000
    http = spans["POST /v1/answers"].attributes
    assert http["http.response.status_code"] == 200
    assert http["imprint.request_id"] == "mine-1"
    assert spans["adaptation"].attributes["imprint.outcome"] == "succeeded"


@pytest.mark.anyio
async def test_nothing_is_traced_by_default(client: httpx.AsyncClient, pool: Any) -> None:
    reply = await client.post("/v1/answers", json=ANSWER, headers={"traceparent": TRACEPARENT})
    assert reply.status_code == 200
    assert pool.generates[0].traceparent == pool.adapts[0].traceparent == ""


def test_the_server_starts_without_opentelemetry() -> None:
    code = "import sys, imprint.server.serve as s; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_collector_that_is_gone_does_not_hold_up_the_end() -> None:
    tracer = otlp_tracer("http://127.0.0.1:1")
    tracer.record(SpanRecord(traceparent=TRACEPARENT, name="decode", began=1.0, ended=2.0))
    began = time.monotonic()
    tracer.close(timeout_s=0.1)
    assert time.monotonic() - began < 2.5  # it would try for ten seconds


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def trace(traceparent: str) -> tuple[WorkTrace, list[SpanRecord]]:
    told: list[SpanRecord] = []
    emit: Callable[[Spans], None] = lambda spans: told.extend(spans.values)  # noqa: E731
    return WorkTrace(traceparent, emit, Clock()), told


def test_quanta_of_a_phase_are_one_span() -> None:
    work, told = trace(TRACEPARENT)
    work.quantum("read", 0, 1.0, 2.0, 64)
    work.quantum("read", 0, 5.0, 6.0, 32)  # others ran in between
    work.quantum("rollout", 1, 6.0, 7.0, 8)
    work.close()
    assert [span.name for span in told] == ["read", "rollout"]
    read = told[0]
    assert read.ended - read.began == pytest.approx(5.0)
    assert read.attributes == {
        "imprint.step": 0, "imprint.quanta": 2, "imprint.tokens": 96, "imprint.busy_seconds": 2.0
    }  # fmt: skip


def test_a_sequence_has_a_prefill_and_a_decode() -> None:
    work, told = trace(TRACEPARENT)
    work.activated(1.0)
    for now in (2.0, 3.0, 4.0):
        work.token("0", now, 17)
    work.sequence_done("0", 4.0, 3, "length")
    prefill, decode = told
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.ended == decode.began
    assert decode.ended - decode.began == pytest.approx(2.0)
    assert decode.attributes["imprint.tokens"] == 3


def test_a_long_study_has_a_bounded_number_of_spans() -> None:
    work, told = trace(TRACEPARENT)
    for step in range(10 * MAX_SPANS):
        work.quantum("backward", step, step, step + 1, 1)
    work.close()
    assert len(told) == MAX_SPANS + 1
    assert told[-1].name == "rest"
    assert sum(int(span.attributes["imprint.quanta"]) for span in told) == 10 * MAX_SPANS


def test_untraced_work_tells_nothing() -> None:
    work, told = trace("")
    work.add("queue", 0.0, 1.0)
    work.quantum("read", 0, 1.0, 2.0, 64)
    work.activated(2.0)
    work.token("0", 3.0, 1)
    work.sequence_done("0", 3.0, 1, "stop")
    work.close()
    assert told == []
