"""Whole evaluations on the tiny model: every document, the same again, and on where one ended."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest

from imprint.adapters.evaluation.cases import Case, Cell, Question
from imprint.adapters.evaluation.question_files import SHORT_ANSWERS
from imprint.adapters.evaluation.results import OtherEvaluationError, ResultFolder, config_hash
from imprint.adapters.evaluation.runner import Evaluation

CONFIG = {"seed": 0, "arms": ["base", "adapted", "focus"], "inputs": {"a.txt": "0f"}}


def make_case(index):
    questions = ("\nWhat fell?", "\nWhere did it fall?")[: 1 + index % 2]
    return Case(
        name=f"document {index}",
        document=f"In the year {index} rain fell on the sea. " * 4,
        questions=tuple(Question(prompt=q, answers=("rain", "it")) for q in questions),
    )


def make_cell(case=make_case, num_cases=3, **change):
    settings = {"task": "qa", "scoring": SHORT_ANSWERS, "max_new_tokens": 4} | change
    return Cell(**settings, num_cases=num_cases, case=case)


@pytest.fixture
def make(setup):
    def make_evaluation(*cells, arms=("base", "adapted", "focus"), **settings):
        return Evaluation(setup, cells or [make_cell()], arms, **settings)

    return make_evaluation


def timeless(records):
    return [
        replace(r, arms={name: replace(arm, seconds=0.0) for name, arm in r.arms.items()})
        for r in records
    ]


def test_every_document_is_scored_in_every_arm_and_again_the_same(make):
    records = list(make().run())
    assert [record.index for record in records] == [0, 1, 2]
    for record in records:
        assert list(record.arms) == ["base", "adapted", "focus"]
        num = 1 + record.index % 2
        assert record.answers == (("rain", "it"),) * num
        for arm in record.arms.values():
            assert len(arm.predictions) == num
            assert {name: len(scores) for name, scores in arm.scores.items()} == {
                "f1": num,
                "exact": num,
            }
    assert timeless(make().run()) == timeless(records)


def test_what_is_done_is_not_done_again(make):
    cells = [make_cell(), make_cell(task="other", length=9)]
    everything = timeless(make(*cells, arms=["base"]).run())
    done = {(cells[0].key, 1), (cells[1].key, 0)}
    rest = timeless(make(*cells, arms=["base"]).run(done))
    assert rest == [everything[i] for i in (0, 2, 4, 5)]


def test_progress_names_the_arm_and_ends_at_the_number_of_documents(make):
    seen = []
    list(make(arms=["base", "reread"]).run((), lambda cell, *update: seen.append(update)))
    each = [(arm, done) for done in range(3) for arm in ("base", "reread")]
    assert seen == [*each, ("", 3)]


def test_a_case_that_cannot_be_asked_is_named(make):
    def refuse(index):
        raise ValueError("too long")

    empty = replace(make_case(0), questions=(Question(prompt="", answers=("x",)),))
    for case, message in (
        (refuse, "qa, document 0: too long"),
        (lambda index: empty, "qa, document 0: a question holds no tokens"),
        (lambda index: replace(make_case(0), document=""), "document 0, arm base: the document"),
    ):
        with pytest.raises(ValueError, match=message):
            list(make(make_cell(case)).run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["magic"]}, "arms: unknown 'magic'; known are base"),
        ({"arms": []}, "arms: unknown none"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


# ---- kept on disk --------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_to_the_same_records(make, tmp_path):
    whole = timeless(make().run())
    process = [ResultFolder(tmp_path / "out", CONFIG)]

    def interrupt(index):
        if index == 2:
            raise KeyboardInterrupt
        return make_case(index)

    def run_until_interrupted():
        for record in make(make_cell(interrupt)).run():
            process[0].append(record)

    with pytest.raises(KeyboardInterrupt):
        run_until_interrupted()
    with pytest.raises(OtherEvaluationError, match="another process is evaluating into"):
        ResultFolder(tmp_path / "out", CONFIG)
    process.clear()  # it ends
    gc.collect()  # the exceptions above may hold frames
    # the writing of a third line was torn as well
    with (tmp_path / "out" / "records.jsonl").open("a") as file:
        file.write('{"task": "qa", "wor')
    again = ResultFolder(tmp_path / "out", CONFIG)
    assert timeless(again.records) == whole[:2]
    for record in make().run({(r.cell_key, r.index) for r in again.records}):
        again.append(record)
    del again
    assert timeless(ResultFolder(tmp_path / "out", CONFIG).records) == whole


def test_a_folder_of_something_else_is_refused(tmp_path):
    ResultFolder(tmp_path / "out", CONFIG)
    ResultFolder(tmp_path / "out", json.loads(json.dumps(CONFIG)))
    with pytest.raises(OtherEvaluationError, match=r"another evaluation \(inputs, seed\)"):
        ResultFolder(tmp_path / "out", CONFIG | {"seed": 1, "inputs": {}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OtherEvaluationError, match=r"not empty and holds no config\.json"):
        ResultFolder(tmp_path / "other", CONFIG)
    path = tmp_path / "out" / "config.json"
    edited = json.loads(path.read_text(encoding="utf-8"))
    edited["sha256"] = config_hash({})
    path.write_text(json.dumps(edited), encoding="utf-8")
    with pytest.raises(OtherEvaluationError, match="its text was changed"):
        ResultFolder(tmp_path / "out", CONFIG)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(OtherEvaluationError, match="not the config of an evaluation"):
        ResultFolder(tmp_path / "out", CONFIG)


def test_a_line_that_is_no_record_is_refused(tmp_path):
    ResultFolder(tmp_path / "out", CONFIG)
    (tmp_path / "out" / "records.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(OtherEvaluationError, match="holds a line that is none of ours"):
        ResultFolder(tmp_path / "out", CONFIG)
