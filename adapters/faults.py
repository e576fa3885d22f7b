"""Faults on purpose, for tests: a process that dies, hangs or meets a full disk at a named point.

The plan is the variable `IMPRINT_FAULTS`, read once a process. It is no setting: with the variable
unset, a point costs one cached call and does nothing. Faults, separated by commas, are
`PROCESS/POINT@HITS=KIND`, such as `worker-0.1/step@3=kill` or `api/journal_write@5-9=full`.
PROCESS is `api`, `worker` (any), `worker-0`, or `worker-0.1` (its first process); HITS is `3`,
`3-5` or `3-`, counted from 1 in each process; without them, the fault comes at every hit.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, NoReturn, get_args

VARIABLE: Final = "IMPRINT_FAULTS"
API: Final = "api"

Point = Literal[
    "journal_write", "artefact_write", "artefact_rename", "message_send", "message_receive", "step"
]
"""Before a commit of the journal; half-way through an adapter or checkpoint; before it gets its
name; before a frame is sent; before a received one is looked at; after an optimisation step, before
its checkpoint."""

Kind = Literal["kill", "full", "hang"]
"""SIGKILL of this very process; OSError ENOSPC; nothing ever again, as in a kernel that hangs."""

_FAULT = re.compile(
    r"(?P<process>api|worker(?:-\d+(?:\.\d+)?)?)/(?P<point>\w+)"
    r"(?:@(?P<first>\d+)(?:(?P<range>-)(?P<last>\d+)?)?)?=(?P<kind>\w+)"
)


class FaultError(ValueError):
    """The plan cannot be read; the message names the part that is wrong."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the plan."""

    process: str
    point: str
    first: int
    last: float
    kind: str

    def concerns(self, process: str) -> bool:
        """Whether a process of this name is meant: `worker-0.1` is a `worker-0` and a `worker`."""
        names = (process, process.partition(".")[0], process.partition("-")[0])
        return self.process in names


def parse(plan: str) -> list[Fault]:
    """The faults of a plan. Raises FaultError."""
    return [_parse_one(part.strip()) for part in plan.split(",") if part.strip()]


def _parse_one(text: str) -> Fault:
    match = _FAULT.fullmatch(text)
    if match is None:
        raise FaultError(f"{VARIABLE}: {text!r} is not PROCESS/POINT@HITS=KIND")
    for name, allowed in (("point", get_args(Point)), ("kind", get_args(Kind))):
        if match[name] not in allowed:
            known = ", ".join(allowed)
            raise FaultError(f"{VARIABLE}: no {name} {match[name]!r}; there is {known}")
    first = int(match["first"] or 1)
    last: float = first if match["first"] else float("inf")
    if match["range"]:
        last = int(match["last"]) if match["last"] else float("inf")
    return Fault(match["process"], match["point"], first, last, match["kind"])


class Faults:
    """The faults of one process, and how often it has come to each point."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._hits: Counter[str] = Counter()
        self._lock = threading.Lock()  # adapters are written in a thread

    def hit(self, point: Point) -> None:
        """Count, and do what is planned. Raises OSError for a full disk."""
        with self._lock:
            self._hits[point] += 1
            hits = self._hits[point]
        for fault in self._faults:
            if fault.point == point and fault.first <= hits <= fault.last:
                _strike(fault.kind)


def _strike(kind: str) -> None:
    if kind == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({VARIABLE})")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    _hang()


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


def at(point: Point) -> None:
    """This process has come to `point`. Without a plan, nothing happens."""
    if (faults := _of_this_process()) is not None:
        faults.hit(point)


@cache
def _of_this_process() -> Faults | None:
    """What the environment plans for `api`: `for_worker` has renamed what is a worker's."""
    faults = [fault for fault in parse(os.environ.get(VARIABLE, "")) if fault.process == API]
    return Faults(faults) if faults else None


def for_worker(environ: Mapping[str, str], name: str) -> str:
    """The plan of a worker process: its own faults, and nobody else's; empty where it has none."""
    own = [fault for fault in parse(environ.get(VARIABLE, "")) if fault.concerns(name)]
    return ",".join(map(_as_own, own))


def _as_own(fault: Fault) -> str:
    last = "" if fault.last == float("inf") else int(fault.last)
    return f"{API}/{fault.point}@{fault.first}-{last}={fault.kind}"
