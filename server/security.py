"""What browsers are told, and which of their requests are refused. Knows headers only.

Without keys nothing else tells a person's own client from a web page that the person happens to
have open: such a page may neither post across origins nor reach the server under a name of its own.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imprint.server.auth import refuse
from imprint.server.errors import ForbiddenError, error_body

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Of every response whose handler did not set its own: replies hold documents, and are no pages."""
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class SecurityHeaders:
    """Adds SECURITY_HEADERS to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_marked)


class CrossOrigin(CORSMiddleware):
    """CORS for an allow list; a preflight that is refused has the one error shape."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "Idempotency-Key", "Last-Event-ID", "X-Request-Id"),
            expose_headers=("Location", "Retry-After", "X-Request-Id"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """What the browser asks before it sends a request of another origin's page."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        reason = bytes(response.body).decode()
        body = error_body(response.status_code, reason, code="origin_not_allowed")
        return JSONResponse(body, status_code=response.status_code, headers={"Vary": "Origin"})


class OwnPagesOnly:
    """For a server without keys: refuses what a foreign web page sends (403)."""

    def __init__(
        self, app: ASGIApp, origins: tuple[str, ...], host: str, *, any_host: bool
    ) -> None:
        """`host` is the address listened on; `any_host`: names in front of it are not known."""
        self._app = app
        self._origins = frozenset(origins)
        self._host = host.lower()
        self._any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["method"], Headers(scope=scope))
            except ForbiddenError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._any_host and not self._is_own(_hostname(f"//{host}")):
            raise ForbiddenError(
                "without keys the server answers to localhost and to addresses, "
                "not to other names: see Host",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or method in _SAFE_METHODS or origin in self._origins:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise ForbiddenError(
                "a page of another origin may not send this; see the setting cors_origins",
                code="origin_not_allowed",
            )

    def _is_own(self, name: str) -> bool:
        if name in ("localhost", self._host):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # an address needs no resolving, so nobody could bend it


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").partition("%")[0]
    except ValueError:
        return ""
