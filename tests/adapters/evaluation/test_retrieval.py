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
    # passages of 2 that begin at every token: "rain rain", "rain sea", "sea otter"; rarity is
    # counted in two pieces, "rain rain" and "sea otter"
    index = index_of("rain rain sea otter", 2)
    idf = log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    assert index.scores("Otter?") == pytest.approx([0, 0, idf])
    # "rain" twice in the first passage, and the pair of it once
    assert index.scores("rain, Rain") == pytest.approx([idf * (4.4 / 3.2 + 1), idf, 0])
    assert index.scores("rain otter") == pytest.approx([idf * 4.4 / 3.2, idf, idf])
    assert index.scores("unknown words") == [0, 0, 0]


def test_a_word_at_an_end_of_the_document_is_no_rarer_for_it():
    index = index_of("otter rain rain rain rain rain amber rain rain rain rain rain", 4)
    assert max(index.scores("otter")) == max(index.scores("amber")) > 0


def test_passages_do_not_overlap_and_stand_in_order():
    index = index_of("rain wind sea amber otter code sea stone amber otter rain wind", 4)
    found = texts(index.best("amber otter code", 2))
    # two passages hold all three words; the rarest of them stands in the middle of the second
    assert found == ["amber otter code sea", "stone amber otter rain"]
    assert texts(index.best("amber otter code", 1)) == ["amber otter code sea"]


def test_of_equal_passages_the_one_with_the_answer_in_its_middle_is_taken():
    # passages of 8 begin at 0, 2, 4 ...; all that hold both words score the same
    text = "rain " * 20 + "amber otter " + "sea " * 20
    index = index_of(text, 8)
    assert len({score for score in index.scores("amber otter") if score}) == 1
    assert texts(index.best("amber otter", 1)) == ["rain rain rain rain amber otter sea sea"]


def test_nothing_found_gives_the_first_passages_and_short_documents_what_they_have():
    index = index_of("rain wind sea stone", 2)
    assert texts(index.best("zzz", 2)) == ["rain wind", "sea stone"]
    assert texts(index.best("zzz", 9)) == ["rain wind", "sea stone"]
    assert texts(index_of("rain", 4).best("rain", 3)) == ["rain"]
    # the last passage reaches to the end
    assert texts(index_of("rain wind sea stone code otter amber", 4).best("amber", 1)) == [
        "stone code otter amber"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"passage_tokens": 1}, "passage_tokens must be"), ({"num_passages": 0}, "num_passages must")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**change)
