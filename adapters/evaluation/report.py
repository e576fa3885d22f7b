"""What an evaluation says: a summary per cell with its arms, as JSON and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from imprint.adapters.evaluation.arm_names import ARMS
from imprint.adapters.evaluation.cases import Cell
from imprint.adapters.evaluation.runner import Record
from imprint.adapters.evaluation.statistics import compare, judge_gate

GATED, UNGATED = "adapted", "ungated"


def summarize(
    cell: Cell, records: Sequence[Record], *, metric: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Scores and costs of each arm; where the base was run, the paired comparison with it.

    A document's score is the mean over its questions. `metric` is what the table and the plot
    compare; the cell's first one if not given. Raises `ValueError` for one that it does not have,
    or for no records.
    """
    metrics = list(cell.scoring.metrics)
    if metric is not None and metric not in metrics:
        raise ValueError(f"{cell.task} has no metric {metric!r}; it has {', '.join(metrics)}")
    if not records:
        raise ValueError(f"{cell.title} has no records")
    arms = list(records[0].arms)
    scores = {
        arm: {name: [r.arms[arm].mean(name) for r in records] for name in metrics} for arm in arms
    }
    metric = metric or metrics[0]
    summary: dict[str, Any] = {
        "task": cell.task,
        "wording": cell.wording,
        "title": cell.title,
        "length": cell.length,
        "metric": metric,
        "metrics": metrics,
        "num_documents": len(records),
        "num_documents_wanted": cell.num_cases,
        "num_questions": sum(len(record.answers) for record in records),
        "tokens_per_document": sum(record.num_tokens for record in records) / len(records),
        "arms": {arm: _summarize_arm(arm, records, scores, seed) for arm in arms},
    }
    if {"base", GATED, UNGATED} <= set(arms):
        verdicts = judge_gate(*(scores[arm][metric] for arm in ("base", UNGATED, GATED)))
        summary["gate"] = asdict(verdicts)
    return summary


def _summarize_arm(
    arm: str, records: Sequence[Record], scores: dict[str, dict[str, list[float]]], seed: int
) -> dict[str, Any]:
    num, done = len(records), [record.arms[arm] for record in records]
    num_questions = sum(len(record.answers) for record in records)
    summary: dict[str, Any] = {
        "scores": {name: sum(values) / num for name, values in scores[arm].items()},
        "adapted_ratio": sum(one.num_adapted for one in done) / num_questions,
        "seconds_per_document": sum(one.seconds for one in done) / num,
        "token_passes_per_document": sum(one.token_passes for one in done) / num,
    }
    if arm != "base" and "base" in scores:
        summary["against_base"] = {
            name: asdict(compare(scores["base"][name], values, seed=seed))
            for name, values in scores[arm].items()
        }
    return summary


def render(summaries: Sequence[dict[str, Any]]) -> Table:
    """A table with a row per cell and arm, a rule between cells."""
    table = Table(
        title="greedy answers; difference to base in points, with its 95 % bootstrap interval",
        title_justify="left",
        caption=_caption(summaries),
        caption_justify="left",
    )
    table.add_column("task, score", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    for column in ("score %", "difference", "better/same/worse", "delta used %"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("other scores %", no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("passes", justify="right")
    for cell in summaries:
        first = [f"{cell['title']}: {cell['metric']}", _length(cell), _count(cell)]
        for arm, values in cell["arms"].items():
            table.add_row(*first, arm, *_numbers(cell, values))
            first = ["", "", ""]
        table.add_section()
    return table


def _length(cell: dict[str, Any]) -> str:
    length = cell["length"]
    return str(length) if length is not None else f"~{cell['tokens_per_document']:.0f}"


def _count(cell: dict[str, Any]) -> str:
    num, wanted = cell["num_documents"], cell["num_documents_wanted"]
    return str(num) if num == wanted else f"{num} of {wanted}"


def _numbers(cell: dict[str, Any], values: dict[str, Any]) -> list[str]:
    metric = cell["metric"]
    others = [
        f"{name} {100 * score:.1f}" for name, score in values["scores"].items() if name != metric
    ]
    return [
        f"{100 * values['scores'][metric]:.1f}",
        *difference_texts(values.get("against_base", {}).get(metric)),
        f"{100 * values['adapted_ratio']:.0f}" if values["adapted_ratio"] else "-",
        ", ".join(others),
        f"{values['seconds_per_document']:.2f}",
        f"{values['token_passes_per_document']:.0f}",
    ]


def difference_texts(comparison: dict[str, Any] | None) -> tuple[str, str]:
    """The paired difference in points with its interval, and the counts; nothing for the base."""
    if comparison is None:
        return "", ""
    low, high = 100 * comparison["interval_low"], 100 * comparison["interval_high"]
    counts = (comparison[f"num_{name}"] for name in ("better", "same", "worse"))
    difference = f"{100 * comparison['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    return difference, "/".join(map(str, counts))


def _caption(summaries: Sequence[dict[str, Any]]) -> str:
    arms = dict.fromkeys(arm for cell in summaries for arm in cell["arms"])
    lines = [f"{arm}: {ARMS[arm]}" for arm in arms]
    gates = [cell["gate"] for cell in summaries if "gate" in cell]
    if gates:
        harmed, caught, helped, refused = (
            sum(gate[f"num_{name}"] for gate in gates)
            for name in ("harmed", "caught", "helped", "refused")
        )
        lines.append(
            f"The gate caught {caught} of {harmed} documents that {GATED} would have harmed, and "
            f"refused {refused} of {helped} that it would have helped."
        )
    lines.append("s, passes: seconds and token passes a document, its reading and answers included")
    return "\n".join(lines)
