"""Text to ids and back, whatever the text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from imprint.models.errors import CheckpointError
from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE
from imprint.models.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "plain words",
    "  spaces  kept  ",
    "line\nbreaks\r\n\ttabs",
    "naïve Größe ñ",
    "漢字かな交じり文",
    "emoji 👩‍👩‍👧‍👦 and 🇩🇪 flags",
    "\u0000 control \u007f",
    "\ufeff byte order mark",
    "العربية עברית",
    "combining e\u0301 stays apart",
    "digits 1234567890",
    "\U0010ffff",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with merges, so that one id may end inside a character."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    inner.train_from_iterator(["plain words and more words", *TEXTS], trainer)
    return Tokenizer(inner, eos_id=0)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("\ud800", "\ufffd"),
        ("a\udc00b", "a\ufffdb"),
        ("x\ud83d", "x\ufffd"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
    ],
)
def test_lone_surrogates_become_replacement_characters(
    tokenizer: Tokenizer, text: str, clean: str
) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == clean
    assert tokenizer.encode_batch([text, "ok"]) == [
        tokenizer.encode(clean),
        tokenizer.encode("ok"),
    ]


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.decode_stream()
    pieces = [stream.step(i) for i in tokenizer.encode(text)]
    assert "".join(piece or "" for piece in pieces) == text
    assert not any("\ufffd" in (piece or "") for piece in pieces)


def test_streams_are_independent(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("漢")
    first, second = tokenizer.decode_stream(), tokenizer.decode_stream()
    assert first.step(ids[0]) is None
    assert second.step(tokenizer.encode("a")[0]) == "a"
    assert "".join(first.step(i) or "" for i in ids[1:]) == "漢"


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0, *tokenizer.encode("hi"), 0]) == "hi"
    stream = tokenizer.decode_stream()
    assert not stream.step(0)


def test_broken_bytes_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("漢")[:1]) == "\ufffd"


def test_question_goes_into_the_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.format_question(" Who?\n") == "\nQuestion: Who?\nAnswer:"
    assert tokenizer.format_question("{braces} {question}") == (
        "\nQuestion: {braces} {question}\nAnswer:"
    )


def test_loads_ids_and_template_of_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 0, 257)
    (folder / "tokenizer_config.json").write_text(json.dumps({"question_template": "Q{question}A"}))
    assert load_tokenizer(str(folder)).format_question("x") == "QxA"
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).question_template == DEFAULT_QUESTION_TEMPLATE


PREFIXES = {
    "normalizer": {"normalizer": normalizers.Prepend("▁")},
    "sequence": {
        "normalizer": normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    },
    "metaspace": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    "bytes": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "split": {
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
        )
    },
}


@pytest.mark.parametrize("parts", PREFIXES.values(), ids=PREFIXES)
def test_text_that_continues_another_gets_no_space(parts: dict[str, Any]) -> None:
    alphabet = ["▁", "\n", *pre_tokenizers.ByteLevel.alphabet()]
    vocab = {token: i for i, token in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    for name, part in parts.items():
        setattr(inner, name, part)
    tokenizer = Tokenizer(inner)
    text = "Question:x"
    plain = [vocab[character] for character in text]
    assert tokenizer.encode(text, continues=True) == plain
    assert tokenizer.encode_batch([text, text], continues=True) == [plain, plain]
    assert tokenizer.decode(tokenizer.encode(text)[:1]) in ("▁", "Ġ")
    assert tokenizer.encode(text)[1:] == plain


def test_text_that_continues_another_is_the_same_without_prefixes(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS, continues=True) == tokenizer.encode_batch(TEXTS)


def test_the_bytes_of_tokens_are_the_texts(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(token) for token in tokens).decode() == text
    assert tokenizer.token_bytes(0) == b"<|end|>"
    assert tokenizer.token_bytes(99_999) == b""


def test_the_bytes_of_sentencepiece_tokens() -> None:
    vocab = {"<0xC3>": 0, "<0xA9>": 1, "▁the": 2, "é": 3}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer = Tokenizer(inner)
    assert [tokenizer.token_bytes(id) for id in range(4)] == [
        b"\xc3",
        b"\xa9",
        b" the",
        "é".encode(),
    ]


def test_unusable_files_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (folder / "tokenizer_config.json").write_text('{"question_template": "no place"}')
    with pytest.raises(CheckpointError, match=r"must contain \{question\}"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(folder)


def test_tokenizer_needs_no_torch(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from imprint.models import load_tokenizer; "
        "load_tokenizer(sys.argv[1]).encode('x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint)], check=True, timeout=60)


def test_tokens_end_where_their_text_ends(tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint)
    text = " aé漢\r\n<b>🙂\u202e"
    ends = tokenizer.token_ends(text)
    assert len(ends) == len(tokenizer.encode(text))
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    assert set(ends) == set(range(1, len(text) + 1))  # bytes: each character has its own token
    assert tokenizer.token_ends("") == []
    assert len(tokenizer.token_ends("a\ud800b")) == len(tokenizer.encode("a\ud800b"))
