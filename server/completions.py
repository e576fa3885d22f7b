"""Completions and chat completions: which adapter, which prompts, what is generated. No HTTP.

The two differ in how a body becomes prompts; all else is the same work.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from imprint.server.openai_schemas import CreateChatCompletion, CreateCompletion, Sampling
from imprint.server.pool_interface import Pool
from imprint.server.retention import Retention
from imprint.server.schemas import parse_focus


@dataclass(frozen=True, slots=True)
class Accepted:
    """Nothing is wrong with the request; what follows may take a while."""


Events = AsyncGenerator[Accepted | Delta | Finished, None]


@dataclass(frozen=True, slots=True)
class _Asked:
    """In what the two kinds of completions differ."""

    param: str
    """Field of the body that holds the prompts."""
    prompts: Callable[[], Awaitable[list[str] | list[list[int]]]]
    max_tokens: int | None
    num_logprobs: int | None
    stops: list[str]
    focus: bool | dict[str, Any] = False
    strip: bool = True
    """Whether whitespace around the text is cut off."""


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

    def complete(self, body: CreateCompletion, request_id: str, owner: str) -> Events:
        """Text and outcomes of the prompts, once accepted. Closing the generator cancels them."""

        async def prompts() -> list[str] | list[list[int]]:
            return body.prompts

        longest, num_logprobs = body.max_tokens, body.logprobs
        asked = _Asked("prompt", prompts, longest, num_logprobs, body.stops, strip=False)
        return self._run(body, asked, request_id, owner)

    def chat(self, body: CreateChatCompletion, request_id: str, owner: str) -> Events:
        """The reply's text and outcome, once accepted. Closing the generator cancels it."""

        async def prompts() -> list[str] | list[list[int]]:
            return [await chat_prompt(self._tokenizer, body.messages)]

        longest, num_logprobs = body.longest, body.num_logprobs
        asked = _Asked("messages", prompts, longest, num_logprobs, body.stops, body.focus)
        return self._run(body, asked, request_id, owner)

    async def _run(self, body: Sampling, asked: _Asked, request_id: str, owner: str) -> Events:
        deadline = time.monotonic() + self._settings.request_timeout_s
        with self._intake.request("completion", owner):
            adapter = await self._intake.model_adapter(body.model, owner)
            focus = parse_focus(asked.focus, has_encoder=self._intake.has_encoder)
            if focus is not None and adapter is None:
                raise InvalidRequestError(
                    "focus goes with a document: name one as <base>:<id> in model", param="focus"
                )
            work = Generate(
                request_id=request_id,
                prompts=await self._intake.prompts(
                    await asked.prompts(),
                    owner,
                    param=asked.param,
                    seed=secrets.randbits(62) if body.seed is None else body.seed,
                    continues=adapter is not None,
                    num_choices=body.n,
                ),
                max_tokens=self._intake.max_tokens(asked.max_tokens),
                temperature=body.temperature,
                top_p=body.top_p,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logprobs=asked.num_logprobs,
                stop=asked.stops,
                focus=focus,
            )
            events = self._generate(work, adapter, owner, deadline, strip=asked.strip)
            async with aclosing(events):
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
