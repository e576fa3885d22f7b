"""What an evaluation says: one record per cell and arm, as JSON and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from imprint.adapters.evaluation.runner import Cell, ScoredAnswer
from imprint.adapters.evaluation.statistics import compare


def summarize(cell: Cell, *, seed: int = 0) -> dict[str, Any]:
    """Means per arm and, where the base was run, the paired comparison of exact matches with it."""
    base = cell.arms.get("base")
    return {
        "task": cell.task,
        "wording": cell.wording,
        "length": cell.length,
        "num_documents": len(next(iter(cell.arms.values()))),
        "arms": {
            name: _summarize_arm(answers, None if name == "base" else base, seed)
            for name, answers in cell.arms.items()
        },
    }


def _summarize_arm(
    answers: Sequence[ScoredAnswer], base: Sequence[ScoredAnswer] | None, seed: int
) -> dict[str, Any]:
    num = len(answers)
    summary: dict[str, Any] = {
        "exact": sum(a.exact for a in answers) / num,
        "string_match_all": sum(a.string_match_all for a in answers) / num,
        "adapted_ratio": sum(a.adapted for a in answers) / num,
        "seconds_per_document": sum(a.seconds for a in answers) / num,
    }
    if base is not None:
        comparison = compare([a.exact for a in base], [a.exact for a in answers], seed=seed)
        summary["exact_against_base"] = asdict(comparison)
    return summary


def render(summaries: Sequence[dict[str, Any]]) -> Table:
    """A table with a row per cell and arm."""
    table = Table(title="exact match, greedy; difference to base with its 95 % bootstrap interval")
    for column in ("task", "wording", "length", "arm"):
        table.add_column(column)
    numbers = (
        "n",
        "exact",
        "match all",
        "adapted",
        "difference",
        "better/same/worse",
        "s/document",
    )
    for column in numbers:
        table.add_column(column, justify="right")
    for cell in summaries:
        for arm, values in cell["arms"].items():
            table.add_row(
                cell["task"],
                cell["wording"],
                str(cell["length"]),
                arm,
                str(cell["num_documents"]),
                f"{values['exact']:.3f}",
                f"{values['string_match_all']:.3f}",
                f"{values['adapted_ratio']:.2f}",
                *_difference(values.get("exact_against_base")),
                f"{values['seconds_per_document']:.3f}",
            )
    return table


def _difference(comparison: dict[str, Any] | None) -> tuple[str, str]:
    if comparison is None:
        return "", ""
    low, high = comparison["interval_low"], comparison["interval_high"]
    counts = (comparison[f"num_{name}"] for name in ("better", "same", "worse"))
    return f"{comparison['difference']:+.3f} [{low:+.3f}, {high:+.3f}]", "/".join(map(str, counts))
