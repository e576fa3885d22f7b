"""`/v1/adaptations`: create, get, list, events, cancel, delete."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from imprint.server.auth import Owner
from imprint.server.errors import InvalidRequestError
from imprint.server.journal import Journal
from imprint.server.records import AdaptationRow, EventRow
from imprint.server.replays import IDEMPOTENT, IdempotentRoute
from imprint.server.replies import adaptation_object, event_object, list_object
from imprint.server.reply_schemas import Adaptation, AdaptationEvent, Deleted, Page
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.schemas import CreateAdaptation
from imprint.server.services import FromApp, Services
from imprint.server.streams import encode_event, open_stream

router = APIRouter(prefix="/v1/adaptations", route_class=IdempotentRoute)

Limit = Annotated[int, Query(ge=1, le=100)]
Sequence = Annotated[int, Query(ge=0, le=2**62)]
Accept = Annotated[str, Header(include_in_schema=False)]


@router.post(
    "",
    dependencies=[*JSON_BODY, IDEMPOTENT],
    **described(Adaptation, 404, 409, status=202, also=200),
)
async def create(body: CreateAdaptation, owner: Owner, services: FromApp) -> JSONResponse:
    """Accept a document for adaptation: 202 and the new job, or 200 and the one that exists."""
    new, tokens = await services.intake.adaptation(body, owner)
    row, is_new = await services.jobs.create(new, tokens)
    location = {"Location": f"/v1/adaptations/{row.id}"}
    return JSONResponse(
        _object(services, row), status_code=202 if is_new else 200, headers=location
    )


@router.get("", **described(Page[Adaptation], 404))
async def page(
    owner: Owner, services: FromApp, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """Adaptations, newest first; `after` is the last id of the page before."""
    if after is not None:
        await services.jobs.get(after, owner, param="after")
    rows = await services.journal(Journal.page, owner, after=after, limit=limit + 1)
    data = [_object(services, row) for row in rows[:limit]]
    return list_object(data, has_more=len(rows) > limit)


@router.get("/{id}", **described(Adaptation, 404))
async def get(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """One adaptation."""
    return _object(services, await services.jobs.get(id, owner))


@router.post("/{id}/cancel", **described(Adaptation, 404))
async def cancel(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """Stop it between two quanta. One that has ended stays as it is."""
    return _object(services, await services.jobs.cancel(id, owner))


@router.delete("/{id}", **described(Deleted, 404))
async def delete(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """Free it: answers when no memory and no file holds it any more."""
    await services.retention.delete(id, owner)
    return {"id": id, "object": "adaptation", "deleted": True}


@router.get(
    "/{id}/events",
    **described(Page[AdaptationEvent], 404, stream="Events and progress, as they happen."),
)
async def events(
    id: str,
    request: Request,
    owner: Owner,
    services: FromApp,
    limit: Limit = 100,
    after: Sequence = 0,
    accept: Accept = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """What happened to it: a page behind number `after`, or, for `Accept: text/event-stream`, all
    of it as it happens, behind `Last-Event-ID`."""
    await services.jobs.get(id, owner)
    if "text/event-stream" in accept:
        if last_event_id is not None:
            after = _number(last_event_id)
        chunks = _chunks(services, id, owner, after)
        return await open_stream(request, chunks, services.settings)
    rows = await services.journal(Journal.events, id, after=after, limit=limit + 1)
    data = [event_object(row) for row in rows[:limit]]
    return JSONResponse(list_object(data, has_more=len(rows) > limit, key="sequence"))


async def _chunks(
    services: Services, id: str, owner: str, after: int
) -> AsyncGenerator[bytes, None]:
    async with aclosing(services.events.follow(id, owner, after=after)) as feed:
        async for event in feed:
            if isinstance(event, EventRow):
                yield encode_event(event_object(event), id=event.sequence)
            else:
                progress = {"object": "adaptation.event", "kind": "progress", "data": event}
                yield encode_event(progress)


def _number(last_event_id: str) -> int:
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 18):
        raise InvalidRequestError(
            "Last-Event-ID must be the number of an event", param="Last-Event-ID"
        )
    return int(last_event_id)


def _object(services: Services, row: AdaptationRow) -> dict[str, Any]:
    return adaptation_object(row, services.jobs.active(row.id), services.jobs.finish_s(row.id))
