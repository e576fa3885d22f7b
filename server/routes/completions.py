"""`/v1/completions` in the OpenAI shape."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from imprint.server.auth import Owner
from imprint.server.generation import Delta, Finished, add_usage
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.schemas import CreateCompletion
from imprint.server.services import FromApp, Services
from imprint.server.streams import encode_event, open_stream, until_disconnect

router = APIRouter()


@router.post("/v1/completions", dependencies=JSON_BODY, response_model=None)
async def create(
    body: CreateCompletion, request: Request, owner: Owner, services: FromApp
) -> Response:
    """Continue the prompts, after the document of an adaptation where `model` names one."""
    id = f"cmpl_{secrets.token_hex(12)}"
    if body.stream:
        chunks = _chunks(services, body, id, owner)
        return await open_stream(request, chunks, services.settings)
    return JSONResponse(await until_disconnect(request, _whole(services, body, id, owner)))


async def _whole(services: Services, body: CreateCompletion, id: str, owner: str) -> dict[str, Any]:
    done: list[Finished] = []
    async with aclosing(services.answers.complete(body, id, owner)) as events:
        async for event in events:
            if isinstance(event, Finished):
                done.append(event)
    done.sort(key=lambda finished: finished.index)
    choices = [_choice(finished.index, finished.text, finished.finish_reason) for finished in done]
    usage = add_usage([finished.usage for finished in done])
    return {**_head(id, body), "choices": choices, "usage": usage}


async def _chunks(
    services: Services, body: CreateCompletion, id: str, owner: str
) -> AsyncGenerator[bytes, None]:
    """The first, empty chunk says that the request was accepted."""
    head = _head(id, body)
    usages: list[dict[str, Any]] = []
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    async with aclosing(services.answers.complete(body, id, owner)) as events:
        async for event in events:
            choice = _choice(0, "", None)
            if isinstance(event, Delta):
                choice = _choice(event.index, event.text, None)
            elif isinstance(event, Finished):
                usages.append(event.usage)
                choice = _choice(event.index, "", event.finish_reason)
            yield encode_event({**head, "choices": [choice], **extra})
    if with_usage:
        yield encode_event({**head, "choices": [], "usage": add_usage(usages)})


def _head(id: str, body: CreateCompletion) -> dict[str, Any]:
    return {"id": id, "object": "text_completion", "created": int(time.time()), "model": body.model}


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": None}
