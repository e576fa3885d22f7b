"""Needle documents: what is hidden, what is asked, how long they are, and that they can be made
again.
"""

from __future__ import annotations

import re

import pytest
import zstandard

from imprint.adapters.evaluation.haystack import Haystack, split_sentences
from imprint.adapters.evaluation.ruler import TASKS, NeedleTask, build_sample
from imprint.adapters.evaluation.wordings import HELD_OUT, RULER, TRAINING, WORDINGS, join_words
from imprint.adapters.evaluation.words import ADJECTIVES, NOUNS

PROSE = " ".join(f"Sentence number {i} speaks of rain, of wind and of the sea." for i in range(400))
HAYSTACK = Haystack([PROSE])


def num_tokens(text: str) -> int:
    return len(re.findall(r"\w|[^\w\s]", text))


def make(name, **arguments):
    return build_sample(TASKS[name], HAYSTACK, num_tokens=num_tokens, **arguments)


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("wording", WORDINGS.values(), ids=lambda w: w.name)
def test_every_answer_stands_in_the_document_and_only_there(name, wording):
    sample = make(name, length=1500, seed=3, wording=wording, num_answer_tokens=40)
    assert len(sample.answers) == TASKS[name].num_answers == len(set(sample.answers))
    assert all(sample.document.count(answer) == 1 for answer in sample.answers)
    assert not any(answer in sample.query for answer in sample.answers)
    assert all(key in sample.document and key in sample.query for key in sample.keys)
    assert all(re.fullmatch(r"[1-9]\d{6}", answer) for answer in sample.answers)
    assert "{" not in sample.document + sample.query


@pytest.mark.parametrize("length", [700, 1024, 2048])
def test_the_prompt_fills_its_length_and_never_passes_it(length):
    for seed in range(5):
        sample = make("niah_multikey", length=length, seed=seed)
        used = num_tokens(sample.document) + num_tokens(sample.query) + 48
        assert length - 60 <= used <= length


def test_the_same_seed_gives_the_same_sample_and_another_seed_another():
    first, again, other = (make("niah_multivalue", length=900, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.document != other.document


def test_ruler_wording_is_the_published_one():
    single = make("niah_single", length=600, seed=0)
    key, value = single.keys[0], single.answers[0]
    assert single.document.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert f"One of the special magic numbers for {key} is: {value}." in single.document
    assert single.query == (
        f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    many = make("niah_multiquery", length=900, seed=0)
    asked = join_words(many.keys)
    assert many.query.startswith(f"\nWhat are all the special magic numbers for {asked} mentioned")
    assert many.target == f" {join_words(many.answers)}."


def test_held_out_words_and_wordings_are_disjoint_from_training():
    assert not set(ADJECTIVES["train"]) & set(ADJECTIVES["heldout"])
    assert not set(NOUNS["train"]) & set(NOUNS["heldout"])
    assert min(len(words) for table in (ADJECTIVES, NOUNS) for words in table.values()) >= 150
    assert not {w.name for w in TRAINING} & {w.name for w in HELD_OUT}
    assert len(WORDINGS) == 1 + len(TRAINING) + len(HELD_OUT)
    assert len(TRAINING) >= 8
    assert len(HELD_OUT) >= 3
    assert RULER not in TRAINING


def test_too_short_a_length_and_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="tokens too long"):
        make("niah_single", length=40, seed=0)
    with pytest.raises(ValueError, match="num_queries is 2"):
        NeedleTask(name="bad", num_queries=2)
    with pytest.raises(ValueError, match="at most 40 needles"):
        NeedleTask(name="bad", num_keys=11, num_values=4)


def test_sentences_keep_every_word_and_are_bounded():
    text = 'He left. "Why?" she asked.\n\nNobody knew... ' + "word " * 300
    sentences = split_sentences(text)
    assert " ".join(sentences).split() == text.split()
    assert sentences[:2] == ["He left.", '"Why?" she asked.']
    assert max(map(len, sentences)) <= 400


def test_haystack_reads_txt_jsonl_and_zst(tmp_path):

    line = '{"text": "One sentence. Two sentences."}\n'
    (tmp_path / "a.txt").write_text("One sentence. Two sentences.", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line.encode()))
    for name in ("a.txt", "a.jsonl", "a.jsonl.zst"):
        assert Haystack.from_file(tmp_path / name).sentences == ["One sentence.", "Two sentences."]
    (tmp_path / "b.jsonl").write_text('{"body": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 has no text"):
        Haystack.from_file(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        Haystack.from_file(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl.zst").write_bytes(b"not zstd at all")
    with pytest.raises(ValueError, match="not a whole zstd file"):
        Haystack.from_file(tmp_path / "b.jsonl.zst")
    with pytest.raises(ValueError, match=r"haystack must be"):
        Haystack.from_file(tmp_path / "c.pdf")
    with pytest.raises(ValueError, match="holds no text"):
        Haystack([" "])
