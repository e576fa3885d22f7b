"""Requests as many clients send them: concurrent, never retried, timed to the first and last token.

Knows the HTTP interface; knows nothing of plans or targets. Limit: pieces of text are timed as they
are parsed here, which adds what a busy generator adds; `Open loop` reports how late it sent.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from imprint.server.client import TERMINAL_STATUSES
from imprint.server.client_errors import ApiError, BadReplyError, api_error, failure
from imprint.server.sse import parse_events

POLL_S = 0.25
TIMEOUT_S = 600.0
DONE = "[DONE]"
KEEP_S = 1.0
"""Idle connections are given up before the server does so, which a request could run into."""
BROKEN = "connection_broke"


@dataclass(slots=True, kw_only=True)
class Answered:
    """One question from its arrival to its end. Seconds."""

    error: str | None = None
    """The code of what refused or failed it."""
    first_s: float = 0.0
    """From the arrival to the first text."""
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    """Between pieces of text; mostly a token each."""
    num_tokens: int = 0
    adapted: bool = False


@dataclass(slots=True, kw_only=True)
class Studied:
    """One adaptation from its arrival to its end. Seconds."""

    id: str | None = None
    status: str = ""
    error: str | None = None
    total_s: float = 0.0
    num_tokens: int = 0


class Traffic:
    """Sends to one server."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.made: list[str] = []
        """Ids of the adaptations that were made here."""

    # ---- documents ---------------------------------------------------------------------------

    async def submit(self, document: str, method: dict[str, Any], seed: int = 0) -> str:
        """Hand in a document; the adaptation's id. Raises ApiError."""
        body = {"document": document, "method": method, "seed": seed}
        response = await self._http.post("/v1/adaptations", json=body)
        if not response.is_success:
            raise failure(response)
        id = str(response.json()["id"])
        self.made.append(id)
        return id

    async def end_of(self, id: str) -> dict[str, Any]:
        """The adaptation, once it has ended."""
        while True:
            job = await self.adaptation(id)
            if job["status"] in TERMINAL_STATUSES:
                return job
            await asyncio.sleep(POLL_S)

    async def adaptation(self, id: str) -> dict[str, Any]:
        """The adaptation as it is."""
        response = await self._http.get(f"/v1/adaptations/{id}")
        if not response.is_success:
            raise failure(response)
        job: dict[str, Any] = response.json()
        return job

    async def cancel(self, id: str) -> None:
        """Stop an adaptation, and wait for its end."""
        await self._http.post(f"/v1/adaptations/{id}/cancel")
        await self.end_of(id)

    async def delete(self, id: str) -> None:
        """Forget an adaptation; one that is gone already is fine."""
        response = await self._http.delete(f"/v1/adaptations/{id}")
        if not response.is_success and response.status_code != httpx.codes.NOT_FOUND:
            raise failure(response)

    async def study(self, document: str, method: dict[str, Any]) -> Studied:
        """A document from arrival to end, by the server's clock where it was accepted."""
        try:
            id = await self.submit(document, method)
            job = await self.end_of(id)
        except ApiError as error:
            return Studied(error=error.code)
        except httpx.TransportError:
            return Studied(error=BROKEN)
        return Studied(
            id=id,
            status=job["status"],
            error=(job.get("error") or {}).get("code"),
            total_s=job["finished_at"] - job["created_at"],
            num_tokens=(job.get("result") or {}).get("num_tokens", 0),
        )

    # ---- questions ---------------------------------------------------------------------------

    async def ask(
        self, adaptation: str, question: str, max_tokens: int, *, late_s: float = 0.0
    ) -> Answered:
        """A question, streamed. `late_s`: how long ago it should have been sent."""
        body = {
            "adaptation": adaptation,
            "questions": [question],
            "focus": False,
            "max_tokens": max_tokens,
            "stream": True,
        }
        answered, began, last = Answered(), time.perf_counter() - late_s, None
        try:
            async with self._http.stream("POST", "/v1/answers", json=body) as response:
                async for event in _events(response):
                    now = time.perf_counter()
                    kind = event.get("object")
                    if kind not in ("answer.delta", "answer.done"):
                        continue
                    if last is None:
                        answered.first_s = now - began
                    elif kind == "answer.delta":
                        answered.gaps_s.append(now - last)
                    last = now
                    if kind == "answer.done":
                        answered.num_tokens = event["usage"]["completion_tokens"]
                        answered.adapted = event["adapted"]
        except ApiError as error:
            answered.error = error.code
        except httpx.TransportError:
            answered.error = BROKEN
        answered.total_s = time.perf_counter() - began
        return answered

    async def complete(self, model: str, prompts: list[str], max_tokens: int, seed: int) -> int:
        """Sampled continuations of the base model; the number of tokens. Raises ApiError."""
        body = {
            "model": model,
            "prompt": prompts,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "seed": seed,
        }
        response = await self._http.post("/v1/completions", json=body)
        if not response.is_success:
            raise failure(response)
        return int(response.json()["usage"]["completion_tokens"])

    async def base_model(self) -> str:
        """The name of the base model."""
        response = await self._http.get("/v1/models")
        if not response.is_success:
            raise failure(response)
        return str(response.json()["data"][0]["id"])


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream. Raises ApiError for a refusal, and for an error in mid-stream."""
    if not response.is_success:
        await response.aread()
        raise failure(response)
    async for line in response.aiter_lines():
        # one line a event is what this server sends
        for event in parse_events([line, ""]):
            if event.data == DONE:
                return
            record = json.loads(event.data)
            if set(record) == {"error"}:
                raise api_error(record, status=200)
            yield record
    raise BadReplyError("the server ended a stream before it was complete")


@asynccontextmanager
async def traffic_to(url: str, *, connections: int) -> AsyncIterator[Traffic]:
    """Traffic over at most so many connections at once; more wait for one."""
    limits = httpx.Limits(
        max_connections=connections,
        max_keepalive_connections=connections,
        keepalive_expiry=KEEP_S,
    )
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as http:
        yield Traffic(http)
