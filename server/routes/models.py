"""`/v1/models`: the base model, and one model per adaptation that can be asked."""

from typing import Any

from fastapi import APIRouter

from imprint.server.auth import Owner
from imprint.server.journal import Journal
from imprint.server.records import READY, AdaptationRow
from imprint.server.reply_schemas import Model, Models
from imprint.server.routes.described import described
from imprint.server.services import FromApp, Services

router = APIRouter(prefix="/v1/models")

MAX_MODELS = 1000


@router.get("", **described(Models))
async def page(owner: Owner, services: FromApp) -> dict[str, Any]:
    """The base model, then the newest ready adaptations, at most 1000."""
    rows = await services.journal(Journal.page, owner, after=None, limit=MAX_MODELS, statuses=READY)
    data = [_base_card(services), *(_adapted_card(services, row) for row in rows)]
    return {"object": "list", "data": data}


@router.get("/{name:path}", **described(Model, 404, 409, 410))
async def get(name: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """One model: `<base>` or `<base>:<adaptation id>`."""
    id = await services.intake.model_adapter(name, owner)
    if id is None:
        return _base_card(services)
    return _adapted_card(services, await services.jobs.get(id, owner))


def _base_card(services: Services) -> dict[str, Any]:
    info = services.pool.info
    return {
        "id": services.settings.served_model_name,
        "object": "model",
        "created": 0,
        "owned_by": "imprint",
        "parent": None,
        "max_document_tokens": services.settings.max_document_tokens,
        "num_parameters": None if info is None else info.num_parameters,
    }


def _adapted_card(services: Services, row: AdaptationRow) -> dict[str, Any]:
    base = services.settings.served_model_name
    return {
        "id": f"{base}:{row.id}",
        "object": "model",
        "created": int(row.created_at),
        "owned_by": "imprint",
        "parent": base,
        "adapted": row.status == "succeeded" and row.method.get("type") == "refine",
    }
