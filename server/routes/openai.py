"""What completions and chat completions answer with: one reply, or its chunks. Does no work; the
two routes say how each of them writes a choice."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from imprint.server.completions import Accepted, Events
from imprint.server.config import Settings
from imprint.server.generation import Delta, Finished, add_usage
from imprint.server.openai_replies import head
from imprint.server.openai_schemas import Sampling
from imprint.server.streams import encode_event, open_stream, until_disconnect

Choice = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Writing:
    """How a route writes what happens."""

    id: str
    reply: str
    """`object` of a reply."""
    chunk: str
    """`object` of a chunk."""
    whole: Callable[[Finished], Choice]
    """A choice of a reply."""
    pieces: Callable[[Accepted | Delta | Finished], list[Choice]]
    """The choices that an event puts into chunks, one a chunk."""


async def answer(
    request: Request, body: Sampling, events: Events, writing: Writing, settings: Settings
) -> Response:
    """The response, as JSON or as server-sent events."""
    if body.stream:
        return await open_stream(request, _chunks(body, events, writing), settings)
    return JSONResponse(await until_disconnect(request, _reply(body, events, writing)))


async def _reply(body: Sampling, events: Events, writing: Writing) -> dict[str, Any]:
    async with aclosing(events):
        done = [event async for event in events if isinstance(event, Finished)]
    done.sort(key=lambda finished: finished.index)
    choices = [writing.whole(finished) for finished in done]
    usage = add_usage(done, num_choices=body.n)
    return {**head(writing.id, writing.reply, body.model), "choices": choices, "usage": usage}


async def _chunks(body: Sampling, events: Events, writing: Writing) -> AsyncGenerator[bytes, None]:
    first = head(writing.id, writing.chunk, body.model)
    extra: dict[str, Any] = {"usage": None} if body.include_usage else {}
    done: list[Finished] = []
    async with aclosing(events):
        async for event in events:
            for choice in writing.pieces(event):
                yield encode_event({**first, "choices": [choice], **extra})
            if isinstance(event, Finished):
                done.append(event)
    if body.include_usage:
        usage = add_usage(done, num_choices=body.n)
        yield encode_event({**first, "choices": [], "usage": usage})
