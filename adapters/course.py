"""A study under way: held at the call that it asks for next. Limit: runs no call itself."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from imprint.adapters.calls import Call
from imprint.adapters.quantum import Quantum, Study

R = TypeVar("R")


class Course(Generic[R]):
    """`call` is what the study waits for: None before its beginning and after its end."""

    def __init__(self, study: Study[R]) -> None:
        self.call: Call[Any] | None = None
        self.ended = False
        self.result: R | None = None
        """What the study returned, once it has ended."""
        self._study = study

    def go_on(self, result: Any = None) -> list[Quantum]:
        """Hand in the result of `call`, and go on to the next one or to the end.

        Returns what the study reported in between. What it raises, it raises here.
        """
        self.call = None
        reports: list[Quantum] = []
        while True:
            try:
                item = self._study.send(result)
            except StopIteration as stop:
                self.ended, self.result = True, stop.value
                return reports
            result = None
            if not isinstance(item, Quantum):
                self.call = item
                return reports
            reports.append(item)

    def close(self) -> None:
        """Give the study up."""
        self.call = None
        self._study.close()
