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
QUANTUM = "quantum"
WINDOW_S = 5.0
"""The longest quantum is remembered for one to two of these."""


class StepTimes:
    """Seconds by part since the last time they were taken."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent_s: dict[str, float] = {}
        self._parts_s = 0.0
        self._window_began = clock()
        self._longest_s = [0.0, 0.0]

    @property
    def longest_quantum_s(self) -> float:
        """The longest quantum of the last five to ten seconds."""
        self._move_window(self._clock())
        return max(self._longest_s)

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
            now = self._clock()
            self._parts_s += now - began
            self._add(name, now - began)
            if name == QUANTUM:
                self._move_window(now)
                self._longest_s[0] = max(self._longest_s[0], now - began)

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

    def _move_window(self, now: float) -> None:
        num_windows = (now - self._window_began) // WINDOW_S
        if num_windows >= 1:
            self._longest_s = [0.0, self._longest_s[0] if num_windows == 1 else 0.0]
            self._window_began += num_windows * WINDOW_S
