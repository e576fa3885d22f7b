"""The picture of training runs: losses, rewards and gradient norms over tokens, several in one.

Knows the rounds of `metrics.jsonl`; runs nothing, loads no torch. matplotlib is in the extra
`eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

from imprint.adapters.evaluation.extras import require
from imprint.adapters.training.rounds import METRICS_FILE, Numbers, Rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS: Final = {
    "ntp_loss": "next-token loss, nats",
    "response_loss": "loss of responses, nats",
    "policy_loss": "policy loss",
    "reward_mean": "mean reward",
    "grad_norm": "gradient norm",
    "response_grad_norm": "gradient norm, responses",
}
"""What is drawn, where any of the runs has it, with its title."""

_PURPOSE = "a plot"
# Okabe and Ito's colours, which colour-blind eyes tell apart, without their black and yellow
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_STYLES = ("-", "--", ":", "-.")
_LINES = [(color, style) for style, color in product(_STYLES, _COLORS)]
MAX_RUNS: Final = len(_LINES)
"""Runs that can be told apart in one picture."""
_COLUMNS, _PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND_HEIGHT = 2, 4.2, 2.5, 0.25


def read_runs(folders: Sequence[Path]) -> dict[str, list[Numbers]]:
    """The rounds of each run, by the folder as it is written. Raises ValueError naming a folder
    without rounds, or one that is given twice."""
    runs: dict[str, list[Numbers]] = {}
    for folder in folders:
        if str(folder) in runs:
            raise ValueError(f"{folder} is given twice")
        runs[str(folder)] = Rounds(folder).read()
        if not runs[str(folder)]:
            raise ValueError(
                f"{folder} has no round in {METRICS_FILE}: give what was --out of a run of "
                "train mid or train post"
            )
    return runs


def running_means(values: Sequence[float], width: int) -> list[float]:
    """Of each value and up to `width - 1` before it."""
    return [fmean(values[max(i - width, 0) : i]) for i in range(1, len(values) + 1)]


def draw_runs(runs: Mapping[str, Sequence[Numbers]], path: Path, *, mean_over: int = 1) -> None:
    """Write `picture_of` as a PNG. Raises `OSError` where the file cannot be written."""
    picture_of(runs, mean_over=mean_over).savefig(path, dpi=150, format="png")


def picture_of(runs: Mapping[str, Sequence[Numbers]], *, mean_over: int = 1) -> Figure:
    """A panel a metric, a line a run: its running mean over `mean_over` rounds.

    Raises MissingExtraError without matplotlib, ValueError for more than MAX_RUNS runs or without a
    metric to draw.
    """
    if len(runs) > MAX_RUNS:
        raise ValueError(f"at most {MAX_RUNS} runs can be told apart, got {len(runs)}")
    figure_module = require("matplotlib.figure", _PURPOSE)
    found = [name for name in PANELS if any(_points(rounds, name)[1] for rounds in runs.values())]
    if not found:
        raise ValueError(f"the runs measured none of {', '.join(PANELS)}")
    num_columns = min(_COLUMNS, len(found))
    num_rows = -(-len(found) // num_columns)
    height = _PANEL_HEIGHT * num_rows + _LEGEND_HEIGHT * (len(runs) + 1)
    figure: Figure = figure_module.Figure(
        figsize=(_PANEL_WIDTH * num_columns, height), layout="constrained"
    )
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, name in zip(panels, found, strict=False):
        _panel(axes, name, runs, mean_over)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    lines = require("matplotlib.lines", _PURPOSE)
    keys = [
        lines.Line2D([], [], color=color, linestyle=style, label=name)
        for (color, style), name in zip(_LINES, runs, strict=False)
    ]
    figure.legend(handles=keys, loc="outside lower left", fontsize=7, frameon=False)
    if mean_over > 1:
        figure.suptitle(f"Means over {mean_over} rounds; single rounds faint.", fontsize=7.5)
    return figure


def _points(rounds: Sequence[Numbers], name: str) -> tuple[list[float], list[float]]:
    pairs = [(numbers["num_tokens"], numbers[name]) for numbers in rounds if name in numbers]
    return [tokens for tokens, _ in pairs], [value for _, value in pairs]


def _panel(axes: Axes, name: str, runs: Mapping[str, Sequence[Numbers]], mean_over: int) -> None:
    ticker = require("matplotlib.ticker", _PURPOSE)
    for (color, style), rounds in zip(_LINES, runs.values(), strict=False):
        tokens, values = _points(rounds, name)
        if mean_over > 1:
            axes.plot(tokens, values, color=color, linewidth=0.6, alpha=0.2)
        marker = "o" if len(values) == 1 else None  # one point has no line
        axes.plot(
            tokens,
            running_means(values, mean_over),
            color=color,
            linestyle=style,
            linewidth=1.3,
            marker=marker,
        )
    axes.set_title(PANELS[name], fontsize=8)
    axes.set_xlabel("tokens", fontsize=7)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.tick_params(labelsize=7)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
