"""`imprint eval` from the command line, on the tiny model: reports, resumption, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from imprint.adapters.evaluation.arm_names import ARMS
from imprint.server.cli import main

FEW = ("steps=1", "positions=2", "probe_places=4", "rollout_length=4", "cue_tokens=4")
FAST = ["--max-tokens", "4"] + [
    word for field in FEW for flag in ("--set", "--focus-set") for word in (flag, field)
]


@pytest.fixture
def run(tiny_checkpoint, capsys):
    def run_eval(*arguments, fast=True):
        code = main(["eval", *map(str, arguments), "--model", str(tiny_checkpoint), *FAST * fast])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run_eval


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "context": f"House {i} is blue. Rain falls on it in spring.",
            "question": f"What is house {i}?",
            "answers": ["blue"],
        }
        for i in range(3)
    ]
    return write_lines(tmp_path / "questions.jsonl", rows)


def without_time(folder):
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        for arm in record["arms"].values():
            del arm["seconds"]
    return records


def test_every_task_of_ruler_with_its_plot(run, questions, tmp_path):
    tasks = "niah_single,niah_multikey,niah_multivalue,niah_multiquery,vt,qa"
    code, out, err = run(
        "ruler", "--tasks", tasks, "--lengths", "1500", "--num-documents", 1,
        "--questions", questions, "--arms", "base,adapted,ungated", "--json",
        "--plot", tmp_path / "plot.png",
    )  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [cell["task"] for cell in report["cells"]] == tasks.split(",")
    assert all(list(cell["arms"]) == ["base", "adapted", "ungated"] for cell in report["cells"])
    assert all("gate" in cell for cell in report["cells"])
    assert report["config"]["ruler"]["num_documents"] == 1
    assert report["config"]["focus"]["steps"] == 1
    assert set(report["config"]["inputs"]) == {"haystack", "questions"}
    assert report["interrupted"] is False
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_was_compared(run):
    code, out, _ = run(
        "ruler", "--tasks", "niah_single", "--lengths", "1500", "--num-documents", 1,
        "--arms", "base,reread", "--wordings", "heldout", "--metric", "exact",
    )  # fmt: skip
    assert code == 0
    assert all(f"niah_single ({name}): exact" in out for name in ("vault", "passenger", "distance"))
    assert "reread: read twice" in out
    assert "focus" not in out


def test_questions_longbench_and_documents_are_read_from_files(run, questions, tmp_path):
    code, out, _ = run("qa", questions, "--num-documents", 2, "--arms", "base,focus", "--json")
    assert code == 0
    (cell,) = json.loads(out)["cells"]
    assert (cell["task"], cell["metric"], cell["num_documents"]) == ("qa", "f1", 2)
    (tmp_path / "bench").mkdir()
    row = {"prompt": "x = 1\nNext line of code:", "answers": ["y"], "task": "lcc"}
    write_lines(tmp_path / "bench" / "lcc.jsonl", [row])
    code, out, _ = run("longbench", tmp_path / "bench", "--arms", "base", "--json")
    assert code == 0
    assert [cell["task"] for cell in json.loads(out)["cells"]] == ["lcc"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("It rained on the sea and wind rose. " * 5)
    code, out, _ = run("documents", tmp_path / "own", "--arms", "base,retrieval", "--json")
    assert code == 0
    (cell,) = json.loads(out)["cells"]
    assert (cell["task"], list(cell["arms"])) == ("recall", ["base", "retrieval"])


INTERRUPTED = """
import os, signal, sys
from imprint.server.cli import main

written = []

def interrupt(event, args):
    # Ctrl-C as the second document is about to be written down
    if event == "open" and str(args[0]).endswith("records.jsonl") and args[2] & os.O_APPEND:
        written.append(args[0])
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

# what a shell starts in its background ignores SIGINT, and so do the tests there
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(interrupt)
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_evaluation_reports_what_is_done_and_goes_on(
    run, questions, tiny_checkpoint, tmp_path
):
    arguments = ["qa", str(questions), "--json", "--output"]
    code, out, _ = run(*arguments, tmp_path / "whole")
    assert code == 0
    assert list(json.loads(out)["cells"][0]["arms"]) == list(ARMS)
    command = [sys.executable, "-c", INTERRUPTED, "eval", *arguments, str(tmp_path / "torn")]
    command += ["--model", str(tiny_checkpoint), *FAST]
    torn = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert torn.returncode == 130
    report = json.loads(torn.stdout)
    assert report["interrupted"] is True
    assert report["cells"][0]["num_documents"] == 1
    assert "interrupted after 1 of 3 documents; they are in" in torn.stderr
    code, out, _ = run(*arguments, tmp_path / "torn")
    assert code == 0
    assert json.loads(out)["cells"][0]["num_documents"] == 3
    assert without_time(tmp_path / "torn") == without_time(tmp_path / "whole")


def test_a_folder_of_another_evaluation_is_refused(run, questions, tmp_path):
    arguments = ["qa", questions, "--arms", "base", "--num-documents", 1]
    output = ["--output", tmp_path / "out"]
    assert run(*arguments, *output)[0] == 0
    code, out, err = run(*arguments, *output, "--seed", 1)
    assert (code, out) == (2, "")
    assert "holds another evaluation (seed); give another folder" in err
    shutil.copy(questions, tmp_path / "copy.jsonl")
    with questions.open("a") as file:
        file.write(json.dumps({"context": "c", "question": "q", "answers": "a"}) + "\n")
    assert "(inputs)" in run(*arguments, *output)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "ruler --lengths 100 --tasks niah_single",
            "niah_single, document 0: needles and question",
        ),
        ("ruler --tasks qa", "task qa needs --questions FILE"),
        ("ruler --questions {questions}", "--questions goes with task qa"),
        ("ruler --tasks vt --haystack {questions}", "--haystack goes with a task that hides"),
        ("ruler --question-template {template}", "--question-template goes with --prompt"),
        ("ruler --tasks vt --metric f1", "--metric: vt has match, exact; name one of them"),
        ("ruler --tasks vt --arms magic", "arms: unknown 'magic'"),
        ("ruler --num-documents 0", "--num-documents must be at least 1, got 0"),
        ("ruler --tasks vt --passages 0", "num_passages must be at least 1"),
        ("ruler --tasks vt --device cuda:99", "CUDA devices here"),
        ("qa /nowhere.jsonl", "cannot read /nowhere.jsonl: No such file"),
        ("qa {questions} --focus-set scope=lora", "focus needs scope query_lora"),
        ('qa {questions} --set lora_targets=["x"]', "no projection's name ends in"),
        ("longbench {questions}", "is not a folder"),
        ("documents /nowhere", "/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_told(run, questions, tmp_path, arguments, message):
    template = tmp_path / "template.jinja"
    template.write_text("{question}?", encoding="utf-8")
    files = {"{questions}": str(questions), "{template}": str(template)}
    words = [files.get(word, word) for word in arguments.split()]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_plot_that_cannot_be_made_is_told_before_anything_runs(questions):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from imprint.server.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "eval", "qa", str(questions), "--plot", "p.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a plot needs matplotlib" in done.stderr
