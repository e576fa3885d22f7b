"""How a question is put: plain and Jinja templates, where they come from, what they may not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from imprint.models.config import BUNDLED
from imprint.models.errors import CheckpointError
from imprint.models.prompts import (
    DEFAULT_QUESTION_TEMPLATE,
    ChatMessage,
    QuestionTemplate,
    read_template,
)
from imprint.models.tokenizer import load_tokenizer

CHAT = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint whose template a test may change."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / "tokenizer_config.json").unlink()
    return copy


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        (DEFAULT_QUESTION_TEMPLATE, "\nQuestion: Who?\nAnswer:"),
        ("{question}", "Who?"),
        ("{question} {question}", "Who? Who?"),
        ("\nQ: {{ question }}\nA:\n", "\nQ: Who?\nA:\n"),
        ("{% set q = question | upper %}{{ q }}", "WHO?"),
        ("{{ '{question}' }}{{ question }}", "{question}Who?"),
        (CHAT, "<|user|>Who?\n<|assistant|>"),
    ],
)
def test_templates(source: str, prompt: str) -> None:
    assert QuestionTemplate(source).render(" Who?\n") == prompt


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("\nQ: {question}\nA:", "\nBe brief.\nQ: Who?\nA: Ada\nQ: Why?\nA:"),
        ("\nQ: {{ question }}\nA:", "\nBe brief.\nQ: Who?\nA: Ada\nQ: Why?\nA:"),
        (CHAT, "<|system|>Be brief.\n<|user|>Who?\n<|assistant|>Ada\n<|user|>Why?\n<|assistant|>"),
    ],
)
def test_conversations(source: str, prompt: str) -> None:
    conversation: list[ChatMessage] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada"},
        {"role": "user", "content": "Why?"},
    ]
    template = QuestionTemplate(source)
    assert template.render_chat(conversation) == prompt
    assert template.render_chat(conversation[1:2]) == template.render("Who?")


@pytest.mark.parametrize("source", ["Q {question}", "Q {{ question }}"])
def test_a_question_is_never_a_template(source: str) -> None:
    question = "{{ 7 * 7 }} {question} {% raw %} <b>"
    assert QuestionTemplate(source).render(question) == f"Q {question}"


def test_the_bundled_model_asks_as_it_was_trained() -> None:
    template = load_tokenizer(BUNDLED).question_template
    assert template == DEFAULT_QUESTION_TEMPLATE == "\nQuestion: {question}\nAnswer:"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no place", r"x must contain \{question\} or \{\{ question \}\}"),
        ("{{ 'no place' }}", "does not depend on the question"),
        ("{{ question ", "x: "),
        ("{% if question %}", "x: "),
        ("{{ qestion }}", "'qestion' is undefined"),
        ("{{ raise_exception('only chats') }}{{ question }}", "x: only chats"),
        ("{{ question }}{{ 1 / 0 }}", "division by zero"),
        ("{% include '/etc/passwd' %}{{ question }}", "x: "),
        ("{{ question }}" + " " * 65536, "at most 65536 characters"),
    ],
)
def test_templates_that_cannot_put_a_question(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuestionTemplate(source, origin="x")


@pytest.mark.parametrize(
    "source",
    [
        "{{ question.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}{{ question }}",
        "{{ raise_exception.__globals__ }}{{ question }}",
        "{{ question.format.__self__.__class__ }}",
        "{{ '{0.__class__}'.format(question) }}",
        "{{ messages.append(1) }}{{ question }}",
        "{{ messages[0].update(role='x') }}{{ question }}",
        "{{ self.__init__.__globals__ }}{{ question }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}{{ question }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"unsafe|undefined|not safely callable"):
        QuestionTemplate(source)


def test_the_nearest_template_wins(folder: Path, tmp_path: Path) -> None:
    """The user's file, question_template.jinja, tokenizer_config.json, the card, the default."""

    def asked(question_template: Path | None = None) -> str:
        return load_tokenizer(folder, question_template=question_template).format_question("?")

    assert asked() == "\nQuestion: ?\nAnswer:"
    card = '---\nlicense: mit\nquestion_template: "card {{ question }}"\n---\n# Model\n'
    (folder / "README.md").write_text(card)
    assert asked() == "card ?"
    config = {"question_template": "config {{ question }}", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert asked() == "config ?"
    (folder / "question_template.jinja").write_text("file {{ question }}\n")
    assert asked() == "file ?"
    (tmp_path / "mine").write_text("mine {question}\n\n")
    assert asked(tmp_path / "mine") == "mine ?\n"


@pytest.mark.parametrize(
    "card",
    [
        "# No metadata: question_template\n",
        "---\nlicense: [mit\n---\nbroken, but it says nothing of questions",
        "---\nquestion_template: open",
        "---\ntags: []\n---\nquestion_template: {question} in the text",
    ],
)
def test_cards_that_say_nothing_of_questions(folder: Path, card: str) -> None:
    (folder / "README.md").write_text(card)
    assert load_tokenizer(folder).question_template == DEFAULT_QUESTION_TEMPLATE


def test_unusable_templates_are_named_with_their_place(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("---\nquestion_template: [1\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: its metadata is not valid YAML"):
        load_tokenizer(folder)
    (folder / "README.md").write_text("---\nquestion_template: 3\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: question_template must be a string"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"question_template": "none"}')
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: question_template must"):
        load_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"cannot read the question template .*nowhere"):
        load_tokenizer(folder, question_template=tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff{{ question }}")
    with pytest.raises(CheckpointError, match="cannot read the question template"):
        read_template(tmp_path / "binary")
