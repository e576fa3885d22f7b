"""Scores by hand, at their edges."""

from __future__ import annotations

import pytest

from imprint.adapters.evaluation.longbench_scoring import (
    QUESTION_TYPES,
    class_score,
    edit_similarity,
    first_full_line,
    first_line,
    whole,
)
from imprint.adapters.evaluation.rouge import rouge_l
from imprint.adapters.evaluation.scoring import (
    Scoring,
    clean_prediction,
    exact_match,
    exact_variables,
    string_match_all,
    string_match_part,
)
from imprint.adapters.evaluation.squad import (
    answer_f1,
    exact_answer,
    normalize_answer,
    words_found,
)


@pytest.mark.parametrize(
    ("prediction", "answers", "match_all", "exact"),
    [
        (" 1234567.", ["1234567"], 1.0, 1.0),
        ("1234567 and 7654321", ["7654321"], 1.0, 0.0),  # the right one comes second
        ("12345678", ["1234567"], 1.0, 0.0),  # only inside a longer number
        ("", ["1234567"], 0.0, 0.0),
        (" 222, 111, and 333.", ["111", "222", "333"], 1.0, 1.0),
        (" 111, 999, and 333", ["111", "222", "333"], 2 / 3, 0.0),
        (" 111 and 111 and 222", ["111", "222"], 1.0, 0.0),
    ],
)
def test_scores_of_needles(prediction, answers, match_all, exact):
    assert string_match_all(prediction, answers) == pytest.approx(match_all)
    assert exact_match(prediction, answers) == exact


def test_variables_are_whole_words_in_any_order():
    answers = ["ABCDE", "FGHIJ"]
    assert exact_variables(" FGHIJ ABCDE and more", answers) == 1.0
    assert exact_variables("FGHIJ, ABCDEX", answers) == 0.0
    assert string_match_all("FGHIJ, ABCDEX", answers) == 1.0
    assert exact_variables("FGHIJ", answers) == 0.0


def test_any_answer_is_enough_where_one_is_asked_for():
    assert string_match_part("the early 11TH century.", ["11th century", "1050"]) == 1.0
    assert string_match_part("the 12th", ["11th century", "1050"]) == 0.0


def test_cleaning_strips_and_turns_control_characters_into_newlines():
    assert clean_prediction("\t one\x00two \n") == "one\ntwo"
    assert string_match_all("The ANSWER", ["answer"]) == 1.0


def test_a_scoring_cuts_before_it_scores():
    scoring = Scoring(metrics={"part": string_match_part, "em": exact_answer}, cut=first_line)
    assert scoring.scores("Rome\nParis", ["Paris"]) == {"part": 0.0, "em": 0.0}
    assert scoring.scores("Paris.\nRome", ["Paris"]) == {"part": 1.0, "em": 1.0}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's  hat!", "cats hat"),
        ("an A, the THE", ""),
        ("Theatre and a half", "theatre and half"),  # articles are whole words
        ("1,000.5 %", "10005"),
        ("“quoted” – dash", "“quoted” – dash"),  # only ASCII punctuation goes
    ],
)
def test_answers_are_normalised_as_squad_does(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1.0, 1.0),
        # 2 words shared; P = 2/4, R = 2/3, F1 = 2 * (1/2 * 2/3) / (1/2 + 2/3) = 4/7
        ("new york city hall", ["York City mayor"], 0.0, 4 / 7),
        # multisets: "x x" against "x y" shares one x; P = R = 1/2
        ("x x", ["x y"], 0.0, 0.5),
        ("Rome", ["Paris", "city of Rome"], 0.0, 0.5),  # P = 1, R = 1/3: the best counts
        ("", ["Paris"], 0.0, 0.0),
        ("the", ["a"], 1.0, 0.0),  # both empty: equal, but no word is shared
    ],
)
def test_exact_match_and_f1_of_short_answers(prediction, answers, em, f1):
    assert exact_answer(prediction, answers) == em
    assert answer_f1(prediction, answers) == pytest.approx(f1)


def test_words_are_found_on_their_boundaries_only():
    assert words_found("It was in Rome, Italy", ["Rome"]) == 1.0
    assert words_found("Jerome", ["Rome"]) == 0.0
    assert words_found("rome is old", ["the Rome is"]) == 1.0
    assert words_found("anything", ["the"]) == 0.0  # nothing is left to find


@pytest.mark.parametrize(
    ("prediction", "answer", "f"),
    [
        ("the cat sat", "the cat sat", 1.0),
        # LCS "w1 w2" and "w1 w3 w5": union w1 w2 w3 w5; m = 5, n = 8; P = 4/8, R = 4/5
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 8 / 13),
        # distinct words: m = 2, n = 2, u = 1 of "a b" against "a a c"
        ("a a c", "a b", 0.5),
        ("Cat", "cat", 0.0),  # case counts
        # order: "b a" and "a b" share one word; the one that gives up the prediction first is b
        ("b a. c", "a b", 0.4),
        # a blank between two full stops is a sentence with an empty word: n = 3
        ("a. . b", "a b", 0.8),
        ("", "a b", 0.0),
        ("...", "a b", 0.0),
    ],
)
def test_rouge_l_of_summaries(prediction, answer, f):
    assert rouge_l(prediction, [answer]) == pytest.approx(f, abs=1e-7)
    assert rouge_l(f" {prediction}\n", ["zzz", answer]) == pytest.approx(f, abs=1e-7)


def test_rouge_l_bears_long_sentences():
    words = " ".join(f"w{i}" for i in range(1500))
    assert rouge_l(words, [words]) == pytest.approx(1.0)


def test_a_class_counts_by_how_many_are_named():
    assert class_score(" Animal", ["Animal"]) == 1.0
    assert class_score("Animal or Food", ["Animal"]) == 0.5
    assert class_score("Animal or Food", ["City"]) == 0.0
    assert class_score("animal", ["Animal"]) == 0.0  # as it is spelled
    assert class_score("", ["Animal"]) == 0.0


def test_no_class_name_is_part_of_another():
    assert len(set(QUESTION_TYPES)) == 50
    pairs = [(a, b) for a in QUESTION_TYPES for b in QUESTION_TYPES if a != b and a in b]
    assert pairs == []


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("return x", "return x", 1.0),
        ("\n\nreturn x\nmore", "return x", 1.0),
        ("# a comment\n```\nreturn x", "return x", 1.0),
        ("# ab\n# cd", "# ab\n# cx", 0.89),  # only comments: the whole response; 16/18
        ("abcd", "abxy", 0.5),  # M = 2, T = 8
        ("abc", "abd", 0.67),  # 4/6
        ("", "x", 0.0),
    ],
)
def test_likeness_of_code(response, answer, score):
    assert edit_similarity(response, [answer]) == score


def test_cuts_of_longbench():
    assert whole("\na\nb") == "\na\nb"
    assert first_line("a\nb") == "a"
    assert first_line("\na") == ""  # a break at the start leaves nothing
    assert first_full_line("\n\na\nb") == "a"
