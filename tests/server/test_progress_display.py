"""What the terminal shows of a study: against events that a server has really sent."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from imprint.server.client_types import AdaptationEvent
from imprint.server.commands.progress import StudyDisplay, StudyProgress

RECORDED = Path(__file__).parents[1] / "data" / "study_events.jsonl"
"""Each line: seconds since the job was sent, and the event; of the bundled model on harbor.txt."""


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]


class Terminal:
    """A display whose time is that of the record."""

    def __init__(self) -> None:
        self.now = 0.0
        self.file = io.StringIO()
        console = Console(file=self.file, force_terminal=True, width=120, color_system=None)
        self.display = StudyDisplay(console, lambda: self.now)

    def after(self, event: dict[str, Any]) -> str:
        """The line that stands there behind this event."""
        self.now = event["at"]
        self.display.show(AdaptationEvent.from_body(None, event))
        self.file.truncate(0)
        self.file.seek(0)
        self.display._progress.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue()).strip()


def test_phase_step_reward_and_time_left(recorded: list[dict[str, Any]]) -> None:
    terminal = Terminal()
    with terminal.display:
        lines = [(event, terminal.after(event)) for event in recorded]
    steps = [(event, line) for event, line in lines if event["kind"] == "step"]
    ended_at = steps[-1][0]["at"]
    assert len(steps) >= 4
    for event, line in steps:
        data = event["data"]
        assert line.startswith("adapt")
        assert f"step {data['step']}/{data['steps']}" in line
        assert f"reward {data['reward_mean']:.3f}" in line
    for event, line in steps[1:-1]:
        told = re.search(r"(\d+) s left", line)
        assert told, line
        left_s = ended_at - event["at"]
        assert 0.5 * left_s - 1 <= int(told[1]) <= 2 * left_s + 1
    assert "left" not in steps[-1][1]
    phases = {line.split()[0] for _, line in lines}
    assert {"read", "rollout", "adapt"} <= phases


def test_nothing_is_left_on_the_screen() -> None:
    terminal = Terminal()
    with terminal.display:
        terminal.display.say("loading the model")
    assert terminal.file.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


def test_nothing_is_shown_where_nobody_looks() -> None:
    file = io.StringIO()
    with StudyDisplay(Console(file=file, force_terminal=False)) as display:
        display.update({"phase": "read", "step": 1, "steps": 2})
    assert file.getvalue() == ""


def taken(*records: tuple[float, dict[str, Any]]) -> StudyProgress:
    study = StudyProgress()
    for now, record in records:
        study.take(record, now)
    return study


def test_time_left_shrinks_while_nothing_is_heard() -> None:
    study = taken(*((10.0 * step, {"step": step, "steps": 5}) for step in (1, 2, 3)))
    assert [study.left_s(now) for now in (30.0, 35.0, 99.0)] == [20.0, 15.0, 0.0]


def test_a_study_that_begins_again_forgets_its_pace() -> None:
    study = taken(
        *((float(step), {"step": step, "steps": 5, "reward_mean": 0.5}) for step in (1, 2, 3)),
        (50.0, {"phase": "read", "step": 0, "steps": 5}),
    )
    assert (study.left_s(50.0), study.reward) == (None, None)
    study.take({"step": 1, "steps": 5}, 60.0)
    study.take({"step": 2, "steps": 5}, 70.0)
    assert study.left_s(70.0) == 30.0
    study.take({"phase": "focus", "step": 1, "steps": 4}, 71.0)
    assert (study.left_s(71.0), study.steps) == (None, 4)


@pytest.mark.parametrize("record", [{}, {"step": None, "steps": "x", "reward_mean": None}])
def test_what_is_missing_is_left_out(record: dict[str, Any]) -> None:
    study = taken((1.0, record))
    assert (study.detail(), study.left_s(2.0), study.phase) == ("", None, "studying")
