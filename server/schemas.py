"""Bodies of requests, checked by pydantic. Knows shapes and ranges; imports no torch, does no work.

Every body forbids extra fields: an option that does not exist is refused by name, never ignored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from imprint.adapters.config import (
    NO_ENCODER,
    NOT_SERVED,
    RefineConfig,
    config_of_focus,
    config_of_study,
)
from imprint.adapters.errors import ConfigError
from imprint.server.errors import InvalidRequestError, clip

MAX_SEED = 2**63 - 1
MAX_STOPS = 4

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Question = Annotated[str, StringConstraints(min_length=1, max_length=32_768)]
Title = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]
Options = Annotated[dict[str, Any], Field(max_length=64)]


class Body(BaseModel):
    """Base of every request body: strict about names and types, documented by docstrings."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        strict=True,
        ser_json_inf_nan="null",
    )


class UploadFields(Body):
    """What may stand beside a file in the form of `POST /v1/documents`."""

    title: Title | None = None
    """A name for people."""
    metadata: Metadata = {}
    """At most 16 short strings, given back as they are."""
    expires_after_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Delete the document, with its adaptations, this long after it was made."""


class CreateDocument(UploadFields):
    """`POST /v1/documents` with JSON."""

    text: str = Field(min_length=1)
    """What to store."""


class CreateAdaptation(Body):
    """`POST /v1/adaptations`."""

    document: str | None = Field(default=None, min_length=1)
    """The text to study."""
    document_id: Name | None = None
    """The id of a stored document, instead of a text."""
    model: Name | None = None
    """The base model's name; may be left out."""
    method: Options | None = None
    """`{"type": "refine", "preset": …}` with any field of RefineConfig, or `{"type": "read"}`."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of every random choice of the adaptation."""
    priority: int = Field(default=0, ge=-4, le=4)
    """Each step up doubles the share of work that this job gets beside others."""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Fail the job after this long."""
    expires_after_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Free the adapter this long after it is ready."""
    idle_expires_after_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Free the adapter when nobody has asked it for this long."""
    metadata: Metadata = {}
    """At most 16 short strings, given back as they are."""

    @model_validator(mode="after")
    def _one_document(self) -> "CreateAdaptation":
        if self.document is None and self.document_id is None:
            raise PydanticCustomError("missing", "give either document or document_id")
        if self.document is not None and self.document_id is not None:
            raise ValueError("give either document or document_id, not both")
        return self


class AppendText(Body):
    """`POST /v1/documents/{id}/append`."""

    text: str = Field(min_length=1)
    """What follows the document's text; it is tokenized on its own."""
    version: int | None = Field(default=None, ge=1)
    """The version that it is appended to; refused where the document has another by now."""
    method: Options | None = None
    """How the new version is adapted; by default the new text is only read."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of every random choice of the adaptation."""


class CreateAnswers(Body):
    """`POST /v1/answers`."""

    document: str | None = Field(default=None, min_length=1)
    """The text to answer from."""
    document_id: Name | None = None
    """The id of a stored document, instead of a text."""
    adaptation: Name | None = None
    """The id of a finished adaptation, instead of a document."""
    questions: list[Question] = Field(min_length=1)
    """Each is answered on its own, from the same document."""
    model: Name | None = None
    """The base model's name; may be left out."""
    focus: bool | Options = True
    """Adapt to the questions first; an object overrides fields of the focus run."""
    method: Options | None = None
    """How the document is adapted before; by default it is read (focus) or refined (no focus)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer."""
    temperature: float = Field(default=0.0, ge=0, le=10, allow_inf_nan=False)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    stop: Stop | list[Stop] = Field(default=["\n"], max_length=MAX_STOPS)
    """Strings that end an answer; they are not part of it."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the focus run and of sampling."""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Give up after this long."""
    stream: bool = False
    """Send progress, tokens and results as server-sent events."""

    @model_validator(mode="after")
    def _one_source(self) -> "CreateAnswers":
        sources = (self.document, self.document_id, self.adaptation)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give one of document, document_id and adaptation")
        if self.adaptation is not None and self.method is not None:
            raise ValueError("method goes with document: an adaptation has been made already")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


def parse_method(
    method: dict[str, Any] | None, *, preset: str, has_encoder: bool = False
) -> dict[str, Any]:
    """The method with every field written out; `has_encoder`: the reward `semantic` can be had.

    Equal jobs then look equal, and stay what they were when a preset changes. Raises
    InvalidRequestError that names the field.
    """
    values = dict(method or {})
    kind = values.pop("type", "refine")
    if kind == "read":
        if values:
            field = next(iter(values))
            raise _invalid(f"method.{field}", f"a read has no field {clip(field)!r}")
        return {"type": "read"}
    if kind != "refine":
        raise _invalid("method.type", f"method.type must be refine or read, got {clip(kind)!r}")
    fields = {"preset": preset, **values}
    with _told_of("method"):
        config = config_of_study(fields)
        _check_served(config, has_encoder)
    return {"type": "refine", **config.to_dict()}


def parse_focus(focus: bool | dict[str, Any], *, has_encoder: bool) -> dict[str, Any] | None:
    """Overrides of the focus run as they are sent to the worker, checked; None: no focus."""
    if focus is False:
        return None
    if focus is True:
        return {}
    with _told_of("focus"):
        _check_served(config_of_focus(focus), has_encoder)
    return dict(focus)


def _check_served(config: RefineConfig, has_encoder: bool) -> None:
    if config.reward == "semantic" and not has_encoder:
        raise ConfigError("reward", NO_ENCODER)
    if config.scope == "full":
        raise ConfigError("scope", NOT_SERVED)


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """A ConfigError becomes the refusal of a request, with the body's field that holds it."""
    try:
        yield
    except ConfigError as error:
        raise _invalid(f"{where}.{clip(error.field)}", f"{where}: {clip(str(error))}") from None


def _invalid(param: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param)
