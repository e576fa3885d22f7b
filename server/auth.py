"""Who asks: the key of a request, checked before anything else of it is read.

Every path needs a key once keys are configured, except those listed here; so a route that is added
is closed until somebody opens it. Knows headers and paths; knows no resources.
"""

from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from imprint.server.errors import ImprintError, UnauthorizedError
from imprint.server.keys import LOCAL_OWNER, KeyRing
from imprint.server.limits import Limits

METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset(
    {"/", "/health", "/health/live", "/health/ready", "/version", "/openapi.json", METRICS_PATH}
)
"""What probes, dashboards and browsers read before they can know a key. Holds no documents."""
OPEN_FOLDERS = ("/static/",)
"""Files of the page, the same for everybody."""


class RequireKey:
    """Refuses a request without a known key, and one too many; sets `state.owner` to whose
    request it is."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing, limits: Limits, *, metrics_need_key: bool
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._open = OPEN_PATHS - ({METRICS_PATH} if metrics_need_key else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                owner = self._owner(scope)
            except ImprintError as error:
                await refuse(error, scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _owner(self, scope: Scope) -> str:
        if scope["path"] in self._open or scope["path"].startswith(OPEN_FOLDERS):
            return ""  # owns nothing
        owner = self._key_owner(scope) if self._keys else LOCAL_OWNER
        self._limits.admit_request(owner)
        return owner

    def _key_owner(self, scope: Scope) -> str:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError("no API key; send it as Authorization: Bearer KEY")
        owner = self._keys.owner_of(key.strip())
        if owner is None:
            raise UnauthorizedError("the API key is not one of this server's")
        return owner


async def refuse(error: ImprintError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error from outside the app, in the one shape."""
    response = JSONResponse(error.body(), status_code=error.status, headers=error.headers())
    await response(scope, receive, send)


async def _owner_of(request: Request) -> str:
    owner: str = request.state.owner
    return owner


Owner = Annotated[str, Depends(_owner_of)]
"""Parameter of a handler: whose request it is. What it makes belongs to this name."""
