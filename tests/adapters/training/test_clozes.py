"""Questions made of sentences: what is asked for stands in them, and the question does not tell."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from imprint.adapters.training.clozes import cloze
from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.tasks import Tasks
from imprint.models.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[3] / "models" / "pretrained" / "imprint-tiny"

SENTENCE = "The ferry carries at most 412 people from the harbour to the small island."


@pytest.fixture(scope="module")
def tasks_of_a_book(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """Over real prose, with the tokenizer of the bundled model."""
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    file = tmp_path_factory.mktemp("book") / "train.jsonl"
    file.write_text(json.dumps({"text": text}), encoding="utf-8")
    return Tasks(Prose([file], max_chars=len(text)), load_tokenizer(MODEL))


def asked(sentence: str, number: int = 200) -> set[tuple[str, str]]:
    drawn = (cloze(random.Random(seed), sentence) for seed in range(number))
    return {pair for pair in drawn if pair is not None}


def test_numbers_and_things_are_asked_for_in_many_ways() -> None:
    pairs = asked(SENTENCE)
    assert {"412", "harbour", "small island"} <= {answer for _, answer in pairs}
    assert len(pairs) > 60
    for question, answer in pairs:
        assert answer in SENTENCE
        assert answer not in question.split()
        assert re.fullmatch(r"[A-Z][^?]*[A-Za-z0-9]\?", question)


@pytest.mark.parametrize(
    ("sentence", "answer", "asking"),
    [
        (SENTENCE, "412", {"How many", "How much", "What number"}),
        ("The old bridge was built by two brothers in 1874 and painted green.", "1874",
         {"When", "In what year", "In which year", "What year"}),
        ("The museum bought the painting for $12,500 from a private collection.", "$12,500",
         {"How much", "How much money", "What"}),
        ("Anna Holm opened the first bakery of the whole valley last spring.", "Anna Holm",
         {"Who", "Whom", "What is the name of"}),
        ("After the long war the painter lived quietly in Lisbon with two cats.", "Lisbon",
         {"Where", "In what place", "What place", "Which place"}),
    ],
)  # fmt: skip
def test_the_question_word_fits_what_is_asked_for(
    sentence: str, answer: str, asking: set[str]
) -> None:
    questions = [question for question, found in asked(sentence) if found == answer]
    assert len(questions) > 10
    for question in questions:
        assert any(question.startswith(f"{words} ") for words in asking), question


def test_a_subject_is_asked_for_with_what_it_did() -> None:
    questions = {question for question, answer in asked(
        "Anna Holm opened the first bakery of the whole valley last spring."
    ) if answer == "Anna Holm"}  # fmt: skip
    assert any(question.startswith("Who opened the first bakery") for question in questions)


@pytest.mark.parametrize(
    "sentence",
    [
        "It cost 12 dollars.",
        "And so they went on and on and on, as they had always done before.",
        "Milk - 12 bottles for the Holm family - and the bread of the whole week.",
        "The passenger bought a ticket with the number 412 at the small station.",
        "Then 14 of us were there, and we were not.",
    ],
)
def test_what_does_not_serve_is_passed_over(sentence: str) -> None:
    assert not asked(sentence)


def test_questions_follow_the_text_that_answers_them(tasks_of_a_book: Tasks) -> None:
    tasks = tasks_of_a_book
    checked = 0
    for seed in range(20):
        sample = tasks.draw("clozes", random.Random(seed), 1024)
        text = tasks.tokenizer.decode(sample.tokens)
        for match in re.finditer(r"\nQuestion: ([^\n]*)\nAnswer: ([^\n]*)\n", text):
            assert match[2] in text[: match.start()]
            checked += 1
    assert checked > 60


def test_some_texts_are_read_again_in_part(tasks_of_a_book: Tasks) -> None:
    tasks = tasks_of_a_book
    again = 0
    for seed in range(40):
        sample = tasks.draw("clozes", random.Random(seed), 1024)
        text = tasks.tokenizer.decode(sample.tokens)
        first = re.search(r"\nQuestion: [^\n]*\nAnswer: ([^\n]*)\n", text)
        assert first is not None
        again += "\n" in text[: first.start()]
    assert 4 < again < 20
