"""One generate request: sent to the pool, its messages turned into text, timed and counted.

Knows messages and strings; knows nothing of documents, journals or HTTP.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from imprint.models.tokenizer import DecodeStream, Tokenizer
from imprint.server import messages
from imprint.server.errors import DeadlineError, WorkFailedError
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
    reward_mean: float | None


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token of a text, with log-probabilities in nats."""

    id: int
    offset: int
    """Where its text begins, in characters of the generated text."""
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of the prompt number `index`."""

    index: int
    text: str
    tokens: list[TokenInfo] = field(default_factory=list)
    """The tokens that begin in it, where log-probabilities are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The whole outcome of the prompt number `index`."""

    index: int
    text: str
    finish_reason: str
    usage: dict[str, Any]
    adapted: bool
    focus: dict[str, Any] | None
    tokens: list[TokenInfo]
    """All of its tokens, where log-probabilities are asked for."""


@dataclass(slots=True)
class GrowingText:
    """Text of one prompt as it grows; with `strip`, without whitespace at either end."""

    index: int
    strip: bool
    pieces: DecodeStream | None = None
    """Tells where each token's text begins; None where nobody asks for tokens."""
    tokens: list[TokenInfo] = field(default_factory=list)
    num_decoded: int = 0
    num_told: int = 0
    num_dropped: int = 0
    """Characters of the whitespace before the text."""
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
            self.num_dropped += len(grown) - len(grown.lstrip())
            grown = grown.lstrip()
        shown = grown.rstrip()
        self.held = grown[len(shown) :]
        self.text += shown
        return shown

    def note(self, token: messages.TokenDelta) -> None:
        """Remember a token's place and log-probabilities."""
        if self.pieces is None or token.logprobs is None:
            return
        logprobs = token.logprobs
        info = TokenInfo(token.token_id, self.num_decoded, logprobs.logprob, logprobs.top)
        self.tokens.append(info)
        self.num_decoded += len(self.pieces.step(token.token_id) or "")

    def tell(self) -> list[TokenInfo]:
        """The tokens that begin in the text shown so far and were not told yet."""
        end, first = self.num_dropped + len(self.text), self.num_told
        while self.num_told < len(self.tokens) and self.tokens[self.num_told].offset < end:
            self.num_told += 1
        return self.tokens[first : self.num_told]


class Generation:
    """Runs one `Generate` message."""

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        work: messages.Generate,
        tokenizer: Tokenizer,
        spend: Callable[[int], None],
        *,
        kind: str,
        strip: bool,
    ) -> None:
        """`spend` is told the number of tokens made, also of a request that was given up."""
        self._tokenizer = tokenizer
        self._pool = pool
        self._metrics = metrics
        self._work = work
        self._spend = spend
        self._kind = kind
        self._strip = strip
        self._texts: dict[str, GrowingText] = {}
        self._began_at = time.monotonic()
        self._shown = False
        self._phase = "queue"
        """Where the request was when it was last heard of; see `DeadlineError`."""

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
        num_open, self._phase = len(self._work.prompts), "queue"
        self._texts = {
            prompt.sequence_id: GrowingText(
                index,
                self._strip,
                None if self._work.logprobs is None else self._tokenizer.decode_stream(),
            )
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
            raise DeadlineError("the request took too long", self._phase) from None
        except StopAsyncIteration:
            raise WorkFailedError("internal_error", "the worker's messages ended early") from None

    def _events(self, message: object) -> list[FocusStep | Delta | Finished]:
        match message:
            case messages.FocusProgress(step=step, steps=steps, data=data):
                self._phase = "quantum"
                return [FocusStep(step, steps, data.get("reward_mean"))]
            case messages.TokenDelta(sequence_id=id, text=text) as token:
                sequence = self._texts[id]
                self._phase = "decode"
                self._time_token(sequence)
                sequence.note(token)
                return self._show(sequence, text)
            case messages.SequenceDone(sequence_id=id) as done:
                sequence = self._texts[id]
                deltas = self._show(sequence, done.text)
                return [*deltas, self._finish(sequence, done)]
            case messages.RequestFailed(code="deadline_exceeded", message=text, phase=phase):
                raise DeadlineError(text, phase)
            case messages.RequestFailed(code=code, message=text):
                raise WorkFailedError(code, text)
        return []

    def _show(self, sequence: GrowingText, text: str) -> list[FocusStep | Delta | Finished]:
        shown = sequence.add(text)
        self._shown = self._shown or bool(shown)
        return [Delta(sequence.index, shown, sequence.tell())] if shown else []

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
            tokens=sequence.tokens[: sequence.num_told],
        )


def usage_of(prompt: int, completion: int, document: int) -> dict[str, Any]:
    """Usage in the OpenAI shape; the document counts as prompt tokens that were cached."""
    return {
        "prompt_tokens": prompt + document,
        "completion_tokens": completion,
        "total_tokens": prompt + document + completion,
        "prompt_tokens_details": {"cached_tokens": document},
    }


def add_usage(done: Iterable[Finished], *, num_choices: int = 1) -> dict[str, Any]:
    """The sum over prompts, each counted once for its choices; a document that several prompts
    share is counted for each."""
    prompt = cached = completion = 0
    for finished in done:
        completion += finished.usage["completion_tokens"]
        if finished.index % num_choices == 0:
            prompt += finished.usage["prompt_tokens"]
            cached += finished.usage["prompt_tokens_details"]["cached_tokens"]
    return usage_of(prompt - cached, completion, cached)


def aimed(work: messages.Generate, adapter_id: str | None, deadline: float) -> messages.Generate:
    """The work with its adapter, and with what is left of its time."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise DeadlineError("the deadline passed before the answer began", "queue")
    return msgspec.structs.replace(work, adapter_id=adapter_id, timeout_s=left_s)
