"""The lines of a run's `metrics.jsonl`: an object of numbers a round. Loads no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

METRICS_FILE: Final = "metrics.jsonl"

Numbers = dict[str, float]
"""`step`, `num_tokens`, `seconds`, and what the round measured."""


class Rounds:
    """Reads and writes the rounds of one run."""

    def __init__(self, run: Path) -> None:
        """`run`: the run's folder."""
        self.file = run / METRICS_FILE

    def append(self, numbers: Numbers) -> None:
        """Add a round's line."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def read(self) -> list[Numbers]:
        """The rounds so far, without a last line that is not whole: a kill tore it, or it is being
        written. Raises ValueError naming any other line that is no round."""
        if not self.file.exists():
            return []
        lines = self.file.read_text(encoding="utf-8").splitlines()
        rounds: list[Numbers] = []
        for number, line in enumerate(lines, start=1):
            found = _round_of(line)
            if found is not None:
                rounds.append(found)
            elif number < len(lines):
                raise ValueError(f"{self.file} line {number} is no round of a training run")
        return rounds

    def forget_from(self, step: int) -> None:
        """Drop the lines of rounds that will be taken again, and what a kill has torn."""
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            found = [(line, _round_of(line)) for line in lines]
            kept = [f"{line}\n" for line, numbers in found if numbers and numbers["step"] < step]
            temporary = self.file.with_name(self.file.name + ".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self.file)


def _round_of(line: str) -> Numbers | None:
    try:
        numbers = json.loads(line)
    except ValueError:
        return None
    if not isinstance(numbers, dict) or not {"step", "num_tokens"} <= set(numbers):
        return None
    if not all(isinstance(value, int | float) for value in numbers.values()):
        return None
    return {name: float(value) for name, value in numbers.items()}
