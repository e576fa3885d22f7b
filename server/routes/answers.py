"""`/v1/answers`: questions about a document, answered at once or as a stream."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from imprint.server.auth import Owner
from imprint.server.replays import IDEMPOTENT, IdempotentRoute
from imprint.server.reply_schemas import Answers
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.schemas import CreateAnswers
from imprint.server.services import FromApp, Services
from imprint.server.streams import encode_event, open_stream, until_disconnect

router = APIRouter(route_class=IdempotentRoute)


@router.post(
    "/v1/answers",
    dependencies=[*JSON_BODY, IDEMPOTENT],
    **described(Answers, 404, 409, 410, 504, stream="Progress, text and, last, the whole reply."),
)
async def create(
    body: CreateAnswers, request: Request, owner: Owner, services: FromApp
) -> Response:
    """Read the document where that is still to be done, study it for the questions, answer them."""
    if body.stream:
        chunks = _chunks(services, body, owner)
        return await open_stream(request, chunks, services.settings)
    return JSONResponse(await until_disconnect(request, _last(services, body, owner)))


async def _last(services: Services, body: CreateAnswers, owner: str) -> dict[str, Any]:
    reply: dict[str, Any] = {}
    async with aclosing(services.answers.answer(body, owner)) as events:
        async for event in events:
            reply = event
    return reply


async def _chunks(
    services: Services, body: CreateAnswers, owner: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(services.answers.answer(body, owner)) as events:
        async for event in events:
            yield encode_event(event)
