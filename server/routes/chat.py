"""`/v1/chat/completions` in the OpenAI shape."""

import secrets
from typing import Any

from fastapi import APIRouter, Request, Response

from imprint.server.auth import Owner
from imprint.server.completions import Accepted
from imprint.server.generation import Delta, Finished, TokenInfo
from imprint.server.openai_replies import chat_choice, chat_delta, chat_logprobs
from imprint.server.openai_schemas import CreateChatCompletion
from imprint.server.reply_schemas import ChatCompletion
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.routes.openai import Choice, Writing, answer
from imprint.server.services import FromApp

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

    def logprobs(tokens: list[TokenInfo]) -> dict[str, Any] | None:
        return chat_logprobs(services.tokenizer, tokens) if body.logprobs else None

    def whole(done: Finished) -> Choice:
        return chat_choice(done.index, done.text, done.finish_reason, logprobs(done.tokens))

    def pieces(event: Accepted | Delta | Finished) -> list[Choice]:
        match event:
            case Accepted():  # each choice begins with its role
                begin = {"role": "assistant", "content": ""}
                return [chat_delta(index, begin) for index in range(body.n)]
            case Delta(index=index, text=text, tokens=tokens):
                return [chat_delta(index, {"content": text}, logprobs=logprobs(tokens))]
            case Finished(index=index, finish_reason=reason):
                return [chat_delta(index, {}, reason)]

    id = f"chatcmpl-{secrets.token_hex(12)}"
    events = services.completions.chat(body, id, owner)
    writing = Writing(id, "chat.completion", "chat.completion.chunk", whole, pieces)
    return await answer(request, body, events, writing, services.settings)
