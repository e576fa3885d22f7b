"""`imprint serve`: the app on a socket, and an orderly end. Knows uvicorn and signals.

The first SIGTERM or SIGINT stops admission and lets running answers finish; the second ends at
once. Either way the workers are gone when `serve` returns.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context
from types import FrameType

import uvicorn
from fastapi import FastAPI

from imprint import __version__
from imprint.adapters import faults
from imprint.adapters.faults import FaultError
from imprint.models.errors import CheckpointError
from imprint.server.app import create_app
from imprint.server.config import Settings, unknown_variables
from imprint.server.journal_file import JournalError, JournalUnavailableError
from imprint.server.keys import KeysError
from imprint.server.launching import LaunchError
from imprint.server.logs import configure_logging
from imprint.server.pool import Pool
from imprint.server.protocol import uvicorn_config
from imprint.server.services import Services
from imprint.server.tracing import Tracer, TracingError

logger = logging.getLogger(__name__)

OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
START_ERRORS = (
    *(CheckpointError, FaultError, JournalError, JournalUnavailableError, KeysError),
    *(LaunchError, TracingError, OSError),
)


class DrainingServer(uvicorn.Server):
    """uvicorn, whose first signal begins a drain."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn's signal handler, in the middle of whatever runs."""
        Context().run(self._end, sig)  # whose request it was does not belong into these lines

    def _end(self, sig: int) -> None:
        services: Services = self._app.state.services
        if services.jobs.draining:
            logger.warning("second signal: ending at once")
            services.jobs.drain(timeout_s=0)
            self.force_exit = True
            self.should_exit = True
            return
        logger.info("%s: finishing the running answers", signal.Signals(sig).name)
        services.jobs.drain()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; uvicorn asks ten times a second."""
        services: Services = self._app.state.services
        if services.jobs.draining:
            idle = services.intake.num_requests == 0
            self.should_exit = self.should_exit or idle or services.jobs.drain_left_s == 0
        return await super().on_tick(counter)


def serve(settings: Settings) -> int:
    """Run until told to stop; the exit status."""
    configure_logging(settings.log_level, settings.log_format, "api")
    for name in unknown_variables():
        logger.warning("%s sets nothing: no setting has this name", name)
    try:
        if planned := faults.parse(os.environ.get(faults.VARIABLE, "")):
            logger.warning("%s: %d faults on purpose will be done", faults.VARIABLE, len(planned))
        refuse_strangers(settings)
        with _tracer(settings) as tracer:
            return asyncio.run(_serve(settings, tracer))
    except START_ERRORS as error:
        logger.error("%s", error)
        return 1


def refuse_strangers(settings: Settings) -> None:
    """Raises KeysError where others can reach the address and nothing asks them for a key."""
    if _is_loopback(settings.host) or settings.key_ring():
        return
    if not settings.allow_keyless:
        raise KeysError(
            f"{settings.host} can be reached by others, and no key is asked for: set "
            "IMPRINT_API_KEYS or --api-keys-file, or say --allow-keyless true where something "
            "else keeps strangers out"
        )
    logger.warning("%s can be reached by others, and no key is asked for", settings.host)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name of this machine


def tracer_of(settings: Settings) -> Tracer | None:
    """What sends traces, where a setting or OpenTelemetry's own variables say where to.

    Raises TracingError where they do and OpenTelemetry is not installed.
    """
    if not settings.otlp_endpoint and not any(os.environ.get(name) for name in OTLP_VARIABLES):
        return None
    try:
        from imprint.server.otel import otlp_tracer
    except ImportError as error:
        raise TracingError(f"traces need pip install 'imprint[otel]': {error}") from None
    return otlp_tracer(settings.otlp_endpoint)


@contextmanager
def _tracer(settings: Settings) -> Iterator[Tracer | None]:
    tracer = tracer_of(settings)
    try:
        yield tracer
    finally:
        if tracer is not None:
            tracer.close()


async def _serve(settings: Settings, tracer: Tracer | None) -> int:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family) as listening:
        app = create_app(settings, Pool(settings.pool_config()), tracer)
        # The lifespan is entered here, so that its errors end the program with a reason.
        async with app.router.lifespan_context(app):
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            model = settings.served_model_name
            logger.info("Imprint %s serves %s on http://%s:%d", __version__, model, shown, port)
            await DrainingServer(app, uvicorn_config(app, settings)).serve(sockets=[listening])
    return 0
