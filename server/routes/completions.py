"""`/v1/completions` in the OpenAI shape."""

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from imprint.server.auth import Owner
from imprint.server.generation import Delta, Finished, TokenInfo, add_usage
from imprint.server.openai_replies import completion_choice, completion_logprobs, head
from imprint.server.openai_schemas import CreateCompletion
from imprint.server.reply_schemas import Completion
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.services import FromApp, Services
from imprint.server.streams import encode_event, open_stream, until_disconnect

router = APIRouter()

KIND = "text_completion"


@router.post(
    "/v1/completions",
    dependencies=JSON_BODY,
    **described(Completion, 404, 409, 410, 504, stream="Chunks in the OpenAI shape."),
)
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
    async with aclosing(services.completions.complete(body, id, owner)) as events:
        async for event in events:
            if isinstance(event, Finished):
                done.append(event)
    done.sort(key=lambda finished: finished.index)
    choices = [
        completion_choice(
            finished.index,
            finished.text,
            finished.finish_reason,
            _logprobs(services, body, finished.tokens),
        )
        for finished in done
    ]
    usage = add_usage(done, num_choices=body.n)
    return {**head(id, KIND, body.model), "choices": choices, "usage": usage}


async def _chunks(
    services: Services, body: CreateCompletion, id: str, owner: str
) -> AsyncGenerator[bytes, None]:
    """The first, empty chunk says that the request was accepted."""
    first = head(id, KIND, body.model)
    done: list[Finished] = []
    extra: dict[str, Any] = {"usage": None} if body.include_usage else {}
    async with aclosing(services.completions.complete(body, id, owner)) as events:
        async for event in events:
            choice = completion_choice(0, "", None, None)
            if isinstance(event, Delta):
                logprobs = _logprobs(services, body, event.tokens)
                choice = completion_choice(event.index, event.text, None, logprobs)
            elif isinstance(event, Finished):
                done.append(event)
                choice = completion_choice(event.index, "", event.finish_reason, None)
            yield encode_event({**first, "choices": [choice], **extra})
    if body.include_usage:
        usage = add_usage(done, num_choices=body.n)
        yield encode_event({**first, "choices": [], "usage": usage})


def _logprobs(
    services: Services, body: CreateCompletion, tokens: list[TokenInfo]
) -> dict[str, Any] | None:
    return None if body.logprobs is None else completion_logprobs(services.tokenizer, tokens)
