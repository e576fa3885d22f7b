"""The evaluation on a tiny random model: same documents for every arm, nothing dropped, repeatable.

A random model answers nothing right, so scores are pinned where the answer is scripted.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from imprint.adapters.config import RefineConfig
from imprint.adapters.evaluation.answering import GreedyAnswerer, answer_base, passage
from imprint.adapters.evaluation.haystack import Haystack
from imprint.adapters.evaluation.report import render, summarize
from imprint.adapters.evaluation.runner import Cell, Evaluation, EvaluationConfig, ScoredAnswer
from imprint.adapters.gate import load_neutral
from imprint.models.checkpoint import load_model
from imprint.models.generate import generate_greedy
from imprint.models.tokenizer import load_tokenizer

PROSE = " ".join(f"Sentence number {i} speaks of rain and of the sea." for i in range(60))
SMALL = EvaluationConfig(
    tasks=("niah_single",), lengths=(700,), num_documents=3, batch_size=2, max_new_tokens=6
)


@pytest.fixture(scope="module")
def evaluate(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    fast = {"steps": 2, "group_size": 2, "positions": 2, "probe_places": 4}

    def run(config, on_progress=None):
        evaluation = Evaluation(
            model,
            tokenizer,
            Haystack([PROSE]),
            config,
            RefineConfig.preset("default", **fast),
            RefineConfig.preset("focus", **fast),
            neutral=load_neutral(tiny_checkpoint, tokenizer),
            on_progress=on_progress,
        )
        return list(evaluation.run())

    return run


def without_time(cell):
    return {
        arm: [replace(answer, seconds=0.0) for answer in answers]
        for arm, answers in cell.arms.items()
    }


def test_every_arm_answers_every_document_and_again_the_same(evaluate):
    (first,), (again,) = evaluate(SMALL), evaluate(SMALL)
    assert list(first.arms) == ["base", "adapted", "focus"]
    for answers in first.arms.values():
        assert [answer.document for answer in answers] == [0, 1, 2]
        assert [a.answers for a in answers] == [a.answers for a in first.arms["base"]]
    assert without_time(first) == without_time(again)


def test_an_adaptation_that_the_gate_refuses_is_answered_by_the_base(evaluate):
    (cell,) = evaluate(SMALL)
    for arm in ("adapted", "focus"):
        for base, other in zip(cell.arms["base"], cell.arms[arm], strict=True):
            if not other.adapted:
                assert other.prediction == base.prediction


def test_the_batch_size_changes_no_answer(evaluate):
    base = replace(SMALL, arms=("base",), num_documents=5)
    (alone,), (together,) = evaluate(replace(base, batch_size=1)), evaluate(base)
    texts = [[a.prediction for a in cell.arms["base"]] for cell in (alone, together)]
    assert texts[0] == texts[1]


def test_retrieval_finds_the_needle_and_rereading_reads_twice(tiny_checkpoint, evaluate):
    encode = load_tokenizer(tiny_checkpoint).encode
    needle = "The magic number for amber-otter is 7654321."
    document, query = encode(f"{PROSE} {needle} {PROSE}"), encode("What is it for amber-otter?")
    found = load_tokenizer(tiny_checkpoint).decode(passage(document, query))
    assert "amber-otter" in found
    assert len(passage(document, query)) == 48
    (cell,) = evaluate(replace(SMALL, arms=("base", "reread", "retrieval"), num_documents=2))
    assert [len(answers) for answers in cell.arms.values()] == [2, 2, 2]


def test_progress_ends_at_the_number_of_documents(evaluate):
    seen = []
    evaluate(replace(SMALL, arms=("base",)), lambda *update: seen.append(update))
    assert seen == [("niah_single ruler 700 base", done, 3) for done in (0, 2, 3)]


def test_prompts_can_be_put_as_the_server_puts_them(evaluate):
    ruler, question = (
        evaluate(replace(SMALL, arms=("base",), prompt=prompt))[0]
        for prompt in ("ruler", "question")
    )
    predictions = [[a.prediction for a in cell.arms["base"]] for cell in (ruler, question)]
    assert predictions[0] != predictions[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("niah_double",)}, "tasks: unknown 'niah_double'; known are niah_single"),
        ({"arms": ()}, "arms is empty"),
        ({"wordings": ("x",)}, "wordings: unknown 'x'"),
        ({"num_documents": 0}, "num_documents must be at least 1, got 0"),
        ({"lengths": ()}, "lengths is empty"),
    ],
)
def test_configurations_that_cannot_be_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_greedy_answers_stop_at_the_line_and_equal_plain_decoding(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    answerer = GreedyAnswerer(model, tokenizer, max_new_tokens=12)
    documents = [tokenizer.encode(t) for t in ("Some text.", "Another, rather longer text.")]
    queries = [tokenizer.encode(t) for t in ("\nWhat is it?", "\nWhy?")]
    answers = answer_base(answerer, documents, queries)
    for document, query, answer in zip(documents, queries, answers, strict=True):
        tokens = torch.tensor([document + query])
        ids = generate_greedy(model, tokens, None, num_tokens=12)[0].tolist()
        text = tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)
        assert text.startswith(answer.text)
        assert answer.text == text or text[len(answer.text)] == "\n"


def test_a_newline_before_the_answer_does_not_end_it(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    answerer = GreedyAnswerer(load_model(tiny_checkpoint), tokenizer, max_new_tokens=4)
    newline, letter = tokenizer.encode("\n")[0], tokenizer.encode("a")[0]
    assert not answerer._is_end(newline, [])
    assert not answerer._is_end(newline, [newline])
    assert not answerer._is_end(letter, [letter])
    assert answerer._is_end(newline, [newline, letter])
    assert answerer._is_end(tokenizer.eos_id, [])


def scored(exact):
    return ScoredAnswer(
        document=0,
        num_tokens=10,
        answers=("1",),
        prediction="",
        exact=exact,
        string_match_all=exact,
        seconds=0.5,
        adapted=exact > 0,
    )


def test_the_report_holds_means_and_the_paired_comparison():
    arms = {
        "base": tuple(scored(x) for x in (0.0, 1.0, 0.0, 0.0)),
        "focus": tuple(scored(x) for x in (1.0, 1.0, 1.0, 0.0)),
    }
    cell = Cell(task="niah_single", wording="ruler", length=1024, arms=arms)
    summary = json.loads(json.dumps(summarize(cell)))
    assert summary["num_documents"] == 4
    assert "exact_against_base" not in summary["arms"]["base"]
    focus = summary["arms"]["focus"]
    assert (focus["exact"], focus["adapted_ratio"]) == (0.75, 0.75)
    comparison = focus["exact_against_base"]
    counts = [comparison[f"num_{name}"] for name in ("better", "same", "worse")]
    assert (counts, comparison["difference"]) == ([2, 2, 0], 0.5)
    assert render([summary]).row_count == 2
