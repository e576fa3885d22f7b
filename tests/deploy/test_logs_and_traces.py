"""What a real server and its worker log and trace: ids that join, and never a document's text."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from support.live_server import LiveServer

pytestmark = pytest.mark.slow
CANARY = "zanzibar"
DOCUMENT = f"The word is {CANARY}, and nobody says it twice. " * 30
TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"X-Request-Id": "mine-1", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@dataclass(frozen=True)
class Told:
    """Everything that left the server beside its answers."""

    log: str
    spans: list[Any]
    metrics: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines()]


class Collector(ThreadingHTTPServer):
    """As much of an OpenTelemetry collector as keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        super().__init__(("127.0.0.1", 0), _Take)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def told(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("told")
    with collector() as receiver:
        flags = ["--model", str(tiny_checkpoint), "--otlp-endpoint", receiver.endpoint]
        flags += ["--log-format", "json", "--log-level", "debug"]
        with LiveServer(folder / "data", *flags) as server:
            server.wait_until_ready()
            use(server.http, folder / "data" / "adapters")
            metrics = server.http.get("/metrics").text
        # the server has ended, and has sent what it had
        return Told(server.log.read_text("utf-8"), list(receiver.spans), metrics)


def use(http: httpx.Client, adapters: Path) -> None:
    """An answer, and everything that may go wrong with a document in hand."""
    ask = {"document": DOCUMENT, "questions": [f"Who says {CANARY}?"], "max_tokens": 4}
    focus = {"steps": 1}
    reply = http.post("/v1/answers", json={**ask, "focus": focus}, headers=HEADERS)
    assert reply.is_success, reply.text
    text = json.dumps({"document": DOCUMENT})
    json_body = {"Content-Type": "application/json"}
    refused = [
        http.post("/v1/answers", content=text[:-5], headers=json_body),
        http.post("/v1/answers", json={**ask, CANARY: 1}),
        http.post("/v1/answers", json={**ask, "questions": [{CANARY: CANARY}]}),
        http.post("/v1/adaptations", json={"document": DOCUMENT, "method": {"type": CANARY}}),
        http.post("/v1/adaptations", json={"document": DOCUMENT * 40_000}),
    ]
    assert {answer.status_code for answer in refused} <= {400, 413}
    (path,) = adapters.glob("*.safetensors")
    path.write_bytes(CANARY.encode() * 100)  # damaged: memory still has it, the next start not
    study = {"type": "refine", "steps": 1, "positions": 2, "group_size": 2, "lora_rank": 2}
    job = http.post("/v1/adaptations", json={"document": DOCUMENT, "method": study}).json()
    assert http.delete(f"/v1/adaptations/{job['id']}").is_success


def test_every_line_is_json_with_who_and_when(told: Told) -> None:
    for line in told.lines:
        assert {"time", "level", "logger", "process", "message"} <= set(line)
    assert {line["process"] for line in told.lines} == {"api", "worker-0.1"}


def test_no_text_of_a_document_or_question_leaves(told: Told) -> None:
    assert CANARY not in told.log
    assert CANARY not in told.metrics
    assert CANARY not in "".join(str(span) for span in told.spans)


def test_ids_join_the_request_with_its_jobs_in_every_process(told: Told) -> None:
    mine = [line for line in told.lines if line.get("request_id") == "mine-1"]
    access = [line for line in mine if line["logger"] == "imprint.server.access"]
    assert [line["path"] for line in access] == ["/v1/answers"]
    arrived = [line for line in mine if line["process"] == "worker-0.1"]
    jobs = [id for line in arrived for id in line["job_ids"]]
    assert [id.partition("_")[0] for id in jobs] == ["adp", "ans"]
    ended = [line for line in mine if line["logger"] == "imprint.server.job_run"]
    assert [line["job_ids"] for line in ended] == [jobs[:1]]


def test_one_trace_reaches_from_the_request_to_the_last_token(told: Told) -> None:
    spans = [span for span in told.spans if span.trace_id.hex() == TRACE]
    names = [span.name for span in spans]
    wanted = {"POST /v1/answers", "adaptation", "queue", "read", "generate", "prefill", "decode"}
    assert wanted <= set(names)
    assert any(name.startswith("focus_") for name in names)
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        if span.name != "POST /v1/answers":
            parent = by_id[span.parent_span_id]
            slack_ns = 5_000_000  # two processes, one clock, different rounding
            assert parent.start_time_unix_nano - slack_ns <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano + slack_ns
    parents = {span.name: by_id[span.parent_span_id].name for span in spans if span.name in wanted
               and span.name != "POST /v1/answers"}  # fmt: skip
    assert parents["read"] == "adaptation"
    assert parents["decode"] == parents["prefill"] == "generate"
