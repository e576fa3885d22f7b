"""The ASGI app: routes, middleware and the one error shape. Knows no processes: a pool is given."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from imprint import __version__
from imprint.server import openapi
from imprint.server.admission import Admission
from imprint.server.auth import RequireKey
from imprint.server.config import Settings
from imprint.server.errors import (
    NOT_JSON,
    STATUS_CODES,
    ImprintError,
    OverloadedError,
    error_body,
    validation_error,
)
from imprint.server.journal_file import JournalUnavailableError
from imprint.server.keys import KeyRing
from imprint.server.limits import Limits
from imprint.server.metrics import Metrics
from imprint.server.middleware import CLIENT_CLOSED_REQUEST, BodyLimit, HeadLimit, RequestRecord
from imprint.server.places import Share
from imprint.server.pool_interface import Pool
from imprint.server.routes import (
    adaptations,
    adapters,
    answers,
    chat,
    completions,
    documents,
    health,
    models,
    page,
    studies,
    tokenization,
)
from imprint.server.security import CrossOrigin, OwnPagesOnly, SecurityHeaders
from imprint.server.services import Services
from imprint.server.streams import ClientDisconnectedError
from imprint.server.tracing import NO_SPAN, Tracer, use_span

logger = logging.getLogger(__name__)
ROUTES = (
    documents,
    adaptations,
    adapters,
    studies,
    answers,
    completions,
    chat,
    tokenization,
    models,
    health,
)
"""Modules of routes, in the order in which they are asked and described."""


class _App(FastAPI):
    """FastAPI with the request record outermost, so that it sees the answer to a crash as well."""

    metrics: Metrics
    tracer: Tracer | None
    keyed: bool

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        if self.openapi_schema is None:
            self.openapi_schema = openapi.complete(super().openapi(), keyed=self.keyed)
        return self.openapi_schema

    def build_middleware_stack(self) -> ASGIApp:
        guarded = SecurityHeaders(super().build_middleware_stack())
        return RequestRecord(guarded, self.metrics, self.tracer)


def create_app(settings: Settings, pool: Pool, tracer: Tracer | None = None) -> FastAPI:
    """The app. Its lifespan starts the pool, takes up unfinished jobs and, at the end, closes both.

    `app.state.services` holds the services while it lives. Raises KeysError for a file of keys
    that cannot be used.
    """
    keys = settings.key_ring()
    metrics = Metrics()
    limits = Limits(
        metrics,
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        share=Share(settings.max_key_share if len(keys.names) > 1 else 1.0),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if tracer is not None:
            pool.on_span = tracer.record
        with use_span(NO_SPAN if tracer is None else tracer.roots()):
            services = await Services.start(settings, pool, metrics, limits)
        app.state.services = services
        try:
            yield
        finally:
            await services.close()

    app = _App(
        title="Imprint",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # its page loads scripts from elsewhere; /openapi.json is served
        redoc_url=None,
        # as they were declared: `include_router` would make each of them again, for each app
        routes=[route for module in ROUTES for route in module.router.routes],
    )
    app.metrics, app.tracer, app.keyed = metrics, tracer, bool(keys)
    _add_guards(app, settings, keys, limits)
    app.include_router(page.page_router())
    app.add_exception_handler(ImprintError, _imprint_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ClientDisconnectedError, _client_gone)
    app.add_exception_handler(JournalUnavailableError, _journal_error)
    app.add_exception_handler(Exception, _crash)
    return app


def _add_guards(app: FastAPI, settings: Settings, keys: KeyRing, limits: Limits) -> None:
    """What a request passes before a route. The last one added is the first one asked."""
    app.add_middleware(
        BodyLimit,
        max_body_bytes=settings.max_body_bytes,
        upload_timeout_s=settings.upload_timeout_s,
    )
    app.add_middleware(Admission)
    app.add_middleware(
        RequireKey, keys=keys, limits=limits, metrics_need_key=settings.metrics_need_key
    )
    if not keys:
        app.add_middleware(
            OwnPagesOnly,
            origins=settings.cors_origins,
            host=settings.host,
            any_host=settings.allow_keyless,
        )
    if settings.cors_origins:
        app.add_middleware(CrossOrigin, origins=settings.cors_origins)
    app.add_middleware(HeadLimit, max_head_bytes=settings.max_head_bytes)


async def _imprint_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ImprintError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, message, headers = error.status_code, str(error.detail), error.headers
    code = STATUS_CODES.get(status, "http_error")
    if status == 405:
        headers = {"Allow": _methods_of(request)}
        message = f"this path takes {headers['Allow']}"
    elif status == 404 and message == HTTPStatus.NOT_FOUND.phrase:
        message = "there is no such route; /openapi.json describes all of them"
    elif status == 400 and isinstance(error.__cause__, ValueError | RecursionError):
        message, code = NOT_JSON, "invalid_json"  # FastAPI's error for a body that it cannot parse
    return JSONResponse(error_body(status, message, code=code), status_code=status, headers=headers)


def _methods_of(request: Request) -> str:
    """All methods of the path: each is a route of its own, and the router names those of one."""
    routes = iter_route_contexts(request.app.routes)
    path = request.scope["path"]
    here = [route.methods or set() for route in routes if route.path_regex.fullmatch(path)]
    return ", ".join(sorted(set().union(*here)))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _imprint_error(request, validation_error(error.errors()))


async def _journal_error(request: Request, error: Exception) -> Response:
    """The disk is full or gone: nothing was promised, and later it may work."""
    logger.error("the journal cannot be written: %s", error)
    message = "the server cannot write its journal; try again later"
    refusal = OverloadedError(message, code="journal_unavailable", retry_after_s=30)
    return await _imprint_error(request, refusal)


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # for the log: nobody reads it


async def _crash(_: Request, __: Exception) -> Response:
    body = error_body(500, "the server failed on this request", code="internal_error")
    return JSONResponse(body, status_code=500)
