"""One generate request: sent to the pool, its messages turned into text, timed and counted.

Knows messages and strings; knows nothing of documents, journals or HTTP.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from imprint.server import messages
from imprint.server.errors import WorkFailedError
from imprint.server.logs import current_request_id
from imprint.server.metrics import Metrics
from imprint.server.pool_interface import Pool
from imprint.server.tracing import current_span

DEADLINE_GRACE_S = 5.0
"""The worker ends a request at its deadline; this much later the API stops waiting for it."""


@dataclass(frozen=True, slots=True)
class FocusStep:
    """A step of the focus run is done."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of the prompt number `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The whole outcome of the prompt number `index`."""

    index: int
    text: str
    finish_reason: str
    usage: dict[str, Any]
    adapted: bool
    focus: dict[str, Any] | None


@dataclass(slots=True)
class GrowingText:
    """Text of one prompt as it grows; with `strip`, without whitespace at either end."""

    index: int
    strip: bool
    text: str = ""
    held: str = ""
    num_tokens: int = 0
    last_token_at: float = 0.0

    def add(self, text: str) -> str:
        """What may be shown now: whitespace waits until something follows it."""
        if not self.strip:
            self.text += text
            return text
        grown = self.held + text
        if not self.text:
            grown = grown.lstrip()
        shown = grown.rstrip()
        self.held = grown[len(shown) :]
        self.text += shown
        return shown


class Generation:
    """Runs one `Generate` message."""

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        work: messages.Generate,
        spend: Callable[[int], None],
        *,
        kind: str,
        strip: bool,
    ) -> None:
        """`spend` is told the number of tokens made, also of a request that was given up."""
        self._pool = pool
        self._metrics = metrics
        self._work = work
        self._spend = spend
        self._kind = kind
        self._strip = strip
        self._texts: dict[str, GrowingText] = {}
        self._began_at = time.monotonic()
        self._shown = False

    async def run(self) -> AsyncGenerator[FocusStep | Delta | Finished, None]:
        """Events in the order they happen; raises WorkFailedError. Closing it cancels the work.

        A request whose worker died before any text was sent is tried once more.
        """
        for attempt in (1, 2):
            try:
                async with aclosing(self._attempt()) as events:
                    async for event in events:
                        yield event
                return
            except WorkFailedError as error:
                if error.code != "worker_died" or self._shown or attempt == 2:
                    raise

    async def _attempt(self) -> AsyncGenerator[FocusStep | Delta | Finished, None]:
        waiting = self._metrics.waiting.labels(kind=self._kind)
        running = self._metrics.running.labels(kind=self._kind)
        gauge = waiting
        gauge.inc()
        span = current_span().child(
            "generate",
            {"imprint.job": self._work.request_id, "imprint.sequences": len(self._work.prompts)},
        )
        work = msgspec.structs.replace(
            self._work, http_request=current_request_id(), traceparent=span.traceparent
        )
        num_open = len(self._work.prompts)
        self._texts = {
            prompt.sequence_id: GrowingText(index, self._strip)
            for index, prompt in enumerate(self._work.prompts)
        }
        try:
            async with aclosing(self._pool.submit(work)) as stream:
                while num_open:
                    message = await self._next(stream)
                    if gauge is waiting:
                        waiting.dec()
                        gauge = running
                        gauge.inc()
                    for event in self._events(message):
                        num_open -= isinstance(event, Finished)
                        yield event
        except WorkFailedError as error:
            span.set({"error.type": error.code})
            raise
        finally:
            gauge.dec()
            span.end()
            self._spend(sum(text.num_tokens for text in self._texts.values()))

    async def _next(self, stream: AsyncGenerator[messages.WorkMessage, None]) -> object:
        deadline = None
        if self._work.timeout_s is not None:
            deadline = self._work.timeout_s + DEADLINE_GRACE_S - time.monotonic() + self._began_at
        try:
            async with asyncio.timeout(deadline):
                return await anext(stream)
        except TimeoutError:
            raise WorkFailedError("deadline_exceeded", "the request took too long") from None
        except StopAsyncIteration:
            raise WorkFailedError("internal_error", "the worker's messages ended early") from None

    def _events(self, message: object) -> list[FocusStep | Delta | Finished]:
        match message:
            case messages.FocusProgress(step=step, steps=steps):
                return [FocusStep(step, steps)]
            case messages.TokenDelta(sequence_id=id, text=text):
                sequence = self._texts[id]
                self._time_token(sequence)
                return self._show(sequence, text)
            case messages.SequenceDone(sequence_id=id) as done:
                sequence = self._texts[id]
                deltas = self._show(sequence, done.text)
                return [*deltas, self._finish(sequence, done)]
            case messages.RequestFailed(code=code, message=text):
                if code == "deadline_exceeded":
                    self._metrics.deadlines.labels(phase=self._kind).inc()
                raise WorkFailedError(code, text)
        return []

    def _show(self, sequence: GrowingText, text: str) -> list[FocusStep | Delta | Finished]:
        shown = sequence.add(text)
        self._shown = self._shown or bool(shown)
        return [Delta(sequence.index, shown)] if shown else []

    def _time_token(self, sequence: GrowingText) -> None:
        now = time.monotonic()
        if sequence.num_tokens == 0:
            self._metrics.ttft.observe(now - self._began_at)
        else:
            self._metrics.inter_token.observe(now - sequence.last_token_at)
        sequence.num_tokens += 1
        sequence.last_token_at = now

    def _finish(self, sequence: GrowingText, done: messages.SequenceDone) -> Finished:
        prompt = done.usage.get("prompt_tokens", 0)
        completion = done.usage.get("completion_tokens", sequence.num_tokens)
        self._metrics.prompt_tokens.inc(prompt)
        self._metrics.generation_tokens.inc(completion)
        return Finished(
            index=sequence.index,
            text=sequence.text,
            finish_reason=done.finish_reason,
            usage=usage_of(prompt, completion, done.usage.get("document_tokens", 0)),
            adapted=done.adapted,
            focus=done.focus,
        )


def usage_of(prompt: int, completion: int, document: int) -> dict[str, Any]:
    """Usage in the OpenAI shape; the document counts as prompt tokens that were cached."""
    return {
        "prompt_tokens": prompt + document,
        "completion_tokens": completion,
        "total_tokens": prompt + document + completion,
        "prompt_tokens_details": {"cached_tokens": document},
    }


def add_usage(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum over prompts; a document that several share is counted for each."""
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    return usage_of(prompt - cached, sum(u["completion_tokens"] for u in usages), cached)
