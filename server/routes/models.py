"""`/v1/models`: the base model, and one model per adaptation that can be asked."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from imprint.server.auth import Owner
from imprint.server.journal import Journal
from imprint.server.records import IMPORT, READY, AdaptationRow
from imprint.server.replies import list_object
from imprint.server.reply_schemas import Model, Page
from imprint.server.routes.described import described
from imprint.server.services import FromApp, Services

router = APIRouter(prefix="/v1/models")

MAX_MODELS = 1000
"""On a page, and by default: programs written for OpenAI's API ask for no second one."""

Limit = Annotated[int, Query(ge=1, le=MAX_MODELS)]


@router.get("", **described(Page[Model], 404))
async def page(
    owner: Owner, services: FromApp, limit: Limit = MAX_MODELS, after: str | None = None
) -> dict[str, Any]:
    """The base model, then ready adaptations, newest first; `after` is the last id of the page
    before."""
    behind = None if after is None else await _cursor(services, after, owner)
    data = [_base_card(services)] if after is None else []
    rows = await services.journal(
        Journal.page, owner, after=behind, limit=limit + 1 - len(data), statuses=READY
    )
    data += [_adapted_card(services, row) for row in rows]
    return list_object(data[:limit], has_more=len(data) > limit)


async def _cursor(services: Services, after: str, owner: str) -> str | None:
    """The adaptation that a model's id names, also one that is not ready any more; None for the
    base model. Raises NotFoundError."""
    base, _, id = after.partition(":")
    services.intake.check_model(base, param="after")
    return (await services.jobs.get(id, owner, param="after")).id if id else None


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
        "adapted": row.status == "succeeded" and _has_delta(row),
    }


def _has_delta(row: AdaptationRow) -> bool:
    if row.method["type"] == IMPORT:
        return bool((row.result or {}).get("accepted"))
    return bool(row.method["type"] == "refine")
