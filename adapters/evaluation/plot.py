"""The picture of an evaluation: a panel per cell, an arm a line, drawn with matplotlib.

Knows summaries of `report.py`; runs nothing. matplotlib is in the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprint.adapters.evaluation.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PURPOSE = "a plot"
_BETTER, _WORSE, _UNSURE, _BASE = "#1a7f4b", "#b3261e", "#6b7280", "#1f2937"
_PANEL_WIDTH, _LINE_HEIGHT, _MARGIN_HEIGHT = 3.4, 0.27, 0.75
_MAX_COLUMNS = 3


def check_plot() -> None:
    """Raises MissingExtraError where no plot can be made."""
    require("matplotlib.figure", _PURPOSE)


def draw(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG. A dot is an arm's mean score; its bar is base plus the paired interval.

    Raises MissingExtraError without matplotlib, `OSError` where the file cannot be written.
    """
    figure_module = require("matplotlib.figure", _PURPOSE)
    rows = _rows(summaries)
    num_columns = max(len(row) for row in rows)
    heights = [max(len(cell["arms"]) for cell in row) for row in rows]
    figure = figure_module.Figure(
        figsize=(
            1.4 + _PANEL_WIDTH * num_columns,
            0.9 + sum(_MARGIN_HEIGHT + _LINE_HEIGHT * height for height in heights),
        ),
        layout="constrained",
    )
    panels = figure.subplots(len(rows), num_columns, squeeze=False, height_ratios=heights)
    for row, cells in enumerate(rows):
        for column in range(num_columns):
            axes = panels[row][column]
            if column < len(cells):
                _panel(axes, cells[column], names=column == 0)
            else:
                axes.set_axis_off()
    figure.suptitle(
        "Score in %. Bar: 95 % interval of the difference to base,\npaired by document. "
        "Green: better, red: worse, grey: not told apart.",
        fontsize=7.5,
        color=_BASE,
    )
    figure.savefig(path, dpi=150, format="png")


def _rows(summaries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Panels in rows: the lengths of a task side by side, or tasks where each has one panel."""
    by_title: dict[str, list[dict[str, Any]]] = {}
    for cell in summaries:
        by_title.setdefault(cell["title"], []).append(cell)
    groups = list(by_title.values())
    if all(len(group) == 1 for group in groups):
        groups = [list(summaries)]
    return [
        group[first : first + _MAX_COLUMNS]
        for group in groups
        for first in range(0, len(group), _MAX_COLUMNS)
    ]


def _panel(axes: Axes, cell: dict[str, Any], *, names: bool) -> None:
    arms, metric = cell["arms"], cell["metric"]
    base = 100 * arms["base"]["scores"][metric] if "base" in arms else None
    if base is not None:
        axes.axvline(base, color=_BASE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for line, values in enumerate(arms.values()):
        score = 100 * values["scores"][metric]
        against = values.get("against_base", {}).get(metric)
        color = _BASE if against is None else _color(against)
        if against is not None and base is not None:
            ends = (base + 100 * against[f"interval_{end}"] for end in ("low", "high"))
            low, high = (min(max(end, 0.0), 100.0) for end in ends)
            axes.plot([low, high], [line, line], color=color, linewidth=2, alpha=0.5, zorder=2)
        axes.plot([score], [line], "o", color=color, markersize=5, zorder=3)
        axes.text(121, line, f"{score:.1f}", color=color, fontsize=7, ha="right", va="center")
    length = f", {cell['length']} tokens" if cell["length"] is not None else ""
    axes.set_title(f"{cell['title']}{length}  (n = {cell['num_documents']})", fontsize=8)
    axes.set_xlim(-4, 122)
    axes.set_ylim(len(arms) - 0.5, -0.7)
    axes.set_yticks(range(len(arms)), list(arms) if names else [""] * len(arms), fontsize=7.5)
    axes.set_xticks(range(0, 101, 25))
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(metric, fontsize=7, color=_UNSURE)


def _color(against: dict[str, Any]) -> str:
    num_documents = sum(against[f"num_{what}"] for what in ("better", "same", "worse"))
    if num_documents < 2:  # a single document has no interval
        return _UNSURE
    if against["interval_low"] > 0:
        return _BETTER
    return _WORSE if against["interval_high"] < 0 else _UNSURE
