"""`/v1/completions` in the OpenAI shape."""

import secrets
from typing import Any

from fastapi import APIRouter, Request, Response

from imprint.server.auth import Owner
from imprint.server.completions import Accepted
from imprint.server.generation import Delta, Finished, TokenInfo
from imprint.server.openai_replies import completion_choice, completion_logprobs
from imprint.server.openai_schemas import CreateCompletion
from imprint.server.reply_schemas import Completion
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.routes.openai import Choice, Writing, answer
from imprint.server.services import FromApp

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

    def logprobs(tokens: list[TokenInfo]) -> dict[str, Any] | None:
        return None if body.logprobs is None else completion_logprobs(services.tokenizer, tokens)

    def whole(done: Finished) -> Choice:
        return completion_choice(done.index, done.text, done.finish_reason, logprobs(done.tokens))

    def pieces(event: Accepted | Delta | Finished) -> list[Choice]:
        match event:
            case Accepted():  # an empty chunk, which says that the request was accepted
                return [completion_choice(0, "", None, None)]
            case Delta(index=index, text=text, tokens=tokens):
                return [completion_choice(index, text, None, logprobs(tokens))]
            case Finished(index=index, finish_reason=reason):
                return [completion_choice(index, "", reason, None)]

    id = f"cmpl_{secrets.token_hex(12)}"
    events = services.completions.complete(body, id, owner)
    writing = Writing(id, KIND, KIND, whole, pieces)
    return await answer(request, body, events, writing, services.settings)
