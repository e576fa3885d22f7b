"""Variable tracking, questions among distractors, and the cells of a configuration."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from imprint.adapters.evaluation.distractors import DistractorTask
from imprint.adapters.evaluation.haystack import Haystack
from imprint.adapters.evaluation.question_files import FileQuestion
from imprint.adapters.evaluation.ruler_suite import RULER_TASKS, RulerConfig, RulerSuite
from imprint.adapters.evaluation.tracking import build_tracking
from imprint.models.tokenizer import load_tokenizer

QUESTIONS = [
    FileQuestion(
        context=f"Number {i} is the house of the {name} family. It rains there in May.",
        question=f"Who lives in house number {i}?",
        answers=(name, f"the {name} family"),
    )
    for i, name in enumerate(f"Smith{letter}" for letter in "abcdefghijklmnop")
]
SMALL = RulerConfig(tasks=("vt",), lengths=(1500,), num_documents=3)


def num_tokens(text):
    return len(re.findall(r"\w+|[^\w\s]", text))


def statements(document):
    return re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)", document, re.MULTILINE)


def make_task(questions=QUESTIONS, **change):
    settings = {"shortest": 300, "num_answer_tokens": 32, "seed": 0} | change
    return DistractorTask(questions, num_tokens, **settings)


@pytest.mark.parametrize("length", [600, 1024, 4096])
def test_a_chain_is_hidden_in_order_and_fills_its_length(length):
    for seed in range(4):
        sample = build_tracking(length=length, num_tokens=num_tokens, seed=seed)
        shown, hidden = statements(sample.document)[:5], statements(sample.document)[5:]
        value = re.search(r"value (\d{5}) in", sample.question)[1]
        assert [name for name, _ in hidden] == list(sample.answers)
        assert [before for _, before in hidden] == [value, *sample.answers[:-1]]
        assert [len(name) for name, _ in shown] == [3] * 5
        used = num_tokens(sample.document) + num_tokens(sample.query) + 30
        assert length - 40 <= used <= length


def test_tracking_has_rulers_wording_and_a_demonstration_with_its_answer():
    sample = build_tracking(length=2048, num_tokens=num_tokens, seed=1)
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    assert sample.document.startswith(f"{head}\n\n")
    shown = [name for name, _ in statements(sample.document)[:5]]
    assert f"they are: {' '.join(shown)}\n\n{head}\n\n" in sample.document
    value = re.search(r"\d+", sample.question)[0]
    assert sample.query == (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {value}, they are:"
    )
    assert not any(answer in sample.query for answer in sample.answers)


def test_tracking_is_repeatable_and_refuses_what_cannot_hold_the_chain():
    first, again, other = (
        build_tracking(length=900, num_tokens=num_tokens, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.answers != other.answers
    with pytest.raises(ValueError, match="the chain and its question are"):
        build_tracking(length=150, num_tokens=num_tokens, seed=0)


def test_the_gold_passage_is_anywhere_among_numbered_ones():
    task = make_task()
    places = []
    for index in range(12):
        sample = task.sample(index, 300)
        passages = re.findall(r"Document (\d+):\n([^\n]+)", sample.document)
        assert [int(number) for number, _ in passages] == list(range(1, len(passages) + 1))
        gold = [i for i, (_, text) in enumerate(passages) if f"{sample.answers[0]} " in text]
        assert len(gold) == 1
        assert len({text for _, text in passages}) == len(passages) >= 8
        assert num_tokens(sample.document) + num_tokens(sample.query) + 32 <= 300
        places += gold
    assert len(set(places)) > 4
    assert make_task().sample(3, 300) == task.sample(3, 300)


def test_the_same_questions_are_asked_at_every_length():
    task = make_task()
    for index in range(4):
        short, long = task.sample(index, 300), task.sample(index, 400)
        assert short.question == long.question
        assert len(short.document) < len(long.document)
    assert [q.question for q in make_task(seed=1).questions] != [q.question for q in task.questions]


def test_questions_without_their_answer_in_the_context_or_too_long_are_not_asked():
    wrong = replace(QUESTIONS[0], answers=("yes",))
    long = replace(QUESTIONS[1], context=QUESTIONS[1].context * 40)
    asked = make_task([wrong, long, *QUESTIONS[2:]]).questions
    assert len(asked) == len(QUESTIONS) - 2
    assert wrong not in asked
    assert long not in asked


def test_question_prompts_are_rulers():
    sample = make_task().sample(0, 300)
    assert sample.document.startswith(
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words.\n\nThe following are given documents.\n\nDocument 1:\n"
    )
    assert sample.query.endswith(f"words.\n\nQuestion: {sample.question} Answer:")


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


def test_every_task_makes_cells_of_cases(tokenizer):
    config = replace(SMALL, tasks=RULER_TASKS, lengths=(1500, 2000), wordings=("ruler", "vault"))
    haystack = Haystack(["The rain fell on the sea. The wind rose."])
    cells = RulerSuite(config, tokenizer, haystack=haystack, questions=QUESTIONS).cells()
    assert len(cells) == 4 * 2 * 2 + 2 + 2
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        case = cell.case(2)
        (question,) = case.questions
        assert case == cell.case(2) != cell.case(1)
        assert set(cell.scoring.scores("", question.answers).values()) == {0.0}
        perfect = " ".join(question.answers)
        assert cell.scoring.scores(perfect, question.answers)["match"] == 1.0
    assert cells[0].title == "niah_single"
    assert cells[2].title == "niah_single (vault)"


def test_prompts_can_be_put_as_the_server_puts_them(tokenizer):
    (cell,) = RulerSuite(replace(SMALL, prompt="question"), tokenizer).cells()
    prompt = cell.case(0).questions[0].prompt
    assert prompt.startswith("\nQuestion: Find all variables")
    assert prompt.endswith("\nAnswer:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("niah_double",)}, "tasks: unknown 'niah_double'; known are niah_single"),
        ({"tasks": ()}, "tasks is empty"),
        ({"wordings": ("x",)}, "wordings: unknown 'x'"),
        ({"num_documents": 0}, "num_documents must be at least 1, got 0"),
        ({"lengths": ()}, "lengths is empty"),
        ({"tasks": ("qa",)}, "qa needs a file of questions"),
        ({"tasks": ("niah_single",)}, "niah_single needs a text to hide needles in"),
    ],
)
def test_what_cannot_be_run_is_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        RulerSuite(replace(SMALL, **change), tokenizer)


def test_too_few_questions_are_refused_with_their_number(tokenizer):
    config = replace(SMALL, tasks=("qa",), num_documents=17)
    with pytest.raises(ValueError, match="qa: 16 questions have an answer"):
        RulerSuite(config, tokenizer, questions=QUESTIONS).cells()
