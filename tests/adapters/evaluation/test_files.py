"""Questions, LongBench and documents from files: what is read, how it is cut, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from imprint.adapters.evaluation.extras import MissingExtraError, require
from imprint.adapters.evaluation.longbench import LONGBENCH_TASKS, longbench_cells
from imprint.adapters.evaluation.own_documents import document_cells, words_recalled
from imprint.adapters.evaluation.question_files import question_cell, read_questions


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(question):
    return f"\nQ: {question}\nA:"


# ---- questions with their contexts ---------------------------------------------------------------


def rows(*contexts):
    return [
        {"context": context, "question": f"What {i}?", "answers": [f"this {i}"], "id": i}
        for i, context in enumerate(contexts)
    ]


def test_questions_of_one_context_are_one_document(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in rows("A b.", "C d.", "A b."))
    path = tmp_path / "q.jsonl.zst"
    path.write_bytes(zstandard.compress(lines.encode()))
    cell = question_cell(read_questions(path), ask, num_documents=None, seed=0)
    assert (cell.num_cases, cell.task, list(cell.scoring.metrics)) == (2, "qa", ["f1", "exact"])
    first = cell.case(0)
    assert first.document == "A b."
    assert [q.prompt for q in first.questions] == ["\nQ: What 0?\nA:", "\nQ: What 2?\nA:"]
    assert first.questions[1].answers == ("this 2",)


def test_the_seed_draws_the_contexts(tmp_path):
    questions = read_questions(write_lines(tmp_path / "q.jsonl", rows(*"abcdefghij")))
    drawn = []
    for seed in (0, 0, 1):
        cell = question_cell(questions, ask, num_documents=4, seed=seed)
        drawn.append([cell.case(i).document for i in range(cell.num_cases)])
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert len(drawn[0]) == 4
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answers": ["a"]}', "line 1 needs a text 'context'"),
        ('{"context": "c", "question": " ", "answers": ["a"]}', "needs a text 'question'"),
        ('{"context": "c", "question": "q"}', "needs 'answers', a list of texts"),
        ('{"context": "c", "question": "q", "answers": [1]}', "needs 'answers'"),
        ("[1]", "line 1 is no JSON object"),
        ("{", "line 1 is not JSON"),
        ("", "holds no questions"),
    ],
)
def test_lines_that_cannot_be_asked_are_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match=r"must be \.jsonl or \.jsonl\.zst, got q\.csv"):
        read_questions(tmp_path / "q.csv")


# ---- LongBench -----------------------------------------------------------------------------------

PASSAGES = (
    "Answer the question based on the given passages.\n\nPassage 1:\nIt rained.\n\n"
    "Answer the question based on the given passages. Only.\n\nQuestion: What fell?\nAnswer:"
)


def test_prompts_are_cut_where_the_question_begins(tmp_path):
    row = {"prompt": PASSAGES, "answers": ["rain"], "task": "hotpotqa", "max_gen_tokens": 7}
    write_lines(tmp_path / "hotpotqa.jsonl", [row])
    code = "line\nNext line of code: odd\nlast lineNext line of code:"
    row = {"prompt": code, "answers": ["x = 1"], "task": "lcc", "max_gen_tokens": 64}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "lcc.parquet")
    qa, lcc = longbench_cells(tmp_path, num_documents=None, seed=0)
    case = qa.case(0)
    assert case.document == PASSAGES.rpartition("\n\nAnswer the question")[0]
    assert case.document + case.questions[0].prompt == PASSAGES
    assert (qa.task, qa.max_new_tokens, qa.ends_with_line, qa.num_cases) == ("hotpotqa", 7, True, 1)
    assert qa.scoring.scores("rain\nmore", ["rain"]) == {"f1": 1.0}
    assert qa.scoring.scores("\nrain", ["rain"]) == {"f1": 0.0}
    assert lcc.case(1).questions[0].prompt == "Next line of code:"
    assert (lcc.max_new_tokens, lcc.ends_with_line, lcc.num_cases) == (64, False, 2)
    (only,) = longbench_cells(tmp_path, tasks=["lcc"], num_documents=1, seed=0)
    assert (only.task, only.num_cases) == ("lcc", 1)


def test_rulers_files_of_the_same_form_are_read(tmp_path):
    row = {"prompt": PASSAGES, "answer": ["rain", "water"], "task": "ruler_squadqa"}
    write_lines(tmp_path / "ruler_squadqa_delta_net_4096.jsonl", [row])
    write_lines(tmp_path / "ruler_squadqa_lact_4096.jsonl", [row])
    first, second = longbench_cells(tmp_path, num_documents=None, seed=0)
    assert first.title == "ruler_squadqa (delta_net_4096)"
    assert second.title == "ruler_squadqa (lact_4096)"
    assert first.max_new_tokens == 32
    assert first.scoring.scores(" Water fell", row["answer"]) == {"match": 1.0}


@pytest.mark.parametrize("name", sorted(LONGBENCH_TASKS))
def test_every_task_scores_what_is_right(name):
    task = LONGBENCH_TASKS[name]
    right = "Animal" if name == "trec" else "some words"
    (score,) = task.scoring.scores(right, [right]).values()
    assert score == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "answers": ["a"], "task": "nope"}, "row 0: unknown task 'nope'"),
        ({"prompt": "x", "answers": ["a"], "task": "lcc"}, "does not repeat 'Next line of code:'"),
        ({"prompt": "x", "answers": [], "task": "lcc"}, "needs a text 'prompt' and a list"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        longbench_cells(tmp_path, num_documents=None, seed=0)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    cases = [(tmp_path / "none", "is not a folder"), (tmp_path, r"holds no \.parquet")]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            longbench_cells(folder, num_documents=None, seed=0)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        longbench_cells(tmp_path, num_documents=None, seed=0)
    with pytest.raises(ValueError, match="tasks: unknown 'x'"):
        longbench_cells(tmp_path, tasks=["x"], num_documents=None, seed=0)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    code = (
        "import sys, pathlib; sys.modules['pyarrow'] = None\n"
        "from imprint.adapters.evaluation.longbench import longbench_cells\n"
        "longbench_cells(pathlib.Path(sys.argv[1]), num_documents=None, seed=0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "reading .parquet needs pyarrow, which is not installed: pip install" in done.stderr
    with pytest.raises(MissingExtraError, match="a dance needs no_such_module"):
        require("no_such_module.part", "a dance")


# ---- documents of the user's own -----------------------------------------------------------------

WORDS = " ".join(f"word{i}" for i in range(60))


def test_documents_are_asked_what_stands_beside_them_or_for_their_own_words(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("It rained.", encoding="utf-8")
    write_lines(
        tmp_path / "sub" / "a.questions.jsonl", [{"question": "What fell?", "answers": "rain"}]
    )
    (tmp_path / "b.md").write_text(f"\ufeff{WORDS}", encoding="utf-8")
    asked, probed = document_cells(tmp_path, ask, num_documents=None, seed=0)
    assert (asked.task, asked.num_cases, probed.task, probed.num_cases) == (
        "documents", 1, "recall", 1,
    )  # fmt: skip
    case = asked.case(0)
    assert (case.name, case.document) == ("sub/a.txt", "It rained.")
    assert (case.questions[0].prompt, case.questions[0].answers) == (ask("What fell?"), ("rain",))
    case = probed.case(0)
    assert case.document == WORDS
    for question in case.questions:
        assert len(question.prompt.split()) == 8
        assert len(question.answers[0].split()) == 5
        assert f"{question.prompt.strip()} {question.answers[0]}" in WORDS
    assert len({question.prompt for question in case.questions}) == len(case.questions) == 3
    (_, again) = document_cells(tmp_path, ask, num_documents=None, seed=0)
    (_, other) = document_cells(tmp_path, ask, num_documents=None, seed=1)
    assert again.case(0) == case != other.case(0)


@pytest.mark.parametrize("num_words", [13, 14, 26, 500])
def test_probes_lie_within_the_document(tmp_path, num_words):
    words = [f"w{i}" for i in range(num_words)]
    (tmp_path / "a.txt").write_text(" ".join(words), encoding="utf-8")
    (cell,) = document_cells(tmp_path, ask, num_documents=None, seed=3)
    questions = cell.case(0).questions
    assert len(questions) == min(8, max(1, (num_words - 12) // 13))
    for question in questions:
        assert words.index(question.answers[0].split()[-1]) < num_words


def test_recall_is_the_share_of_words_at_their_places():
    assert words_recalled(" a b c x y", ["a b c d"]) == 0.75
    assert words_recalled("b c d", ["a b c d"]) == 0.0
    assert words_recalled("", ["a b"]) == 0.0
    assert words_recalled("a b", ["x y", "a b"]) == 1.0


def test_folders_and_files_that_cannot_be_used_are_named(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            document_cells(tmp_path, ask, num_documents=None, seed=0)

    refused(r"holds no \.txt or \.md files")
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    refused(r"a\.txt is empty")
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    refused(r"a\.txt is not UTF-8 text \(byte 2\)")
    (tmp_path / "a.txt").write_text("too short", encoding="utf-8")
    refused("has 2 words, a recall probe needs 13")
    write_lines(tmp_path / "b.questions.jsonl", [])
    refused(r"b\.questions\.jsonl has no document beside it")
    (tmp_path / "b.questions.jsonl").rename(tmp_path / "a.questions.jsonl")
    refused("holds no questions")
    with pytest.raises(ValueError, match="is not a folder"):
        document_cells(tmp_path / "none", ask, num_documents=None, seed=0)
