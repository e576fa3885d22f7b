"""`imprint eval ablate` on the tiny model: a grid, its table, going on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imprint.adapters.evaluation.grid import GridError, parse_grid
from imprint.server.cli import main

GRID = """
benchmark = "qa {questions} --max-tokens 4 --num-documents {num} --model {model}"
baselines = ["reread"]

[refine]
steps = 1
positions = 2
probe_places = 4

[focus]
steps = 1
positions = 2

[[grid]]
arm = ["adapted", "ntp_only"]
reward = ["exact", "edit"]

[[grid]]
arm = "focus"
learning_rate = [1e-3]
"""


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [
        {
            "context": f"House {i} is blue. Rain falls on it in spring, and then again.",
            "question": f"What is house {i}?",
            "answers": ["blue"],
        }
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def ablate(tmp_path: Path, questions: Path, tiny_checkpoint: Path, capsys: Any) -> Any:
    def run(text: str, *flags: object, num: int = 2) -> tuple[int, str, str]:
        path = tmp_path / "grid.toml"
        path.write_text(text.format(questions=questions, model=tiny_checkpoint, num=num))
        code = main(["eval", "ablate", str(path), *map(str, flags)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def test_every_point_is_compared_with_the_base_and_kept(ablate: Any, tmp_path: Path) -> None:
    flags = ["--output", tmp_path / "out", "--json", "--plot", tmp_path / "plot.png"]
    code, out, err = ablate(GRID, *flags)
    assert (code, err) == (0, "")
    report = json.loads(out)
    (cell,) = report["cells"]
    labels = [
        "adapted reward=exact",
        "adapted reward=edit",
        "ntp_only reward=exact",
        "ntp_only reward=edit",
        "focus learning_rate=0.001",
    ]
    assert list(cell["arms"]) == ["base", "reread", *labels]
    assert (report["num_points"], report["interrupted"]) == (5, False)
    for label in labels:
        arm = cell["arms"][label]
        assert arm["num_documents"] == 2
        assert set(arm["against_base"]) == {"f1", "exact"}
    assert cell["arms"][labels[1]]["axes"] == {"reward": "edit"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # a folder for the baselines, one for each study; adapted and ntp_only share theirs
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name.split("-")[0] for name in folders] == ["base", "focus", "study", "study"]
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}
    assert len(before) == 4
    again = json.loads(ablate(GRID, *flags)[1])
    assert again["cells"] == report["cells"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}


def test_what_is_missing_is_run_and_more_points_may_come(ablate: Any, tmp_path: Path) -> None:
    flags = ["--output", tmp_path / "out", "--json"]
    whole = json.loads(ablate(GRID, *flags)[1])["cells"]
    (torn,) = (tmp_path / "out").glob("focus-*/records.jsonl")
    lines = torn.read_bytes().splitlines(keepends=True)
    torn.write_bytes(lines[0] + lines[1][:50])
    more = GRID.replace("[1e-3]", "[1e-3, 1e-2]")
    cells = json.loads(ablate(more, *flags)[1])["cells"]
    assert [without_time(arm) for arm in whole[0]["arms"].values()] == [
        without_time(arm) for arm in list(cells[0]["arms"].values())[:-1]
    ]
    assert list(cells[0]["arms"])[-1] == "focus learning_rate=0.01"
    code, _, err = ablate(GRID, *flags, num=1)
    assert code == 2
    assert "holds another evaluation (num_documents); give another folder" in err


def without_time(arm: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arm.items() if name != "seconds_per_document"}


def test_the_table_is_markdown(ablate: Any) -> None:
    code, out, _ = ablate(GRID, num=1)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("### qa, ~")
    assert lines[2].startswith("| arm | reward | learning_rate | n | f1 % | difference to base |")
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[4].startswith("| base |  |  | 1 |")
    assert lines[6].startswith("| adapted | exact |  | 1 |")
    assert lines[-1].startswith("| focus |  | 0.001 | 1 |")


def grid(**changes: Any) -> dict[str, Any]:
    return {"benchmark": "ruler --tasks vt", "grid": [{"steps": [1, 2]}], **changes}


def test_a_grid_is_every_combination_once() -> None:
    axes = {"arm": ["adapted", "ungated"], "steps": [1, 2], "branches": "mixed"}
    parsed = parse_grid(grid(grid=[axes, {**axes, "steps": 2}, {"lora_targets": [["q_proj"], []]}]))
    assert [point.label for point in parsed.points] == [
        "adapted steps=1 branches=mixed",
        "adapted steps=2 branches=mixed",
        "ungated steps=1 branches=mixed",
        "ungated steps=2 branches=mixed",
        "adapted lora_targets=q_proj",
        "adapted lora_targets=all",
    ]
    assert len(parsed.studies) == 4  # gate and no gate are one study
    assert parsed.baselines == ("base",)
    assert parsed.axes == ["steps", "branches", "lora_targets"]
    assert parsed.points[1].config.steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": []}, "unknown entry 'grids'"),
        ({"benchmark": 3}, "benchmark must be a text"),
        ({"benchmark": "ruler '"}, "benchmark: No closing quotation"),
        ({"grid": []}, r"there is no \[\[grid\]\]"),
        ({"refine": 3}, "refine must be a table"),
        ({"baselines": ["focus"]}, "baselines: 'focus' is none of base, reread"),
        ({"grid": [{"steps": []}]}, "steps has no values"),
        ({"grid": [{"arm": "base"}]}, "arm must be one of adapted"),
        ({"grid": [{"stepz": 1}]}, "adapted stepz=1: unknown field"),
        ({"grid": [{"arm": "focus", "scope": ["lora"]}]}, "focus scope=lora: focus needs scope"),
        ({"grid": [{"arm": "focus", "branches": "mixed"}]}, "focus needs branches recall"),
        ({"grid": [{"steps": list(range(1, 41)), "positions": list(range(1, 41))}]}, "1600 points"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GridError, match=message):
        parse_grid(grid(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("qa {questions}", "qa /nowhere.jsonl"), "cannot read /nowhere.jsonl"),
        (("[[grid]]", "[[grids]]"), "unknown entry 'grids'"),
        (("baselines =", "baselines"), "is not TOML"),
        (("--max-tokens 4", "--max-tokens 0"), "--max-tokens must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_told(ablate: Any, change: tuple[str, str], message: str) -> None:
    code, out, err = ablate(GRID.replace(*change))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_what_is_compared_is_the_grids_to_say(ablate: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        ablate(GRID.replace("--max-tokens 4", "--arms base"))
    assert ended.value.code == 2
    assert "unrecognized arguments: --arms base" in capsys.readouterr().err
