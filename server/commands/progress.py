"""The progress display while a document is studied: one line on standard error, gone at the end.

Knows the phases as words; asks nobody for them. The time that is left is reckoned from the steps
that were seen, so none is told before the second one, and a study that stops early ends sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from imprint.server.client_types import AdaptationEvent
from imprint.server.commands.common import error_console


class StudyProgress:
    """What is known of a study while it runs: taken from what a server says of it, bit by bit."""

    def __init__(self) -> None:
        self.phase = "studying"
        self.step = self.steps = self.num_tokens = 0
        self.reward: float | None = None
        self._first = self._last = (0, 0.0)
        """Of the steps seen: the number of each, and when it was first heard of."""

    def take(self, record: Mapping[str, Any], now: float) -> None:
        """Learn from `{phase, step, steps, num_tokens, reward_mean}`, of which any may be missing.

        `now` is in seconds, of any clock.
        """
        step, steps = _count(record.get("step")), _count(record.get("steps"))
        if "step" in record and (step < self.step or steps != self.steps):
            self.reward = None  # of another attempt, or of the focus that follows a reading
            self._first = self._last = (step, now)
        elif step > self._last[0]:
            if self._last[0] == 0:
                self._first = (step, now)  # reading came before the first one
            self._last = (step, now)
        if "step" in record:
            self.step, self.steps = step, steps
        self.num_tokens = _count(record.get("num_tokens")) or self.num_tokens
        self.phase = str(record.get("phase") or self.phase)
        reward = record.get("reward_mean")
        if isinstance(reward, int | float):
            self.reward = float(reward)

    def left_s(self, now: float) -> float | None:
        """Seconds until the last step is done, at the pace of those seen; None where unknown."""
        num_seen = self._last[0] - self._first[0]
        if num_seen <= 0 or self.step >= self.steps:
            return None
        pace_s = (self._last[1] - self._first[1]) / num_seen
        return max(0.0, pace_s * (self.steps - self._last[0]) - (now - self._last[1]))

    def detail(self) -> str:
        """Step, reward and tokens in words."""
        parts = [f"step {self.step}/{self.steps}"] if self.steps else []
        parts += [f"reward {self.reward:.3f}"] if self.reward is not None else []
        parts += [f"{self.num_tokens} tokens"] if self.num_tokens else []
        return ", ".join(parts)


class StudyDisplay:
    """A context manager; `say` names what goes on, `update` moves the bar."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        console = console or error_console()
        self._clock = clock
        self._study = StudyProgress()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            _TimeLeft(self._study),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            get_time=clock,
        )
        self._task = self._progress.add_task("starting", total=None, detail="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        """Name an activity whose length is not known."""
        self._progress.update(self._task, description=what, total=None, detail="")

    def update(self, record: Mapping[str, Any]) -> None:
        """Show what a record of `StudyProgress.take` says."""
        study = self._study
        study.take(record, self._clock())
        self._progress.update(
            self._task,
            description=study.phase,
            total=study.steps or None,
            completed=study.step,
            detail=study.detail(),
        )

    def show(self, event: AdaptationEvent) -> None:
        """Show what an event says of the progress."""
        if event.kind == "step":
            self.update({"phase": "adapt", **event.data})
        elif event.kind in ("progress", "resumed"):
            self.update(event.data)


class _TimeLeft(ProgressColumn):
    """Seconds or minutes that are left, where that is known."""

    def __init__(self, study: StudyProgress) -> None:
        super().__init__()
        self._study = study

    def render(self, task: Task) -> Text:
        left_s = self._study.left_s(task.get_time())
        return Text("" if left_s is None else f"{_duration(left_s)} left")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 90 else f"{round(whole / 60)} min"


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
