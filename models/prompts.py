"""How a question is put to a model that has read a document: the templates and where they are.

A template is Jinja, as the hub's `chat_template` is, run in a sandbox that lets it neither call
code nor change anything; how long it runs is not bounded. Texts with `{question}` and no Jinja
are templates, too. Imports no torch, and Jinja only for a Jinja template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypedDict

from imprint.models.errors import CheckpointError

DEFAULT_QUESTION_TEMPLATE: Final = "\nQuestion: {question}\nAnswer:"
"""Used where neither the user nor the checkpoint gives a template."""
TEMPLATE_FILE: Final = "question_template.jinja"

Render = Callable[[list["ChatMessage"], str], str]
"""From a conversation and its last question to the prompt."""

_MAX_TEMPLATE_CHARS = 65_536
_PROBES = ("Which one?", "How many are there?")


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


class QuestionTemplate:
    """Turns a question into the text that follows the document.

    A Jinja template sees `question`, and the names that a chat template expects: `messages` (the
    question as the one user message), `add_generation_prompt` (true), `bos_token` and `eos_token`
    (empty: the document stands before this text), `tools` and `documents` (none).
    """

    def __init__(self, source: str, *, origin: str = "question_template") -> None:
        """Raises CheckpointError naming `origin` if the template cannot put a question."""
        self.source = source
        self._origin = origin
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"{origin}: a template has at most {_MAX_TEMPLATE_CHARS} characters, "
                f"got {len(source)}"
            )
        is_jinja = "{{" in source or "{%" in source
        if not is_jinja and "{question}" not in source:
            raise CheckpointError(f"{origin} must contain {{question}} or {{{{ question }}}}")
        self._render = _jinja(source, origin) if is_jinja else _plain(source)
        self._sees_messages = is_jinja and _looks_at(source, "messages")
        first, second = (self.render(probe) for probe in _PROBES)
        if first == second:
            raise CheckpointError(f"{origin}: the template's text does not depend on the question")

    def render(self, question: str) -> str:
        """The prompt for one question."""
        question = question.strip()
        return self._render([{"role": "user", "content": question}], question)

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for a conversation whose last message is the user's.

        A template that looks at `messages` sees them all. With one that looks at `question` only,
        each question of the conversation is put by the template and followed by its reply; what
        the system says stands on lines of their own. Raises CheckpointError where the template
        refuses the conversation.
        """
        if self._sees_messages:
            return self._render(list(messages), messages[-1]["content"].strip())
        return "".join(self._turn(message["role"], message["content"]) for message in messages)

    def _turn(self, role: str, content: str) -> str:
        if role == "user":
            return self.render(content)
        return f" {content.strip()}" if role == "assistant" else f"\n{content.strip()}"


def read_template(file: Path) -> QuestionTemplate:
    """The template in a file of the user's or of a checkpoint; one final line break is dropped."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the question template {file}: {error}") from None
    return QuestionTemplate(source.removesuffix("\n"), origin=str(file))


def checkpoint_template(folder: Path, tokenizer_config: dict[str, Any]) -> QuestionTemplate:
    """The template a checkpoint brings: question_template.jinja, else `question_template` in its
    tokenizer_config.json, else in the metadata of its card (README.md), else the default."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return read_template(file)
    places: list[tuple[str, dict[str, Any]]] = [("tokenizer_config.json", tokenizer_config)]
    if not tokenizer_config.get("question_template"):
        places.append(("README.md", _card_metadata(folder / "README.md")))
    for file_name, settings in places:
        source = settings.get("question_template")
        if source:
            origin = f"{file_name}: question_template"
            if not isinstance(source, str):
                raise CheckpointError(f"{origin} must be a string, got {json.dumps(source)}")
            return QuestionTemplate(source, origin=origin)
    return QuestionTemplate(DEFAULT_QUESTION_TEMPLATE)


def _card_metadata(card: Path) -> dict[str, Any]:
    """The YAML block at the top of a model card; empty unless it says how a question is put."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    block, end, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not end or "question_template" not in block:
        return {}
    import yaml

    try:
        metadata = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{card}: its metadata is not valid YAML: {error}") from None
    return metadata if isinstance(metadata, dict) else {}


def _plain(source: str) -> Render:
    return lambda _, question: source.replace("{question}", question)


def _looks_at(source: str, name: str) -> bool:
    """Whether a Jinja template that is known to parse uses a variable."""
    from jinja2 import Environment, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    return name in meta.find_undeclared_variables(environment.parse(source))


def _jinja(source: str, origin: str) -> Render:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # as the hub runs chat templates, save that unknown names are errors and line ends are kept
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.loopcontrols"],
    )

    def refuse(message: object) -> NoReturn:
        raise TemplateError(str(message))

    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise CheckpointError(f"{origin}: {error}") from None

    def render(messages: list[ChatMessage], question: str) -> str:
        try:
            return template.render(
                question=question,
                messages=messages,
                add_generation_prompt=True,
                bos_token="",
                eos_token="",
                tools=None,
                documents=None,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise CheckpointError(f"{origin}: {error}") from None

    return render
