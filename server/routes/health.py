"""Health, version and metrics: what probes, dashboards and people look at."""

import platform
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from imprint import __version__
from imprint.server.errors import OverloadedError
from imprint.server.host import look_around
from imprint.server.reply_schemas import Alive, Health, Version
from imprint.server.routes.described import described
from imprint.server.services import FromApp

router = APIRouter()


@router.get("/health/live", **described(Alive))
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/health/ready", **described(Alive))
async def ready(services: FromApp) -> dict[str, str]:
    """A worker has loaded the model and its heartbeat is young; otherwise 503."""
    services.jobs.refuse_when_draining()
    if not services.pool.ready:
        if any("unusable_model" in worker.restarts for worker in services.pool.workers()):
            message = "the workers cannot load the model; the server's log says why"
            raise OverloadedError(message, code="unusable_model", retry_after_s=30)
        raise OverloadedError("no worker is ready yet", code="not_ready")
    return {"status": "ready"}


@router.get("/health", **described(Health))
async def health(services: FromApp) -> dict[str, Any]:
    """The whole picture, always 200: workers, queues, model."""
    info = services.pool.info
    draining = services.jobs.draining
    status = "draining" if draining else "ready" if services.pool.ready else "not_ready"
    return {
        "status": status,
        "version": __version__,
        "model": services.settings.served_model_name,
        "device": None if info is None else info.device,
        "num_parameters": None if info is None else info.num_parameters,
        "adaptations": services.jobs.num_active,
        "requests": services.intake.num_requests,
        "workers": [
            {
                "name": worker.name,
                "up": worker.up,
                "heartbeat_age_s": round(worker.heartbeat_age_s, 3),
                "restarts": worker.restarts,
            }
            for worker in services.pool.workers()
        ],
    }


@router.get("/version", **described(Version))
async def version(services: FromApp) -> dict[str, str]:
    """Versions of the server and of what it runs on."""
    return {
        "version": __version__,
        "model": services.settings.served_model_name,
        "python": platform.python_version(),
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(services: FromApp) -> Response:
    """Prometheus text."""
    info = services.pool.info
    if info is not None:
        labels = {"device": info.device, "dtype": info.dtype}
        name = services.settings.served_model_name
        services.metrics.model_info.labels(model=name, **labels).set(1)
    services.metrics.observe_host(look_around(services.settings.data_dir))
    text = services.metrics.render(services.pool.workers())
    return Response(text, media_type=CONTENT_TYPE_LATEST)
