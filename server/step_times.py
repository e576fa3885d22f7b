"""Where an engine's time goes: the model, the slots, quanta, and the engine itself.

Knows clocks and names; knows nothing of what is timed. `own` is what is left of a timed whole after
its parts: scheduling, bookkeeping, text and messages, all of it Python. Limit: one thread.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imprint.server.messages import Observation

METRIC = "engine_time_seconds_total"
OWN = "own"


class StepTimes:
    """Seconds by part since the last time they were taken."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent_s: dict[str, float] = {}
        self._parts_s = 0.0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A span of the engine's work; what no part of it takes is its own."""
        began, self._parts_s = self._clock(), 0.0
        try:
            yield
        finally:
            self._add(OWN, self._clock() - began - self._parts_s)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A span that belongs to `name`. Parts lie inside a whole and not inside each other."""
        began = self._clock()
        try:
            yield
        finally:
            duration_s = self._clock() - began
            self._parts_s += duration_s
            self._add(name, duration_s)

    def take(self) -> list[Observation]:
        """What has been spent since the last call, for the metric of the API process."""
        spent_s, self._spent_s = self._spent_s, {}
        return [
            Observation(name=METRIC, value=seconds, labels={"part": name})
            for name, seconds in spent_s.items()
            if seconds > 0
        ]

    def _add(self, name: str, seconds: float) -> None:
        self._spent_s[name] = self._spent_s.get(name, 0.0) + seconds
