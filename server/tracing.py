"""The span that work belongs to, and what a trace is to those who are traced: nothing, mostly.

Knows no OpenTelemetry: `otel.py` makes real spans where traces are sent anywhere. The current span
follows asyncio's tasks; it is never set inside an async generator, which runs in many contexts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from imprint.server.messages import SpanRecord

Value = str | int | float | bool


class TracingError(RuntimeError):
    """Traces are asked for and cannot be made; the message says what is missing."""


class Span(Protocol):
    """A piece of work with a beginning and an end, part of a trace."""

    @property
    def traceparent(self) -> str:
        """For another process: W3C `traceparent`; empty where nothing is traced."""

    def child(self, name: str, attributes: Mapping[str, Value]) -> "Span":
        """Begin a part of this work."""

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Say more about it."""

    def end(self, error: str = "") -> None:
        """It is done; `error` is a code where it failed."""


class Tracer(Protocol):
    """Makes traces and sends them."""

    def request(self, method: str, headers: Mapping[str, str]) -> Span:
        """Begin the span of an HTTP request, in its client's trace where the headers name one."""

    def roots(self) -> Span:
        """A span that is none: its children begin traces of their own."""

    def record(self, record: SpanRecord) -> None:
        """Take in a span that a worker has measured."""

    def close(self) -> None:
        """Send what is left, for a bounded time."""


class _NoSpan:
    traceparent = ""

    def child(self, name: str, attributes: Mapping[str, Value]) -> Span:
        return self

    def set(self, attributes: Mapping[str, Value]) -> None:
        pass

    def end(self, error: str = "") -> None:
        pass


NO_SPAN: Span = _NoSpan()

_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def current_span() -> Span:
    """The span of the request that this task serves, or that began it."""
    return _current.get()


@contextmanager
def use_span(span: Span) -> Iterator[None]:
    """Make `span` the current one, for this task and for those it starts."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)
