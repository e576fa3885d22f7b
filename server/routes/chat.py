"""`/v1/chat/completions` in the OpenAI shape."""

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from imprint.server.auth import Owner
from imprint.server.completions import Accepted
from imprint.server.generation import Delta, Finished, TokenInfo, add_usage
from imprint.server.openai_replies import chat_choice, chat_delta, chat_logprobs, head
from imprint.server.openai_schemas import CreateChatCompletion
from imprint.server.reply_schemas import ChatCompletion
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.services import FromApp, Services
from imprint.server.streams import encode_event, open_stream, until_disconnect

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    dependencies=JSON_BODY,
    **described(ChatCompletion, 404, 409, 410, 504, stream="Chunks in the OpenAI shape."),
)
async def create(
    body: CreateChatCompletion, request: Request, owner: Owner, services: FromApp
) -> Response:
    """Reply to a conversation, about the document of an adaptation where `model` names one."""
    id = f"chatcmpl-{secrets.token_hex(12)}"
    if body.stream:
        chunks = _chunks(services, body, id, owner)
        return await open_stream(request, chunks, services.settings)
    return JSONResponse(await until_disconnect(request, _whole(services, body, id, owner)))


async def _whole(
    services: Services, body: CreateChatCompletion, id: str, owner: str
) -> dict[str, Any]:
    done: list[Finished] = []
    async with aclosing(services.completions.chat(body, id, owner)) as events:
        async for event in events:
            if isinstance(event, Finished):
                done.append(event)
    done.sort(key=lambda finished: finished.index)
    choices = [
        chat_choice(
            finished.index,
            finished.text,
            finished.finish_reason,
            _logprobs(services, body, finished.tokens),
        )
        for finished in done
    ]
    usage = add_usage(done, num_choices=body.n)
    return {**head(id, "chat.completion", body.model), "choices": choices, "usage": usage}


async def _chunks(
    services: Services, body: CreateChatCompletion, id: str, owner: str
) -> AsyncGenerator[bytes, None]:
    """Each choice begins with its role, which also says that the request was accepted."""
    first = head(id, "chat.completion.chunk", body.model)
    extra: dict[str, Any] = {"usage": None} if body.include_usage else {}
    done: list[Finished] = []
    async with aclosing(services.completions.chat(body, id, owner)) as events:
        async for event in events:
            for choice in _choices(services, body, event):
                yield encode_event({**first, "choices": [choice], **extra})
            if isinstance(event, Finished):
                done.append(event)
    if body.include_usage:
        usage = add_usage(done, num_choices=body.n)
        yield encode_event({**first, "choices": [], "usage": usage})


def _choices(
    services: Services, body: CreateChatCompletion, event: Accepted | Delta | Finished
) -> list[dict[str, Any]]:
    match event:
        case Accepted():
            begin = {"role": "assistant", "content": ""}
            return [chat_delta(index, begin) for index in range(body.n)]
        case Delta(index=index, text=text, tokens=tokens):
            logprobs = _logprobs(services, body, tokens)
            return [chat_delta(index, {"content": text}, logprobs=logprobs)]
        case Finished(index=index, finish_reason=reason):
            return [chat_delta(index, {}, reason)]


def _logprobs(
    services: Services, body: CreateChatCompletion, tokens: list[TokenInfo]
) -> dict[str, Any] | None:
    return chat_logprobs(services.tokenizer, tokens) if body.logprobs else None
