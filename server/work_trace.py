"""What one job of a worker spends its time on, as spans for the trace that the job belongs to.

Free where nothing is traced. Quanta of one phase of one step are one span, and a long study has no
more than `MAX_SPANS`: the rest of its quanta are one more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from imprint.server.messages import SpanRecord, Spans

MAX_SPANS = 200
REST = "rest"


@dataclass(slots=True)
class _Open:
    """Quanta that go into one span."""

    phase: str
    step: int
    began: float
    ended: float
    busy_s: float = 0.0
    num_quanta: int = 0
    num_tokens: int = 0


class WorkTrace:
    """Spans of one job. Times are of the engine's clock; they leave as Unix time."""

    def __init__(
        self, traceparent: str, emit: Callable[[Spans], None], clock: Callable[[], float]
    ) -> None:
        self._traceparent = traceparent
        self._emit = emit
        self._offset_s = time.time() - clock()
        self._open: _Open | None = None
        self._num_spans = 0
        self._activated_at = 0.0
        self._first_token_at: dict[str, float] = {}

    def add(self, name: str, began: float, ended: float, **attributes: str | int | float) -> None:
        """One span."""
        if not self._traceparent:
            return
        self._num_spans += 1
        record = SpanRecord(
            traceparent=self._traceparent,
            name=name,
            began=began + self._offset_s,
            ended=ended + self._offset_s,
            attributes={f"imprint.{key}": value for key, value in attributes.items()},
        )
        self._emit(Spans(values=[record]))

    def quantum(self, phase: str, step: int, began: float, ended: float, num_tokens: int) -> None:
        """A quantum has run; quanta of one phase of one step are told as one span."""
        if not self._traceparent:
            return
        if not self._goes_on(phase, step):
            self.close()
            if self._num_spans >= MAX_SPANS:
                phase, step = REST, 0
            self._open = _Open(phase, step, began, ended)
        assert self._open is not None
        self._open.ended = ended
        self._open.busy_s += ended - began
        self._open.num_quanta += 1
        self._open.num_tokens += num_tokens

    def _goes_on(self, phase: str, step: int) -> bool:
        if self._open is None:
            return False
        return self._open.phase == REST or (self._open.phase, self._open.step) == (phase, step)

    def activated(self, now: float) -> None:
        """The request's sequences may be prefilled from now on."""
        self.close()
        self._activated_at = now

    def token(self, sequence_id: str, now: float, num_prompt_tokens: int) -> None:
        """A sequence got a token; its first one ends the prefill."""
        if self._traceparent and sequence_id not in self._first_token_at:
            self._first_token_at[sequence_id] = now
            self.add("prefill", self._activated_at, now, sequence=sequence_id,
                     tokens=num_prompt_tokens)  # fmt: skip

    def sequence_done(self, sequence_id: str, now: float, num_tokens: int, reason: str) -> None:
        """A sequence has its last token."""
        began = self._first_token_at.get(sequence_id, now)
        self.add("decode", began, now, sequence=sequence_id, tokens=num_tokens,
                 finish_reason=reason)  # fmt: skip

    def close(self) -> None:
        """Tell the quanta that have not been told yet."""
        if self._open is None:
            return
        last, self._open = self._open, None
        self.add(
            last.phase,
            last.began,
            last.ended,
            step=last.step,
            quanta=last.num_quanta,
            tokens=last.num_tokens,
            busy_seconds=last.busy_s,
        )
