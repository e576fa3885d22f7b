"""Practice in reading: answers stand in the text, samples have the asked length."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from imprint.adapters.evaluation.question_files import FileQuestion
from imprint.adapters.training.reading_tasks import Excerpts, Passages, chain, short_chain
from imprint.adapters.training.tasks import Tasks
from imprint.models.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[3] / "models" / "pretrained" / "imprint-tiny"

FACTS = [
    FileQuestion(
        context=f"The mill of {town} was built in {year} beside the old river.",
        question=f"When was the mill of {town} built?",
        answers=(str(year),),
    )
    for town, year in (("Alder", 1712), ("Birch", 1803), ("Cedar", 1866))
]


STORY = FileQuestion(
    context=" ".join(
        f"On day {number} the carter brought {number * 37} loaves to the inn of the village."
        for number in range(101, 200)
    ),
    question="How many loaves were brought on day 150?",
    answers=("5550",),
)


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


def test_a_part_of_a_long_passage_has_the_questions_that_it_answers() -> None:
    again = FileQuestion(context=STORY.context, question="Where to?", answers=("the inn",))
    excerpts = Excerpts([*FACTS, STORY, again])
    asked = [excerpts.draw(random.Random(seed), 900) for seed in range(200)]
    assert all(item.questions == [(STORY.question, "5550")] for item in asked if item.questions)
    assert sum(bool(item.questions) for item in asked) > 150
    for item in asked:
        assert 800 < len(item.document) <= 900
        assert item.document in STORY.context
        assert item.document.split()[0] in STORY.context.split()
        assert item.document.split()[-1] in STORY.context.split()
        assert bool(item.questions) == ("5550" in item.document.split())
    assert excerpts.draw(random.Random(0), 10**6).document == STORY.context
    assert not Excerpts([*FACTS, again])


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


@pytest.mark.parametrize("length", [500, 2000])
def test_parts_of_long_passages_are_followed_by_their_questions(tasks: Tasks, length: int) -> None:
    tokenizer = load_tokenizer(MODEL)  # one whose tokens are as long as in real runs
    tasks = Tasks(tasks.prose, tokenizer, Passages(FACTS), Excerpts([STORY]))
    for seed in range(3):
        sample = tasks.draw("excerpts", random.Random(seed), length)
        assert len(sample.tokens) == len(sample.weights) == length
        text, asked, _ = tokenizer.decode(sample.tokens).partition(f"\nQuestion: {STORY.question}")
        assert asked
        assert "5550" in text
        answer = [t for t, w in zip(sample.tokens, sample.weights, strict=True) if w >= 1.0]
        assert tokenizer.decode(answer).startswith(" 5550\n")


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
    for excerpts in (None, Excerpts(FACTS)):
        without = Tasks(tasks.prose, tasks.tokenizer, Passages(FACTS), excerpts)
        with pytest.raises(ValueError, match="passages of 3000 characters"):
            without.draw("excerpts", random.Random(0), 300)
