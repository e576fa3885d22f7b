"""What came of a grid: each point beside the base, on the documents that both have answered.

Knows records and summaries; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from imprint.adapters.evaluation.cases import Cell
from imprint.adapters.evaluation.grid import Point, text_of
from imprint.adapters.evaluation.report import difference_texts, summarize
from imprint.adapters.evaluation.runner import Record


def summarize_points(
    cell: Cell,
    baselines: Sequence[Record],
    points: Sequence[tuple[Point, Sequence[Record]]],
    *,
    metric: str,
    seed: int,
) -> dict[str, Any]:
    """The summary of a cell's baselines, with an arm more for each point that has records of it.

    Such an arm is called by the point's label, and says its `arm`, its `axes` and the
    `num_documents` that it was compared on.
    """
    summary = summarize(cell, baselines, metric=metric, seed=seed)
    by_index = {record.index: record for record in baselines}
    for point, records in points:
        merged = [
            replace(
                by_index[record.index],
                arms={
                    "base": by_index[record.index].arms["base"],
                    point.label: record.arms[point.arm],
                },
            )
            for record in records
            if record.index in by_index
        ]
        if merged:
            own = summarize(cell, merged, metric=metric, seed=seed)
            summary["arms"][point.label] = {
                **own["arms"][point.label],
                "arm": point.arm,
                "axes": point.axes,
                "num_documents": len(merged),
            }
    return summary


def to_markdown(summaries: Sequence[dict[str, Any]], axes: Sequence[str]) -> str:
    """A heading and a table a cell, a row an arm; what a point does not say of an axis is empty."""
    return "\n".join(_cell_markdown(summary, axes) for summary in summaries)


def _cell_markdown(summary: dict[str, Any], axes: Sequence[str]) -> str:
    length = summary["length"]
    size = f"{length} tokens" if length is not None else f"~{summary['tokens_per_document']:.0f}"
    num, metric = summary["num_documents"], summary["metric"]
    names = [
        *("arm", *axes, "n", f"{metric} %", "difference to base", "better/same/worse"),
        *("changed %", "passes", "s"),
    ]
    lines = [
        f"### {summary['title']}, {size}",
        "",
        _row(names),
        _row(["---", *["---"] * len(axes), *["---:"] * 7]),
    ]
    for name, values in summary["arms"].items():
        own = values.get("axes", {})
        lines.append(
            _row(
                [
                    values.get("arm", name),
                    *(text_of(own[axis]) if axis in own else "" for axis in axes),
                    str(values.get("num_documents", num)),
                    f"{100 * values['scores'][metric]:.1f}",
                    *difference_texts(values.get("against_base", {}).get(metric)),
                    f"{100 * values['adapted_ratio']:.0f}",
                    f"{values['token_passes_per_document']:.0f}",
                    f"{values['seconds_per_document']:.2f}",
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"
