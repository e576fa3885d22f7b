"""Practice in reading: answers stand in the text, samples have the asked length."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from imprint.adapters.evaluation.question_files import FileQuestion
from imprint.adapters.training.reading_tasks import Passages, chain, short_chain
from imprint.adapters.training.tasks import Tasks

FACTS = [
    FileQuestion(
        context=f"The mill of {town} was built in {year} beside the old river.",
        question=f"When was the mill of {town} built?",
        answers=(str(year),),
    )
    for town, year in (("Alder", 1712), ("Birch", 1803), ("Cedar", 1866))
]


def test_passages_come_with_all_their_questions() -> None:
    asked = Passages(FACTS).draw(random.Random(1), len, 2000)
    assert asked is not None
    assert asked.questions
    for question, answer in asked.questions:
        town = question.split()[-2]
        assert f"{town} was built in {answer}" in asked.document


def test_answers_that_cannot_be_read_off_are_left_out() -> None:
    bad = [
        FileQuestion(context="No mill stands here.", question="Is there a mill?", answers=("no",)),
        FileQuestion(context="A mill stands here.", question="Whose?", answers=("the miller's",)),
        FileQuestion(context="x" * 4000, question="What?", answers=("x",)),
    ]
    with pytest.raises(ValueError, match="no question has a short answer"):
        Passages(bad)
    assert Passages([*bad, FACTS[0]]).draw(random.Random(0), len, 40) is None


def test_chains_end_with_their_names() -> None:
    prompt, answer = chain(random.Random(0), lambda text: len(text) // 3, 512)
    names = answer.split()
    assert prompt.endswith("they are:")
    assert f"{len(names)} variables are assigned" in prompt
    for before, name in pairwise(names):
        assert f"VAR {name} = VAR {before} " in prompt
    document, questions = short_chain(random.Random(3), [])
    for question, answer in questions:
        value = next(word for word in question.split() if word.isdigit())
        assert f"VAR {answer.split()[0]} = {value}" in document


@pytest.mark.parametrize("kind", ["queries", "tracking", "chains", "questions"])
@pytest.mark.parametrize("length", [1000, 2000])
def test_samples_have_the_asked_length_and_something_to_answer(
    tasks: Tasks, kind: str, length: int
) -> None:
    tasks = Tasks(tasks.prose, tasks.tokenizer, Passages(FACTS))
    for seed in range(3):
        sample = tasks.draw(kind, random.Random(seed), length)
        assert len(sample.tokens) == len(sample.weights) == length
        assert any(weight >= 1.0 for weight in sample.weights)


def test_several_keys_are_asked_for_together(tasks: Tasks) -> None:
    text = "".join(
        tasks.tokenizer.decode(tasks.draw("queries", random.Random(seed), 1200).tokens)
        for seed in range(12)
    )
    assert "magic numbers for" in text.split("What are all the special")[1]
    assert ", and " in text


def test_questions_need_a_file(tasks: Tasks) -> None:
    with pytest.raises(ValueError, match="needs a file of questions"):
        tasks.draw("questions", random.Random(0), 100)
