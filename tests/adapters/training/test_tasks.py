"""What the bundled model practises: lengths, weights, and that answers are in the text."""

from __future__ import annotations

import random
import re

import pytest

from imprint.adapters.evaluation.wordings import HELD_OUT
from imprint.adapters.evaluation.words import ADJECTIVES, NOUNS
from imprint.adapters.training.samples import FIRST_WEIGHT, PROSE_WEIGHT, Sample
from imprint.adapters.training.tasks import PROSE_SHARE, Tasks

KINDS = (
    "repeat", "needles", "ruler", "queries", "dense", "dense_lists", "lists", "pairs",
    "associations", "prose", "rereads", "sentences", "clozes",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 256, 1024])
def test_samples_have_the_asked_length_and_a_weight_per_token(
    tasks: Tasks, kind: str, length: int
) -> None:
    sample = tasks.draw(kind, random.Random(1), length)
    assert len(sample.tokens) == len(sample.weights) == length


@pytest.mark.parametrize("kind", KINDS)
def test_the_random_stream_decides_everything(tasks: Tasks, kind: str) -> None:
    first, again = (tasks.draw(kind, random.Random(7), 256) for _ in range(2))
    other = tasks.draw(kind, random.Random(8), 256)
    assert first.tokens == again.tokens
    assert first.weights == again.weights
    assert first.tokens != other.tokens


@pytest.mark.parametrize("kind", ["needles", "ruler", "queries", "dense", "dense_lists", "rereads"])
def test_every_answer_stands_in_the_document_before_its_question(tasks: Tasks, kind: str) -> None:
    checked = 0
    for seed in range(30):
        sample = tasks.draw(kind, random.Random(seed), 512)
        for start, stop in answer_spans(sample.weights):
            answer = tasks.tokenizer.decode(sample.tokens[start:stop])
            before = tasks.tokenizer.decode(sample.tokens[:start])
            for number in re.findall(r"\d{3,9}", answer):
                assert number in before
                checked += 1
    assert checked > 30


@pytest.mark.parametrize(("kind", "low", "high"), [("rereads", 0.5, 1.0), ("queries", 0.0, 0.05)])
def test_what_is_asked_for_is_read_twice_where_passages_are_read_again(
    tasks: Tasks, kind: str, low: float, high: float
) -> None:
    checked = twice = 0
    for seed in range(40):
        sample = tasks.draw(kind, random.Random(seed), 1024)
        if not (spans := answer_spans(sample.weights)):
            continue  # this tokenizer's sentences are long: all is cut off
        start, stop = spans[0]
        before = tasks.tokenizer.decode(sample.tokens[:start])
        for number in re.findall(r"\d{3,9}", tasks.tokenizer.decode(sample.tokens[start:stop])):
            twice += before.count(number) == 2
            checked += 1
    assert checked > 20
    assert low <= twice / checked <= high


def test_an_association_is_asked_with_the_value_that_its_key_has(tasks: Tasks) -> None:
    checked = 0
    for seed in range(30):
        sample = tasks.draw("associations", random.Random(seed), 256)
        for start, stop in answer_spans(sample.weights):
            value = tasks.tokenizer.decode(sample.tokens[start:stop])
            line = tasks.tokenizer.decode(sample.tokens[:start]).rsplit("\n", 1)[-1]
            before = tasks.tokenizer.decode(sample.tokens[: start - 1])
            if stop < len(sample.tokens) and line:  # not cut off at the end
                assert value in before
                checked += 1
    assert checked > 100


def test_values_are_asked_in_the_order_of_the_keys_and_then_of_the_document(tasks: Tasks) -> None:
    """A line says `key value`; a question is the keys, joined, and then all of their values."""
    checked = 0
    for seed in range(200):
        sample = tasks.draw("lists", random.Random(seed), 512)
        text = tasks.tokenizer.decode(sample.tokens)
        lines: list[tuple[str, str]] = []
        for line in text.split("\n")[:-1]:
            if match := re.fullmatch(r"(\w+) (\d)", line):
                lines.append((match[1], match[2]))
            elif match := re.fullmatch(r"((?:\w+, )+and \w+) ((?:\d, )+and \d)", line):
                keys = re.findall(r"\w+", match[1].replace(", and ", ", "))
                values = re.findall(r"\d", match[2])
                known = [value for key in keys for k, value in lines if k == key]
                if {key for key, _ in lines} >= set(keys) and len(values) == len(known):
                    assert values == known
                    checked += 1
            else:
                lines = []
    assert checked > 20


def test_the_first_characters_of_every_value_weigh_most() -> None:
    sample = Sample()
    sample.add_answer([[1, 2, 3, 4], [5, 6, 7, 8, 9, 10], [11, 12]])
    assert sample.tokens == list(range(1, 13))
    heavy = [token for token, w in zip(sample.tokens, sample.weights, strict=True) if w > 1]
    assert heavy == [1, 2, 3, 5, 6, 7, 8, 9, 11, 12]
    assert set(sample.weights) == {1.0, FIRST_WEIGHT}


def test_some_of_the_prose_is_predicted_and_weighs_the_same_in_all(tasks: Tasks) -> None:
    sample = tasks.draw("prose", random.Random(2), 2048)
    predicted = [weight for weight in sample.weights if weight > 0]
    assert len(predicted) / 2048 == pytest.approx(PROSE_SHARE, abs=0.04)
    assert sum(sample.weights) / 2048 == pytest.approx(PROSE_WEIGHT, rel=0.15)


def test_repeats_weigh_one_where_the_span_has_been_seen(tasks: Tasks) -> None:
    sample = tasks.draw("repeat", random.Random(3), 256)
    for start, stop in answer_spans(sample.weights):
        span = sample.tokens[start:stop]
        seen = sample.tokens[:start]
        assert any(seen[i : i + len(span)] == span for i in range(len(seen)))


def test_nothing_held_out_is_practised(tasks: Tasks) -> None:
    held_out_keys = {f"{a}-{n}" for a in ADJECTIVES["heldout"] for n in NOUNS["heldout"]}
    openings = [wording.needle.split("{")[0] for wording in HELD_OUT]
    for seed in range(40):
        text = tasks.tokenizer.decode(tasks.draw("needles", random.Random(seed), 512).tokens)
        assert not any(opening in text for opening in openings)
        assert not held_out_keys & set(re.findall(r"[a-z]+-[a-z]+", text))


def answer_spans(weights: list[float]) -> list[tuple[int, int]]:
    """Runs of tokens that weigh one or more."""
    edges = [0.0, *weights, 0.0]
    starts = [i for i in range(len(weights)) if edges[i + 1] >= 1.0 > edges[i]]
    stops = [i for i in range(1, len(weights) + 1) if edges[i] >= 1.0 > edges[i + 1]]
    return list(zip(starts, stops, strict=True))
