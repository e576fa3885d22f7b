"""The requests of one worker: adapter, focus run, slots, text, and exactly one end for each.

Knows adapters, slots and token ids; knows nothing of how a batch is computed or when it runs.
"""

import logging
from typing import Any

from imprint.adapters.calls import Call
from imprint.adapters.course import Course
from imprint.adapters.drafts import LineEnd
from imprint.adapters.focus import FocusResult
from imprint.models import RecurrentState
from imprint.server import studies
from imprint.server.decoding import Row
from imprint.server.messages import (
    FocusProgress,
    Generate,
    Generated,
    Observation,
    RequestFailed,
    SequenceDone,
    TokenDelta,
)
from imprint.server.plain import plain
from imprint.server.scheduler import QueueFullError
from imprint.server.sequence import Job, Request, Sequence
from imprint.server.slot_states import SlotStates
from imprint.server.tasks import Answer, RequestTask, Surroundings
from imprint.server.text_stream import TextStream

log = logging.getLogger(__name__)

MAX_LOSSES = 3
"""A sequence whose slot is lost more often fails: something is wrong with all decoding."""


class PromptTooLongError(ValueError):
    """A prompt is longer than this worker accepts."""


class AnswerRuns:
    """Every request that this worker has accepted and not ended yet."""

    def __init__(self, around: Surroundings, slots: SlotStates) -> None:
        self._around = around
        self._slots = slots
        self._tasks: dict[str, RequestTask] = {}
        self._loading: dict[str, str] = {}
        """Adapters that requests wait for."""
        self._untold: list[TokenDelta | SequenceDone] = []

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._tasks

    def ids(self) -> list[str]:
        """Every request, in order of arrival."""
        return list(self._tasks)

    def using(self, adapter_id: str) -> list[str]:
        """Requests that were asked of this adapter."""
        return [id for id, task in self._tasks.items() if task.message.adapter_id == adapter_id]

    def add(self, message: Generate) -> None:
        """Check and queue a request; what cannot run fails at once."""
        id = message.request_id
        if id in self._tasks:
            log.warning("request %s was sent twice; the second one is dropped", id)
            return
        try:
            task = self._task(message)
            self._around.scheduler.add_request(task.request)
        except studies.MethodError as error:
            self.refuse(id, "invalid_method", str(error))
        except PromptTooLongError as error:
            self.refuse(id, "context_length_exceeded", str(error))
        except ValueError as error:
            self.refuse(id, "invalid_request", str(error))
        except QueueFullError as error:
            self.refuse(id, "queue_full", str(error))
        else:
            self._tasks[id] = task

    def _task(self, message: Generate) -> RequestTask:
        around = self._around
        vocab_size = around.model.config.vocab_size
        for prompt in message.prompts:
            if not prompt.tokens:
                raise ValueError("a prompt holds no tokens")
            if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocab_size:
                raise ValueError(f"a prompt's token is outside the vocabulary of {vocab_size}")
            if len(prompt.tokens) > around.max_tokens:
                raise PromptTooLongError(
                    f"a prompt has {len(prompt.tokens)} tokens, at most {around.max_tokens} fit"
                )
        if not message.prompts or message.max_tokens < 1:
            raise ValueError("a request needs at least one prompt and max_tokens of at least 1")
        answers = {
            prompt.sequence_id: Answer(
                sequence=Sequence(
                    request_id=message.request_id,
                    sequence_id=prompt.sequence_id,
                    prompt=prompt.tokens,
                    seed=prompt.seed,
                    max_tokens=message.max_tokens,
                ),
                text=TextStream(around.tokenizer.decode_stream(), message.stop),
            )
            for prompt in message.prompts
        }
        if len(answers) < len(message.prompts):
            raise ValueError("two prompts have the same sequence_id")
        request = Request(
            id=message.request_id,
            sequences=[answer.sequence for answer in answers.values()],
            arrived=around.clock(),
            deadline=around.deadline(message.timeout_s),
        )
        config = studies.focus_config(message, around.segment_tokens)
        return RequestTask(
            message=message,
            request=request,
            config=config,
            answers=answers,
            trace=around.trace(message.traceparent),
        )

    # ---- before the first token ------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """Go on with an admitted request, once its adapter is in memory."""
        task, around = self._tasks[request.id], self._around
        around.scheduler.begun(request.id)
        now = around.clock()
        waited_s = now - request.arrived
        task.trace.add("queue", request.arrived, now)
        around.observe(
            Observation(
                name="request_queue_time_seconds", value=waited_s, labels={"kind": "request"}
            )
        )
        if task.message.adapter_id is None or around.cache.request(task.message.adapter_id):
            self.go_on(request.id)
        else:
            self._loading[request.id] = task.message.adapter_id

    def loaded(self) -> list[str]:
        """Requests whose adapter has been loaded since they began, or could not be."""
        cache = self._around.cache
        return [id for id, adapter_id in self._loading.items() if cache.request(adapter_id)]

    @property
    def loading(self) -> bool:
        """Whether any request waits for its adapter."""
        return bool(self._loading)

    def go_on(self, request_id: str) -> None:
        """Start the focus run of a request, or its sequences: its adapter is there, if any."""
        task, around = self._tasks[request_id], self._around
        request = task.request
        self._loading.pop(request_id, None)
        if task.message.adapter_id is not None:
            try:
                task.adapter = around.cache.acquire(task.message.adapter_id)
            except (KeyError, ValueError):
                self.fail(request.id, "adapter_not_found", "there is no adapter of this id")
                return
            if task.adapter.manifest.get("model_hash") != around.model_hash:
                self.fail(request.id, "adapter_corrupt", "the adapter is of another model")
                return
        if task.config is None:
            self._activate(task)
            return
        assert task.adapter is not None
        task.focus = studies.begin_focus(
            around.model,
            task.adapter,
            task.message,
            task.config,
            line_break=around.tokenizer.encode("\n", continues=True),
            ends=LineEnd(around.tokenizer),
            similarity=around.similarity,
        )
        task.course = Course(task.focus.study())
        num_tokens = task.config.steps * studies.step_tokens(0, task.config)
        job = Job(
            id=request.id,
            work_tokens=num_tokens * len(task.answers),
            num_bytes=0,
            focus=True,
            arrived=request.arrived,
        )
        around.scheduler.add_job(job)

    def call(self, job: Job) -> Call[Any] | None:
        """What a request's focus run waits for; None before its beginning."""
        course = self._tasks[job.id].course
        return None if course is None else course.call

    def advance(self, job: Job, result: Any, began: float) -> None:
        """Hand a focus run the result of its call, or begin it; after it the sequences start."""
        if isinstance(result, Exception):
            raise result
        task, around = self._tasks[job.id], self._around
        assert task.course is not None
        reports = task.course.go_on(result)
        around.wait_for(job, task.course.call)
        now = around.clock()
        for quantum in reports:
            phase = f"focus_{quantum.phase}"
            task.trace.quantum(phase, quantum.step, began, now, quantum.num_tokens)
            if quantum.event is not None:
                around.emit(
                    FocusProgress(
                        request_id=job.id,
                        step=quantum.step,
                        steps=quantum.steps,
                        data=plain(quantum.event),
                    )
                )
        if task.course.ended:
            self._activate(task)

    def _activate(self, task: RequestTask) -> None:
        """Give every sequence its slot, filled with a copy of the document-end state."""
        adapter, focus = task.adapter, task.focus
        task.trace.activated(self._around.clock())
        for i, answer in enumerate(task.answers.values()):
            answer.delta = adapter.delta if adapter is not None else None
            answer.adapted = adapter is not None and adapter.adapted
            if focus is not None:
                answer.focus, answer.adapted = focus.results[i], focus.adapted[i]
                answer.delta = focus.deltas[i]
                answer.sequence.context = focus.passages[i]
                answer.memory_share = focus.memory_shares[i]
            answer.sequence.slot = self._slots.allocate(self._beginning(task, answer))
            # the scheduler reserved a slot for every sequence when it admitted the request
            assert answer.sequence.slot is not None
        self._around.scheduler.activate(task.request.id)

    def _beginning(self, task: RequestTask, answer: Answer) -> RecurrentState | None:
        """What a sequence's slot is a copy of; None: a document's start."""
        if task.adapter is None or answer.memory_share == 1.0:
            return task.adapter.state if task.adapter else None
        return self._around.model.faded(task.adapter.state, answer.memory_share)

    # ---- tokens ----------------------------------------------------------------------------

    def row(self, sequence: Sequence, num_tokens: int) -> Row:
        """A sequence's part in the next batch: `num_tokens` of its prompt, or its last token."""
        task = self._tasks[sequence.request_id]
        assert sequence.slot is not None
        return Row(
            sequence=sequence,
            slot=sequence.slot,
            tokens=sequence.piece(num_tokens) if num_tokens else sequence.tokens[-1:],
            delta=task.answers[sequence.sequence_id].delta,
            temperature=task.message.temperature,
            top_p=task.message.top_p,
            presence_penalty=task.message.presence_penalty,
            frequency_penalty=task.message.frequency_penalty,
            num_logprobs=task.message.logprobs,
        )

    def take(self, sequence: Sequence, token: int | None, num_prefilled: int) -> None:
        """Account for a batch: prompt tokens read, and the token sampled after them; `tell` it."""
        if sequence.request_id not in self._tasks:
            return  # another sequence of the request failed in this very batch
        task = self._tasks[sequence.request_id]
        sequence.num_prefilled += num_prefilled
        if token is None:
            self.fail(task.request.id, "non_finite", "the model's output was not finite")
        elif sequence.num_unread == 0:
            self._append(task, task.answers[sequence.sequence_id], token)

    def tell(self) -> None:
        """Say what the batch that was just taken has generated."""
        if self._untold:
            self._around.emit(Generated(values=self._untold))
            self._untold = []

    def read_again(self, sequence: Sequence) -> bool:
        """Prefill a sequence, whose slot was lost, anew; False: it was lost too often."""
        if sequence.num_losses >= MAX_LOSSES:
            return False
        task = self._tasks[sequence.request_id]
        answer = task.answers[sequence.sequence_id]
        assert sequence.slot is not None
        self._slots.reset(sequence.slot, self._beginning(task, answer))
        sequence.read_again()
        return True

    def _append(self, task: RequestTask, answer: Answer, token: int) -> None:
        sequence = answer.sequence
        sequence.tokens.append(token)
        task.trace.token(sequence.sequence_id, self._around.clock(), sequence.num_given)
        if token == self._around.tokenizer.eos_id:
            self._finish(task, answer, "stop")
            return
        self._untold.append(
            TokenDelta(
                request_id=sequence.request_id,
                sequence_id=sequence.sequence_id,
                index=len(sequence.tokens) - 1,
                token_id=token,
                text=answer.text.push(token),
                logprobs=sequence.sampled,
            )
        )
        if answer.text.stopped:
            self._finish(task, answer, "stop")
        elif len(sequence.tokens) >= sequence.max_tokens:
            self._finish(task, answer, "length")

    def _finish(self, task: RequestTask, answer: Answer, finish_reason: str) -> None:
        sequence, adapter = answer.sequence, task.adapter
        self._free(sequence)
        num_tokens = len(sequence.tokens)
        task.trace.sequence_done(
            sequence.sequence_id, self._around.clock(), num_tokens, finish_reason
        )
        if task.request.finished:
            self._drop(task.request.id)
        if answer.focus is not None:
            self._around.count_verdict("focus", answer.focus.accepted)
            self._around.count("focus_answers_total", way=answer.focus.way)
        self._untold.append(
            SequenceDone(
                request_id=sequence.request_id,
                sequence_id=sequence.sequence_id,
                finish_reason=finish_reason,
                text=answer.text.flush(),
                usage={
                    "prompt_tokens": len(sequence.prompt),
                    "completion_tokens": len(sequence.tokens),
                    "document_tokens": len(adapter.tokens_T) if adapter else 0,
                },
                adapted=answer.adapted,
                focus=_focus_dict(answer.focus),
            )
        )

    # ---- the end ---------------------------------------------------------------------------

    def fail(self, request_id: str, code: str, message: str, phase: str = "") -> None:
        """End a request with an error; its slots are zeroed and freed. `phase` is where a deadline
        struck."""
        for answer in self._tasks[request_id].answers.values():
            self._free(answer.sequence)
        self._drop(request_id)
        self.refuse(request_id, code, message, phase)

    def cancel(self, request_id: str) -> None:
        """End a request because its client has gone."""
        self.fail(request_id, "cancelled", "the request was cancelled")

    def _free(self, sequence: Sequence) -> None:
        sequence.finished = True
        if sequence.slot is not None:
            self._slots.free(sequence.slot)
            sequence.slot = None

    def _drop(self, request_id: str) -> None:
        self._loading.pop(request_id, None)
        self._around.scheduler.remove(request_id)
        task = self._tasks.pop(request_id)
        task.trace.close()
        if task.adapter is not None and task.message.adapter_id is not None:
            self._around.cache.release(task.message.adapter_id)

    def refuse(self, request_id: str, code: str, message: str, phase: str = "") -> None:
        """Say that a request has failed, or was never taken in."""
        self.tell()  # first what it has generated
        self._around.emit(
            RequestFailed(request_id=request_id, code=code, message=message, phase=phase)
        )


def _focus_dict(result: FocusResult | None) -> dict[str, object] | None:
    return None if result is None else plain(result.to_dict())
