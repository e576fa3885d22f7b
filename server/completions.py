"""Completions and chat completions: which adapter, which prompts, what is generated. No HTTP.

The two differ in how a body becomes prompts; from there on they are the same work.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from imprint.models.errors import CheckpointError
from imprint.models.prompts import ChatMessage
from imprint.models.tokenizer import Tokenizer
from imprint.server.config import Settings
from imprint.server.errors import InvalidRequestError, WorkFailedError, clip
from imprint.server.generation import Delta, Finished, FocusStep, Generation, aimed
from imprint.server.intake import Intake
from imprint.server.messages import Generate
from imprint.server.metrics import Metrics
from imprint.server.openai_schemas import ChatMessage as AskedMessage
from imprint.server.openai_schemas import CreateChatCompletion, CreateCompletion
from imprint.server.pool_interface import Pool
from imprint.server.retention import Retention
from imprint.server.schemas import parse_focus


@dataclass(frozen=True, slots=True)
class Accepted:
    """Nothing is wrong with the request; what follows may take a while."""


Events = AsyncGenerator[Accepted | Delta | Finished, None]


class Completions:
    """Text in the OpenAI shapes."""

    def __init__(
        self,
        settings: Settings,
        retention: Retention,
        intake: Intake,
        pool: Pool,
        tokenizer: Tokenizer,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._retention = retention
        self._intake = intake
        self._pool = pool
        self._tokenizer = tokenizer
        self._metrics = metrics

    async def complete(self, body: CreateCompletion, request_id: str, owner: str) -> Events:
        """Text and outcomes of the prompts, once accepted. Closing the generator cancels them."""
        deadline = time.monotonic() + self._settings.request_timeout_s
        with self._intake.request("completion", owner):
            adapter = await self._intake.model_adapter(body.model, owner)
            work = Generate(
                request_id=request_id,
                prompts=await self._intake.prompts(
                    body.prompts,
                    owner,
                    param="prompt",
                    seed=_seed(body.seed),
                    continues=adapter is not None,
                    num_choices=body.n,
                ),
                max_tokens=self._intake.max_tokens(body.max_tokens),
                temperature=body.temperature,
                top_p=body.top_p,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logprobs=body.logprobs,
                stop=body.stops,
            )
            async with aclosing(
                self._generate(work, adapter, owner, deadline, strip=False)
            ) as events:
                async for event in events:
                    yield event

    async def chat(self, body: CreateChatCompletion, request_id: str, owner: str) -> Events:
        """The reply's text and outcome, once accepted. Closing the generator cancels it."""
        deadline = time.monotonic() + self._settings.request_timeout_s
        with self._intake.request("completion", owner):
            adapter = await self._intake.model_adapter(body.model, owner)
            focus = parse_focus(body.focus)
            if focus is not None and adapter is None:
                raise InvalidRequestError(
                    "focus goes with a document: name one as <base>:<id> in model", param="focus"
                )
            work = Generate(
                request_id=request_id,
                prompts=await self._intake.prompts(
                    [await chat_prompt(self._tokenizer, body.messages)],
                    owner,
                    param="messages",
                    seed=_seed(body.seed),
                    continues=adapter is not None,
                    num_choices=body.n,
                ),
                max_tokens=self._intake.max_tokens(body.longest),
                temperature=body.temperature,
                top_p=body.top_p,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logprobs=body.num_logprobs,
                stop=body.stops,
                focus=focus,
            )
            async with aclosing(
                self._generate(work, adapter, owner, deadline, strip=True)
            ) as events:
                async for event in events:
                    yield event

    async def _generate(
        self, work: Generate, adapter: str | None, owner: str, deadline: float, *, strip: bool
    ) -> Events:
        work = aimed(work, adapter, deadline)
        yield Accepted()
        spend = partial(self._intake.limits.spend_tokens, owner)
        generation = Generation(
            self._pool,
            self._metrics,
            work,
            self._tokenizer,
            spend,
            kind="completion",
            strip=strip,
        )
        try:
            async with self._retention.using(adapter), aclosing(generation.run()) as events:
                async for event in events:
                    if not isinstance(event, FocusStep):
                        yield event
        except WorkFailedError as error:
            raise await self._retention.lost(adapter, error) from None


async def chat_prompt(tokenizer: Tokenizer, asked: Sequence[AskedMessage]) -> str:
    """The prompt of a conversation; raises InvalidRequestError where the template refuses it."""
    messages: list[ChatMessage] = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        for message in asked
    ]
    try:
        return await asyncio.to_thread(tokenizer.format_chat, messages)
    except CheckpointError as error:
        raise InvalidRequestError(
            f"the model's template refuses these messages: {clip(str(error))}", param="messages"
        ) from None


def _seed(asked: int | None) -> int:
    return secrets.randbits(62) if asked is None else asked
