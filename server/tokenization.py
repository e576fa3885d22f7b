"""Prompts as token ids, and back, as completions would read them. Starts no work."""

import asyncio

from imprint.models.tokenizer import Tokenizer
from imprint.server.completions import chat_prompt
from imprint.server.config import Settings
from imprint.server.errors import InvalidRequestError
from imprint.server.intake import Intake
from imprint.server.openai_schemas import Detokenize, Tokenize


class Tokenization:
    """The tokenizer behind the door's checks."""

    def __init__(self, settings: Settings, intake: Intake, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._intake = intake
        self._tokenizer = tokenizer

    async def tokenize(self, body: Tokenize, owner: str) -> list[int]:
        """Ids of the prompt as the model would read it: after a document where `model` names one.

        Raises InvalidRequestError for a prompt that is too long for a completion.
        """
        continues = await self._adapted(body.model, owner)
        text, param = body.prompt, "prompt"
        if text is None:
            text, param = await chat_prompt(self._tokenizer, body.messages or ()), "messages"
        tokens = await asyncio.to_thread(self._tokenizer.encode, text, continues=continues)
        self._check_length(len(tokens), param)
        return tokens

    async def detokenize(self, body: Detokenize, owner: str) -> str:
        """The text of the ids; raises InvalidRequestError for one that is not in the vocabulary."""
        await self._adapted(body.model, owner)
        self._check_length(len(body.tokens), "tokens")
        size, largest = self._tokenizer.vocab_size, max(body.tokens, default=0)
        if largest >= size:
            raise InvalidRequestError(
                f"tokens holds {largest}; the vocabulary has {size}", param="tokens"
            )
        return await asyncio.to_thread(self._tokenizer.decode, body.tokens)

    async def _adapted(self, model: str | None, owner: str) -> bool:
        return model is not None and await self._intake.model_adapter(model, owner) is not None

    def _check_length(self, num_tokens: int, param: str) -> None:
        limit = self._settings.max_document_tokens
        if num_tokens > limit:
            raise InvalidRequestError(
                f"{param} has {num_tokens} tokens; at most {limit} are allowed",
                code="context_length_exceeded",
                param=param,
            )
