"""Summaries, the table and the plot, from records made up by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from imprint.adapters.evaluation.cases import Cell
from imprint.adapters.evaluation.plot import draw
from imprint.adapters.evaluation.report import render, summarize
from imprint.adapters.evaluation.ruler_suite import RulerConfig, RulerSuite
from imprint.adapters.evaluation.runner import ArmRecord, Record
from imprint.adapters.evaluation.statistics import judge_gate


def make_cell(tokenizer=None, length=1024, num=4) -> Cell:
    config = RulerConfig(tasks=("vt",), lengths=(length,), num_documents=num)
    return RulerSuite(config, tokenizer).cells()[0]


def make_records(cell, scores, **change):
    def arm(name, value):
        return ArmRecord(
            predictions=("x",),
            scores={"match": (value,), "exact": (float(value == 1),)},
            num_adapted=int(name != "base"),
            seconds=0.5,
            token_passes=1000,
        )

    return [
        Record(
            task=cell.task,
            wording=cell.wording,
            length=cell.length,
            index=i,
            name=f"seed {i}",
            num_tokens=900,
            answers=(("x",),),
            arms={name: arm(name, values[i]) for name, values in scores.items()},
        )
        for i in range(len(scores["base"]))
    ]


SCORES = {
    "base": [0.0, 1.0, 0.5, 0.5],
    "adapted": [0.0, 1.0, 0.2, 0.5],
    "ungated": [1.0, 0.0, 0.2, 0.5],
}


def test_a_summary_holds_means_the_paired_comparison_and_what_the_gate_did():
    cell = make_cell()
    summary = json.loads(json.dumps(summarize(cell, make_records(cell, SCORES))))
    assert summary["num_documents"] == summary["num_questions"] == 4
    assert summary["metric"] == "match"
    base, ungated = summary["arms"]["base"], summary["arms"]["ungated"]
    assert "against_base" not in base
    assert base["scores"] == {"match": 0.5, "exact": 0.25}
    assert (base["seconds_per_document"], base["token_passes_per_document"]) == (0.5, 1000)
    assert (base["adapted_ratio"], ungated["adapted_ratio"]) == (0, 1)
    comparison = ungated["against_base"]["match"]
    counts = [comparison[f"num_{name}"] for name in ("better", "same", "worse")]
    assert counts == [1, 1, 2]
    assert comparison["difference"] == pytest.approx((1 - 1 - 0.3) / 4)
    # two are harmed, of which the second is caught; one is helped, and refused
    assert summary["gate"] == {
        "num_harmed": 2, "num_caught": 1, "num_helped": 1, "num_refused": 1,
    }  # fmt: skip


def test_a_documents_score_is_the_mean_of_its_questions():
    arm = ArmRecord(
        predictions=("a", "b"),
        scores={"f1": (1.0, 0.5)},
        num_adapted=0,
        seconds=0.0,
        token_passes=0,
    )
    assert arm.mean("f1") == 0.75


def test_gates_are_judged_by_the_same_document():
    verdicts = judge_gate([1, 1, 0, 0, 1], [0, 0, 1, 1, 1], [1, 0, 0, 1, 0])
    assert (verdicts.num_harmed, verdicts.num_caught) == (2, 1)
    assert (verdicts.num_helped, verdicts.num_refused) == (2, 1)


def test_another_metric_can_be_compared_and_an_unknown_one_not():
    cell = make_cell()
    records = make_records(cell, SCORES)
    assert summarize(cell, records, metric="exact")["metric"] == "exact"
    with pytest.raises(ValueError, match="vt has no metric 'f1'; it has match, exact"):
        summarize(cell, records, metric="f1")
    with pytest.raises(ValueError, match="vt has no records"):
        summarize(cell, [])


def test_the_table_has_a_row_for_each_arm_and_says_what_they_are():
    cell = make_cell(num=9)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render([summarize(cell, make_records(cell, SCORES))]))
    text = console.export_text()
    assert "vt: match" in text
    assert "4 of 9" in text
    assert "-7.5 [" in text
    assert "1/1/2" in text
    assert "ungated: the same study without its gate" in text
    assert "The gate caught 1 of 2 documents" in text


def test_the_plot_is_a_png_for_one_cell_and_for_many(tmp_path):
    cells = [make_cell(length=length) for length in (1024, 2048, 4096, 8192)]
    summaries = [summarize(cell, make_records(cell, SCORES)) for cell in cells]
    for num in (1, 4):
        draw(summaries[:num], tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    without_base = {name: values for name, values in SCORES.items() if name == "adapted"}
    records = make_records(cells[0], {"base": [0.0] * 4, **without_base})
    for record in records:
        del record.arms["base"]
    draw([summarize(cells[0], records)], tmp_path / "alone.png")


def test_a_plot_without_matplotlib_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from imprint.adapters.evaluation.plot import check_plot; check_plot()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "a plot needs matplotlib, which is not installed: pip install" in done.stderr
