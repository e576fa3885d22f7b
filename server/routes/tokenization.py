"""`/v1/tokenize` and `/v1/detokenize`, in the shapes of vLLM."""

from typing import Any

from fastapi import APIRouter

from imprint.server.auth import Owner
from imprint.server.openai_replies import token_text
from imprint.server.openai_schemas import Detokenize, Tokenize
from imprint.server.reply_schemas import Detokenized, Tokenized
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.services import FromApp

router = APIRouter()


@router.post("/v1/tokenize", dependencies=JSON_BODY, **described(Tokenized, 404, 409, 410))
async def tokenize(body: Tokenize, owner: Owner, services: FromApp) -> dict[str, Any]:
    """The tokens of a prompt or a conversation, as a completion of this model would read them."""
    tokens = await services.tokenization.tokenize(body, owner)
    texts: list[str] | None = None
    if body.return_token_strs:
        texts = [token_text(services.tokenizer, id) for id in tokens]
    return {
        "count": len(tokens),
        "max_model_len": services.settings.max_document_tokens,
        "tokens": tokens,
        "token_strs": texts,
    }


@router.post("/v1/detokenize", dependencies=JSON_BODY, **described(Detokenized, 404, 409, 410))
async def detokenize(body: Detokenize, owner: Owner, services: FromApp) -> dict[str, Any]:
    """The text of tokens. Special tokens have none; a character that is not whole is U+FFFD."""
    return {"prompt": await services.tokenization.detokenize(body, owner)}
