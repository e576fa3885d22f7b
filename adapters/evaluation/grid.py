"""A grid of adaptations to compare, from a TOML file. Loads no torch; runs nothing.

benchmark = "ruler --tasks niah_multikey --lengths 1024 --num-documents 50"
baselines = ["reread"]

[refine]                  # what the points without known questions share
preset = "fast"

[[grid]]                  # every value of a field with every value of the others
arm = ["adapted", "ungated"]
steps = [4, 8]
"""

from __future__ import annotations

import itertools
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imprint.adapters.config import RefineConfig, config_of_focus, config_of_study
from imprint.adapters.errors import ConfigError
from imprint.adapters.evaluation.arm_names import ARMS

ADAPTING: Final = ("adapted", "ungated", "focus", "ntp_only")
"""Arms that a point can be: those that adapt, with settings of one kind."""
BASELINES: Final = tuple(arm for arm in ARMS if arm not in (*ADAPTING, "adapted_focus"))
MAX_POINTS: Final = 1000
_SHARED: Final = {"refine": "default", "focus": "focus"}
"""What the shared fields go to, with the preset they replace fields of."""
_LISTS: Final = tuple(
    name for name, value in RefineConfig().to_dict().items() if isinstance(value, list)
)


class GridError(ValueError):
    """A grid that cannot be run; the message names the entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to adapt: an arm and the settings of its adaptation."""

    arm: str
    axes: dict[str, Any]
    """What its grid says of it, the arm left out."""
    config: RefineConfig

    @property
    def label(self) -> str:
        """Arm and axes on a line; no two points of a grid have the same."""
        return " ".join(
            (self.arm, *(f"{name}={text_of(value)}" for name, value in self.axes.items()))
        )

    @property
    def study(self) -> tuple[bool, RefineConfig]:
        """Points of the same study share it: whether the questions are known, and how."""
        return self.arm == "focus", self.config


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Points to be compared with the base on the same documents."""

    benchmark: tuple[str, ...]
    """Words of `imprint eval`: what is asked."""
    baselines: tuple[str, ...]
    """Arms that do not adapt; base is the first."""
    points: tuple[Point, ...]

    @property
    def studies(self) -> dict[tuple[bool, RefineConfig], list[Point]]:
        """The points by study, in order."""
        studies: dict[tuple[bool, RefineConfig], list[Point]] = {}
        for point in self.points:
            studies.setdefault(point.study, []).append(point)
        return studies

    @property
    def axes(self) -> list[str]:
        """Every axis that any grid has."""
        return list(dict.fromkeys(name for point in self.points for name in point.axes))


def load_grid(path: Path) -> Grid:
    """Read and check a whole file. Raises GridError, or `OSError` where it cannot be read."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GridError(f"{path} is not TOML: {error}") from None
    try:
        return parse_grid(raw)
    except GridError as error:
        raise GridError(f"{path}: {error}") from None


def parse_grid(raw: dict[str, Any]) -> Grid:
    """The same from plain values."""
    for name in raw:
        if name not in ("benchmark", "baselines", "grid", *_SHARED):
            raise GridError(
                f"unknown entry {name!r}; known: benchmark, baselines, refine, focus, grid"
            )
    benchmark = raw.get("benchmark")
    if not isinstance(benchmark, str) or not benchmark.split():
        raise GridError("benchmark must be a text like 'ruler --tasks vt', as after imprint eval")
    baselines = _names(raw.get("baselines", []))
    grids = raw.get("grid", [])
    if not isinstance(grids, list) or not grids or not all(isinstance(g, dict) for g in grids):
        raise GridError("there is no [[grid]]")
    shared = {name: raw.get(name, {}) for name in _SHARED}
    for name, fields in shared.items():
        if not isinstance(fields, dict):
            raise GridError(f"{name} must be a table of fields")
    num_points = sum(_size(grid) for grid in grids)
    if num_points > MAX_POINTS:
        raise GridError(f"the grids have {num_points} points, at most {MAX_POINTS} are run")
    points: dict[str, Point] = {}
    for grid in grids:
        for point in _points(grid, shared):
            points.setdefault(point.label, point)
    try:
        words = tuple(shlex.split(benchmark))
    except ValueError as error:
        raise GridError(f"benchmark: {error}") from None
    return Grid(benchmark=words, baselines=baselines, points=tuple(points.values()))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise GridError("baselines must be a list of arms")
    for name in value:
        if name not in BASELINES:
            raise GridError(f"baselines: {name!r} is none of {', '.join(BASELINES)}")
    return tuple(dict.fromkeys(("base", *value)))


def _values(name: str, value: Any) -> list[Any]:
    """What an axis goes through; a single value stands for itself."""
    single = not isinstance(value, list)
    if name in _LISTS and not single:  # such a field has a list for a value
        single = not all(isinstance(entry, list) for entry in value)
    values = [value] if single else value
    if not values:
        raise GridError(f"{name} has no values")
    return values


def _size(grid: dict[str, Any]) -> int:
    size = 1
    for name, value in grid.items():
        size *= len(_values(name, value))
    return size


def _points(grid: dict[str, Any], shared: dict[str, dict[str, Any]]) -> list[Point]:
    axes = {name: _values(name, value) for name, value in {"arm": "adapted", **grid}.items()}
    found = []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        arm = fields.pop("arm")
        if arm not in ADAPTING:
            raise GridError(f"arm must be one of {', '.join(ADAPTING)}, got {arm!r}")
        kind = "focus" if arm == "focus" else "refine"
        all_fields = {"preset": _SHARED[kind], **shared[kind], **fields}
        label = " ".join((arm, *(f"{name}={text_of(value)}" for name, value in fields.items())))
        try:
            make = config_of_focus if kind == "focus" else config_of_study
            config = make(all_fields)
        except ConfigError as error:
            raise GridError(f"{label}: {error}") from None
        found.append(Point(arm=arm, axes=fields, config=config))
    return found


def text_of(value: Any) -> str:
    """A value as it stands in labels and tables."""
    return "+".join(map(str, value)) or "all" if isinstance(value, list) else str(value)
