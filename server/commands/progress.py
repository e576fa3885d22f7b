"""The progress display while a document is studied: one line on standard error, gone at the end.

Knows the phases as words; asks nobody for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from imprint.server.client_types import AdaptationEvent
from imprint.server.commands.common import error_console


class StudyDisplay:
    """A context manager; `say` names what goes on, `update` moves the bar."""

    def __init__(self) -> None:
        console = error_console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
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

    def update(self, progress: Mapping[str, Any]) -> None:
        """Show `{phase, step, steps, num_tokens}`; what is missing is left out."""
        step, steps = _count(progress.get("step")), _count(progress.get("steps"))
        tokens = _count(progress.get("num_tokens"))
        parts = [f"step {step}/{steps}"] if steps else []
        parts += [f"{tokens} tokens"] if tokens else []
        self._progress.update(
            self._task,
            description=str(progress.get("phase") or "studying"),
            total=steps or None,
            completed=step,
            detail=", ".join(parts),
        )

    def show(self, event: AdaptationEvent) -> None:
        """Show what an event says of the progress."""
        if event.kind in ("progress", "phase", "step"):
            self.update(event.data)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
