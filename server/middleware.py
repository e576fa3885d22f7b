"""Pure ASGI layers around every request: its id, its log line, its metrics, its body's limit.

`BaseHTTPMiddleware` is not used: it hides a client's hang-up from the handlers.
"""

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imprint.server.auth import refuse
from imprint.server.errors import ImprintError
from imprint.server.logs import log_context
from imprint.server.metrics import Metrics
from imprint.server.tracing import NO_SPAN, Span, Tracer, use_span

logger = logging.getLogger("imprint.server.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a response that nobody waited for; seen in logs and metrics only."""


class RequestRecord:
    """Names, times, counts, traces and logs each request. Never its body."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        began_at = time.monotonic()
        status = CLIENT_CLOSED_REQUEST

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        span = self._span(scope)
        with log_context(request_id=request_id), use_span(span):
            try:
                await self._app(scope, receive, send_named)
            finally:
                self._record(scope, request_id, status, time.monotonic() - began_at, span)

    def _span(self, scope: Scope) -> Span:
        if self._tracer is None or scope["path"] in _PROBES:
            return NO_SPAN
        return self._tracer.request(_method(scope), Headers(scope=scope))

    def _record(
        self, scope: Scope, request_id: str, status: int, passed_s: float, span: Span
    ) -> None:
        # The template, not the path: ids must not become labels.
        route = getattr(scope.get("route"), "path", "unmatched")
        method = _method(scope)
        self._metrics.http_requests.labels(method=method, route=route, status=status).inc()
        self._metrics.http_duration.labels(method=method, route=route).observe(passed_s)
        level = logging.DEBUG if route in _PROBES and status < 400 else logging.INFO
        path = scope["path"][:200]
        fields = {"method": method, "path": path, "status": status, "seconds": round(passed_s, 6)}
        line = "%s %s %d %.3fs %s"
        logger.log(level, line, method, path, status, passed_s, request_id, extra=fields)
        span.set(
            {
                "name": f"{method} {route}",
                "http.route": route,
                "http.response.status_code": status,
                "imprint.request_id": request_id,
            }
        )
        span.end(error=str(status) if status >= 500 else "")


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


_PROBES = frozenset({"/health/live", "/health/ready", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


MIN_UPLOAD_BYTES_PER_S = 16 * 2**10
"""Each that has arrived gives the rest of a body more time."""


class HeadLimit:
    """Refuses a head that is too long, also one that arrived in one piece."""

    def __init__(self, app: ASGIApp, max_head_bytes: int) -> None:
        self._app = app
        self._max_head_bytes = max_head_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
            headers = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if target + headers > self._max_head_bytes:
                message = f"the head of the request is longer than {self._max_head_bytes} bytes"
                error = ImprintError(message, status=431, code="headers_too_large")
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body that is too long: by its declared length at once, else as soon as it is.
    Refuses one that comes too slowly, and one that is compressed, which nothing here would open."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, upload_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._upload_timeout_s = upload_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            error = ImprintError(
                "send the body as it is, without Content-Encoding",
                status=415,
                code="unsupported_media_type",
            )
            await refuse(error, scope, receive, send)
            return
        declared = headers.get("content-length", "0")
        num_bytes, began_at, complete = 0, time.monotonic(), False

        async def receive_bounded() -> Message:
            nonlocal num_bytes, complete
            if complete:
                return await receive()  # what comes now is the client's end
            if declared.isdigit() and int(declared) > self._max_body_bytes:
                raise self._error()
            try:
                until = self._upload_timeout_s + num_bytes / MIN_UPLOAD_BYTES_PER_S
                async with asyncio.timeout(began_at + until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise self._slow_error() from None
            complete = not message.get("more_body", False)
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    raise self._error()
            return message

        await self._app(scope, receive_bounded, send)

    def _error(self) -> HTTPException:
        # Raised inside the app, at its first read: FastAPI passes on this class and no other.
        return HTTPException(413, f"the body is longer than {self._max_body_bytes} bytes")

    def _slow_error(self) -> HTTPException:
        return HTTPException(408, f"the body did not arrive within {self._upload_timeout_s:g} s")
