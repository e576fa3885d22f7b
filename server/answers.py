"""Answers: which adapter, which prompts, in which order. Knows no HTTP.

An answer about a document first sees to its adaptation, then generates once for all its questions.
"""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Any

from imprint.models.tokenizer import Tokenizer
from imprint.server.config import Settings
from imprint.server.errors import ConflictError, ImprintError, NotFoundError, WorkFailedError
from imprint.server.generation import Delta, Finished, FocusStep, Generation, add_usage, aimed
from imprint.server.intake import Intake
from imprint.server.job_run import PROGRESS_FIELDS
from imprint.server.jobs import Jobs
from imprint.server.messages import Generate
from imprint.server.metrics import Metrics
from imprint.server.pool_interface import Pool
from imprint.server.records import READY, AdaptationRow
from imprint.server.replies import adaptation_object, answer_object
from imprint.server.retention import Retention
from imprint.server.schemas import CreateAnswers, parse_focus


class Answers:
    """Everything that ends in generated text."""

    def __init__(
        self,
        settings: Settings,
        jobs: Jobs,
        retention: Retention,
        intake: Intake,
        pool: Pool,
        tokenizer: Tokenizer,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._retention = retention
        self._intake = intake
        self._pool = pool
        self._tokenizer = tokenizer
        self._metrics = metrics

    async def answer(self, body: CreateAnswers, owner: str) -> AsyncGenerator[dict[str, Any], None]:
        """Progress, text and outcomes as JSON objects; the last one is the whole reply.

        What is wrong with the request is raised before the first object. Closing the generator
        cancels what was begun for this answer alone.
        """
        deadline = time.monotonic() + self._timeout_s(body.timeout_s)
        with self._intake.request("answer", owner):
            work = await self._answer_work(body, owner)
            for attempt in (1, 2):
                try:
                    async with aclosing(self._answer_once(body, work, owner, deadline)) as events:
                        async for event in events:
                            yield event
                    return
                except _TryAgainError as error:
                    # Somebody else's cancellation, or an adapter that is gone from the store:
                    # the document is at hand, so it is adapted once more.
                    if attempt == 2:
                        raise error.reason from None

    async def _answer_work(self, body: CreateAnswers, owner: str) -> Generate:
        texts = [self._tokenizer.format_question(question) for question in body.questions]
        prompts = await self._intake.prompts(
            texts, owner, param="questions", seed=body.seed, continues=True
        )
        return Generate(
            request_id=f"ans_{secrets.token_hex(12)}",
            prompts=prompts,
            max_tokens=self._intake.max_tokens(body.max_tokens),
            temperature=body.temperature,
            top_p=body.top_p,
            stop=body.stops,
            focus=parse_focus(body.focus, has_encoder=self._intake.has_encoder),
        )

    async def _answer_once(
        self, body: CreateAnswers, work: Generate, owner: str, deadline: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        if body.adaptation is not None:
            row = await self._intake.ready(body.adaptation, owner, param="adaptation")
            yield _progress({"phase": "queued"})
            events = self._ask(body, row, work, deadline)
        else:
            events = self._adapt_and_ask(body, work, owner, deadline)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _adapt_and_ask(
        self, body: CreateAnswers, work: Generate, owner: str, deadline: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        new, tokens = await self._intake.answer_adaptation(body, owner)
        async with self._jobs.borrow(new, tokens) as row:
            async with aclosing(self._jobs.progress(row.id, deadline)) as steps:
                async for progress in steps:
                    yield _progress({"phase": "queued", **progress})
            row = await self._outcome(row.id, owner)
            async with aclosing(self._ask(body, row, work, deadline)) as events:
                async for event in events:
                    yield event

    async def _outcome(self, id: str, owner: str) -> AdaptationRow:
        """The ended job, if it can be asked."""
        try:
            row = await self._jobs.get(id, owner)
        except NotFoundError as error:
            raise _TryAgainError(error) from None
        if row.status == "failed":
            failure = row.error or {}
            raise WorkFailedError(str(failure.get("code")), str(failure.get("message")))
        if row.status not in READY:
            self._jobs.refuse_when_draining()
            reason = ConflictError(f"the adaptation was {row.status}", code="adaptation_cancelled")
            raise _TryAgainError(reason)
        return row

    async def _ask(
        self, body: CreateAnswers, row: AdaptationRow, work: Generate, deadline: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        work = aimed(work, row.id, deadline)
        spend = partial(self._intake.limits.spend_tokens, row.owner)
        generation = Generation(
            self._pool, self._metrics, work, self._tokenizer, spend, kind="answer", strip=True
        )
        answers: dict[int, dict[str, Any]] = {}
        done: list[Finished] = []
        try:
            async with self._retention.using(row.id), aclosing(generation.run()) as events:
                async for event in events:
                    match event:
                        case FocusStep():
                            yield _progress({"phase": "focus", **asdict(event)})
                        case Delta(index=index, text=text):
                            yield {"object": "answer.delta", "index": index, "text": text}
                        case Finished(index=index):
                            answers[index] = answer_object(body.questions[index], event)
                            done.append(event)
                            yield {"object": "answer.done", **answers[index]}
        except WorkFailedError as error:
            lost = await self._retention.lost(row.id, error)
            if lost is not error and body.adaptation is None:
                raise _TryAgainError(lost) from None
            raise lost from None
        yield {
            "id": work.request_id,
            "object": "answers",
            "created_at": round(time.time(), 3),
            "model": self._settings.served_model_name,
            "adaptation": adaptation_object(row),
            "answers": [answers[index] for index in sorted(answers)],
            "usage": add_usage(done),
        }

    def _timeout_s(self, asked: float | None) -> float:
        return min(asked or self._settings.request_timeout_s, self._settings.request_timeout_s)


class _TryAgainError(Exception):
    """The adaptation was lost under the answer, through no fault of the request."""

    def __init__(self, reason: ImprintError) -> None:
        super().__init__(reason.message)
        self.reason = reason


def _progress(data: dict[str, Any]) -> dict[str, Any]:
    fields = {name: data.get(name) for name in PROGRESS_FIELDS}
    return {"object": "answer.progress", **fields}
