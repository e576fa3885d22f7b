"""The arms on a tiny random model: what each reads, what it costs, and when it is the base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from imprint.adapters.config import RefineConfig
from imprint.adapters.errors import AdaptationError
from imprint.adapters.evaluation.answering import GreedyAnswerer
from imprint.adapters.evaluation.arm_names import ARMS
from imprint.adapters.evaluation.arms import CaseArms
from imprint.adapters.evaluation.compute import (
    next_token_config,
    next_token_step,
    token_passes,
)
from imprint.adapters.evaluation.retrieval import PassageIndex
from imprint.adapters.refine import Refiner
from imprint.models.generate import generate_greedy

TEXT = (
    "It rained on the sea. " * 12 + "The code of the amber otter is 7654321. " + "A wind rose. " * 9
)
NUM_TOKENS = len(TEXT)  # one a character
QUESTIONS = ("\nWhat is the code of the amber otter?", "\nWhy?")


@pytest.fixture(scope="module")
def make(setup):
    def make_arms(text=TEXT, questions=QUESTIONS, ends_with_line=True, **change):
        encode = setup.tokenizer.encode
        own = replace(setup, **change)
        answerer = GreedyAnswerer(
            own.model, own.tokenizer, max_new_tokens=6, ends_with_line=ends_with_line
        )
        return CaseArms(own, answerer, encode(text), [encode(q) for q in questions], seed=3)

    return make_arms


def test_every_arm_answers_every_question_and_again_the_same(make):
    first, again = make(), make()
    for arm in ARMS:
        one, other = first.run(arm), again.run(arm)
        assert len(one.texts) == len(QUESTIONS)
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
        assert one.seconds > 0


def test_answers_are_those_of_plain_decoding(make, setup):
    answers = make(ends_with_line=False).base()
    encode = setup.tokenizer.encode
    for question, text in zip(QUESTIONS, answers.texts, strict=True):
        tokens = torch.tensor([encode(TEXT) + encode(question)])
        ids = generate_greedy(setup.model, tokens, None, num_tokens=6)[0].tolist()
        assert text == setup.tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)


def test_many_questions_are_answered_as_alone(make):
    questions = [f"\nWhat of {i}?" for i in range(19)]
    together = make(questions=questions).base()
    assert together.texts == tuple(make(questions=[q]).base().texts[0] for q in questions)


def test_a_line_ends_an_answer_but_not_before_it(make, setup):
    answerer = make().answerer
    newline, letter = setup.tokenizer.encode("\n")[0], setup.tokenizer.encode("a")[0]
    assert not answerer._is_end(newline, [])
    assert not answerer._is_end(newline, [newline])
    assert not answerer._is_end(letter, [letter])
    assert answerer._is_end(newline, [newline, letter])
    assert answerer._is_end(setup.tokenizer.eos_id, [])
    assert not make(ends_with_line=False).answerer._is_end(newline, [newline, letter])


def test_passes_are_counted_in_tokens(make):
    arms = make(questions=QUESTIONS[:1])
    answered = arms.base().token_passes - NUM_TOKENS
    assert len(QUESTIONS[0]) <= answered <= len(QUESTIONS[0]) + 6
    assert 2 * NUM_TOKENS < arms.reread().token_passes <= 2 * NUM_TOKENS + len(QUESTIONS[0]) + 6
    # a passage of 32 tokens, then two with a line break between them, then after the document
    question = len(QUESTIONS[0])
    assert 32 + question <= arms.retrieval().token_passes <= 32 + question + 6
    assert 65 + question <= arms.retrieval_top().token_passes <= 65 + question + 6
    after = arms.retrieval_after().token_passes
    assert NUM_TOKENS + 66 + question <= after <= NUM_TOKENS + 66 + question + 6


def test_passages_are_those_of_the_question(setup):
    tokenizer = setup.tokenizer
    index = PassageIndex(tokenizer.encode(TEXT), tokenizer.decode, setup.retrieval)
    (best,) = index.best(QUESTIONS[0], 1)
    assert "the amber otter" in tokenizer.decode(best)


def test_what_the_gate_refuses_is_answered_by_the_base_and_without_gate_not(make, setup):
    # no gain passes a margin of 100 nats; large steps change the answers of a random model
    strict = setup.refine.replace(probe_margin=100.0, learning_rate=1.0, steps=3)
    arms = make(refine=strict)
    base, adapted, ungated = (arms.run(arm) for arm in ("base", "adapted", "ungated"))
    assert adapted.texts == base.texts
    assert adapted.num_adapted == 0
    assert adapted.detail["accepted"] is False
    assert ungated.num_adapted == len(QUESTIONS)
    assert ungated.texts != base.texts


def test_a_document_too_short_to_study_is_answered_by_the_base(make):
    arms = make(text="Rain.")
    texts = arms.run("base").texts
    for arm in ("adapted", "ungated", "ntp_only"):
        answers = arms.run(arm)
        assert (answers.texts, answers.num_adapted) == (texts, 0)
    focus = arms.run("focus")  # reads it again, but learns nothing
    assert focus.num_adapted == 0
    assert any(question["passage_tokens"] > 0 for question in focus.detail["questions"])


def test_an_empty_document_is_refused(make):
    with pytest.raises(AdaptationError, match="no tokens"):
        make(text="").run("base")


def test_focus_tells_of_each_question(make):
    answers = make().run("focus")
    assert len(answers.detail["questions"]) == len(QUESTIONS)
    assert answers.num_adapted == sum(
        q["reason"] == "recall improved" for q in answers.detail["questions"]
    )


@pytest.mark.parametrize("scope", ["query_lora", "lora", "state", "full"])
def test_a_studied_document_is_focused_on_from_what_its_study_left(make, setup, scope):
    kept = setup.refine.replace(
        scope=scope, steps=6, probe_confidence=0.0, held_steps=0, neutral_margin=10.0
    )
    arms = make(refine=kept)
    adapted, focused = arms.run("adapted"), arms.run("adapted_focus")
    assert adapted.num_adapted == len(focused.detail["questions"]) == len(QUESTIONS)
    of_study = {"document"} if scope == "query_lora" else {"document", "focus"}
    assert focused.num_adapted == sum(
        question["alpha"] is not None or question["way"] in of_study
        for question in focused.detail["questions"]
    )
    assert focused.token_passes > adapted.token_passes
    # where focus does nothing, the study's own answers are left
    idle = setup.focus.replace(probe_margin=100.0, focus_passages=0)
    plain = make(refine=kept, focus=idle)
    assert plain.run("adapted_focus").texts == adapted.texts != plain.run("focus").texts


def test_a_document_whose_study_was_refused_is_focused_on_as_if_read(make, setup):
    arms = make(refine=setup.refine.replace(probe_margin=100.0))
    focused, studied = arms.run("focus"), arms.run("adapted_focus")
    assert (studied.texts, studied.num_adapted) == (focused.texts, focused.num_adapted)
    assert studied.token_passes > focused.token_passes


@pytest.mark.parametrize("scope", ["query_lora", "lora"])
def test_next_token_training_costs_what_the_study_costs(setup, scope):
    document = setup.tokenizer.encode(TEXT)
    study = setup.refine.replace(scope=scope, steps=3, group_size=4, patience=3)
    passes = _study_passes(setup, document, study)
    places = _num_places(document, study)
    neutral = len(setup.neutral)
    plain = next_token_config(
        study, num_tokens=len(document), num_places=places, num_neutral=neutral, budget=passes
    )
    assert plain.lambda_rl == 0
    assert plain.steps > study.steps if scope == "query_lora" else plain.steps >= study.steps
    one_step = next_token_step(plain, len(document)) + places * 13
    # blends that its gate tried come on top
    blends = 2 * (places * 13 + neutral + (len(document) if scope == "lora" else 0))
    assert -one_step <= _study_passes(setup, document, plain) - passes <= one_step + blends


def test_a_step_of_next_token_training_is_counted_as_it_is(setup):
    document = setup.tokenizer.encode(TEXT)
    config = setup.refine.replace(lambda_rl=0.0, steps=1, blend_factors=[1.0])
    more = config.replace(steps=2)
    # a probe of 4 places of 8 + 5 tokens after each step
    difference = _study_passes(setup, document, more) - _study_passes(setup, document, config)
    assert difference == next_token_step(config, len(document)) + 4 * 13


def _study_passes(setup, document, config: RefineConfig) -> int:
    refiner = Refiner(setup.model, document, config, seed=0, neutral=setup.neutral)
    for _ in refiner.run():
        pass
    return token_passes(refiner.usage)


def _num_places(document, config: RefineConfig) -> int:
    return min(config.probe_places, len(document) // (8 * config.rollout_length))
