"""BM25 by hand, and what is handed out: no overlap, document order, ties to the first."""

from __future__ import annotations

from math import log

import pytest

from imprint.adapters.evaluation.retrieval import PassageIndex, RetrievalConfig

WORDS = dict(enumerate(["rain", "wind", "sea", "stone", "amber", "otter", "code"]))


def index_of(text, size, num=4):
    ids = {word: i for i, word in WORDS.items()}
    config = RetrievalConfig(passage_tokens=size, num_passages=num)
    return PassageIndex(
        [ids[word] for word in text.split()],
        lambda tokens: " ".join(WORDS[token] for token in tokens),
        config,
    )


def texts(passages):
    return [" ".join(WORDS[token] for token in passage) for passage in passages]


def test_scores_are_those_of_the_formula():
    # passages of 2 that overlap by 1: "rain rain", "rain sea", "sea otter"
    index = index_of("rain rain sea otter", 2)
    idf_otter = log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    idf_rain = log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    # all passages have the mean length, so the damping is k1 = 1.2
    assert index.scores("Otter?") == pytest.approx([0, 0, idf_otter * 2.2 / 2.2])
    assert index.scores("rain, Rain") == pytest.approx([idf_rain * 4.4 / 3.2, idf_rain, 0])
    assert index.scores("unknown words") == [0, 0, 0]


def test_a_long_passage_counts_for_less():
    def decode(tokens):
        return "otter" if tokens[0] == 0 else "otter sea sea"

    index = PassageIndex([0, 0, 1, 1], decode, RetrievalConfig(passage_tokens=2))
    # 1, 1 and 3 words, 5/3 in the mean; the word is in all of them
    idf = log(1 + 0.5 / 3.5)
    short, long = (2.2 * idf / (1 + 1.2 * (0.25 + 0.75 * words / (5 / 3))) for words in (1, 3))
    assert index.scores("otter") == pytest.approx([short, short, long])


def test_passages_do_not_overlap_and_stand_in_order():
    index = index_of("rain wind amber otter sea stone amber otter code rain", 4)
    found = index.best("amber otter code", 2)
    assert texts(found) == ["rain wind amber otter", "amber otter code rain"]
    assert texts(index.best("amber otter code", 1)) == ["amber otter code rain"]


def test_nothing_found_gives_the_first_passages_and_short_documents_what_they_have():
    index = index_of("rain wind sea stone", 2)
    assert texts(index.best("zzz", 2)) == ["rain wind", "sea stone"]
    assert texts(index.best("zzz", 9)) == ["rain wind", "sea stone"]
    assert texts(index_of("rain", 4).best("rain", 3)) == ["rain"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"passage_tokens": 1}, "passage_tokens must be"), ({"num_passages": 0}, "num_passages must")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**change)
