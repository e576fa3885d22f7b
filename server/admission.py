"""Refuses work for which there is no room by its head alone: before its body is read.

Under overload most requests end here, so a refusal costs no body, no JSON, no tokens and no
journal. What may be known already goes on, because it is no more work: a request with an
`Idempotency-Key`, and a document short enough to be looked up. Limit: knows paths and counts; what
a body asks for is judged behind it, by `Intake` and `Jobs`, which refuse as well.
"""

from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from imprint.server.auth import refuse
from imprint.server.errors import ImprintError
from imprint.server.services import Services

REQUEST_PATHS: Final = frozenset({"/v1/answers", "/v1/completions", "/v1/chat/completions"})
ADAPTATION_PATHS: Final = frozenset({"/v1/adaptations"})
LOOKED_UP_BYTES: Final = 256 * 2**10
"""A longer body is not read when the queue is full, even if its document may be known."""


@dataclass(frozen=True, slots=True)
class KnownRoute:
    """Names a request that never reaches its route, for logs and metrics."""

    path: str


class Admission:
    """Asks whether there is room, once it is known who asks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._refuse_without_room(scope)
            except ImprintError as error:
                scope["route"] = KnownRoute(scope["path"])
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refuse_without_room(self, scope: Scope) -> None:
        path, headers, owner = scope["path"], Headers(scope=scope), scope["state"]["owner"]
        if "idempotency-key" in headers:
            return
        services: Services = scope["app"].state.services
        if path in REQUEST_PATHS:
            services.intake.refuse_without_room(owner)
        elif path in ADAPTATION_PATHS:
            services.jobs.refuse_when_draining()
            declared = headers.get("content-length", "")
            if declared.isdigit() and int(declared) > LOOKED_UP_BYTES:
                services.jobs.refuse_without_room(owner)
