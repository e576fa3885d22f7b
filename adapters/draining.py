"""Running a generator of quanta to its end where nobody needs the pauses."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Pause = TypeVar("Pause")
Result = TypeVar("Result")


def drain(work: Generator[Pause, None, Result]) -> Result:
    """What the generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
