"""Traces through OpenTelemetry, sent by OTLP over HTTP. Needs the extra `otel`.

The only module that imports OpenTelemetry. Workers measure and report; the API process sends, so
that one process holds the exporter. All `OTEL_*` variables of the SDK work as documented there.
"""

import os
import threading
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span as ApiSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as ApiTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from imprint import __version__
from imprint.server import tracing
from imprint.server.messages import SpanRecord
from imprint.server.tracing import Value

NS = 1_000_000_000
CLOSE_TIMEOUT_S = 3.0

_propagator = TraceContextTextMapPropagator()


class OtelSpan:
    """An OpenTelemetry span that can be told to be a parent."""

    def __init__(self, tracer: ApiTracer, span: ApiSpan) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str:
        """W3C `traceparent`."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(self._span, Context()))
        return carrier.get("traceparent", "")

    def child(self, name: str, attributes: Mapping[str, Value]) -> tracing.Span:
        """Begin a part of this work."""
        parent = set_span_in_context(self._span, Context())
        return OtelSpan(
            self._tracer,
            self._tracer.start_span(name, context=parent, attributes=dict(attributes)),
        )

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes; `name` renames the span."""
        if isinstance(name := attributes.get("name"), str):
            self._span.update_name(name)
        self._span.set_attributes({k: v for k, v in attributes.items() if k != "name"})

    def end(self, error: str = "") -> None:
        """End it now."""
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class _Roots:
    traceparent = ""

    def __init__(self, tracer: ApiTracer) -> None:
        self._tracer = tracer

    def child(self, name: str, attributes: Mapping[str, Value]) -> tracing.Span:
        span = self._tracer.start_span(name, context=Context(), attributes=dict(attributes))
        return OtelSpan(self._tracer, span)

    def set(self, attributes: Mapping[str, Value]) -> None:
        pass

    def end(self, error: str = "") -> None:
        pass


class OtelTracer:
    """A tracer provider of our own: the process-wide one is the embedding program's to set."""

    def __init__(self, exporter: SpanExporter) -> None:
        resource = Resource.create(
            {
                SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "imprint"),
                SERVICE_VERSION: __version__,
            }
        )
        self._exporter = exporter
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(exporter)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("imprint", __version__)

    def request(self, method: str, headers: Mapping[str, str]) -> tracing.Span:
        """Begin the span of an HTTP request, in its client's trace where the headers name one."""
        parent = _propagator.extract(dict(headers), Context())
        span = self._tracer.start_span(
            method, context=parent, kind=SpanKind.SERVER, attributes={"http.request.method": method}
        )
        return OtelSpan(self._tracer, span)

    def roots(self) -> tracing.Span:
        """A span that is none: its children begin traces of their own."""
        return _Roots(self._tracer)

    def record(self, record: SpanRecord) -> None:
        """Take in a span that a worker has measured."""
        parent = _propagator.extract({"traceparent": record.traceparent}, Context())
        span = self._tracer.start_span(
            record.name,
            context=parent,
            attributes=dict(record.attributes),
            start_time=int(record.began * NS),
        )
        span.end(end_time=int(record.ended * NS))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Send what is left, for a bounded time."""
        # In a thread: the processor keeps no time of its own while the exporter tries again.
        flush = threading.Thread(target=self._processor.force_flush, daemon=True)
        flush.start()
        flush.join(timeout_s)
        self._exporter.shutdown()  # ends its attempts
        self._provider.shutdown()


def otlp_tracer(endpoint: str) -> OtelTracer:
    """A tracer that sends to `endpoint`, or, where that is empty, as `OTEL_EXPORTER_OTLP_*` say."""
    url = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
    return OtelTracer(OTLPSpanExporter(endpoint=url))
