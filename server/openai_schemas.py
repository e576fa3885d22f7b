"""Bodies of completions and chat completions in the OpenAI shape, checked by pydantic.

Every parameter is served or refused by name, with `param`; none is ignored. A parameter that is
null, or that asks for what happens anyway, counts as left out. Imports no torch, does no work.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from imprint.server.errors import InvalidRequestError, clip
from imprint.server.schemas import MAX_SEED, MAX_STOPS, Body, Name, Options, Stop

MAX_CHOICES: Final = 64
MAX_TOP_LOGPROBS: Final = 20

NOT_SERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_k": (),
    "user": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of the OpenAI API that are refused, with the values that ask for nothing."""

Text = Annotated[str, StringConstraints(min_length=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(Body):
    """`stream_options` of a completion."""

    include_usage: bool = False
    """Send one more chunk with the usage before the end."""


class Sampling(Body):
    """What completions and chat completions have in common."""

    model: Name
    """`<base>`, `<base>:<adaptation id>` or `<base>:<document id>`: a document stands for the
    newest adaptation of its newest version, a studied one before one that only read."""
    temperature: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    """0 is greedy."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """Choices for each prompt, each with its own random stream."""
    stop: Stop | list[Stop] | None = Field(default=None, max_length=MAX_STOPS)
    """Strings that end a text; they are not part of it."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Makes sampling repeatable."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logits of tokens that the text holds already."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from a token's logit once for each time that the text holds it."""
    stream: bool = False
    """Send tokens as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_served(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name, neutral in NOT_SERVED.items():
            if name not in given:
                continue
            value = given.pop(name)
            if not any(type(value) is type(same) and value == same for same in neutral):
                raise InvalidRequestError(
                    f"{name} is not supported by this server (got {clip(value)}); leave it out",
                    code="unsupported_parameter",
                    param=name,
                )
        return given

    @model_validator(mode="after")
    def _options_need_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CreateCompletion(Sampling):
    """`POST /v1/completions`."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]] = Field(min_length=1)
    """One prompt or several, as text or as token ids; the model reads it after the document."""
    max_tokens: int = Field(default=16, ge=1)
    """Longest completion of a prompt."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Give each token's log-probability, and those of so many likeliest ones."""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return _list(self.stop)


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    """Nothing but text can be read."""
    text: str
    """The part's text; parts are joined as they are."""


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who said it."""
    content: str | list[TextPart]
    """What was said."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, values: Any) -> Any:
        # a reply's message is sent back with its empty fields
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None}
        return values

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class CreateChatCompletion(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    """The conversation; its last message is the user's. It is put to the model by the checkpoint's
    question template, after the document."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Longest reply."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The older name of `max_completion_tokens`."""
    logprobs: bool = False
    """Give each token's log-probability."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Give those of so many likeliest tokens, too; only with `logprobs`."""
    focus: bool | Options = False
    """Not of the OpenAI API: adapt to the conversation first, as `/v1/answers` does."""

    @model_validator(mode="after")
    def _consistent(self) -> "CreateChatCompletion":
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def longest(self) -> int | None:
        """The longest reply that is asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list; like an answer's, a reply ends with its line by default."""
        return ["\n"] if self.stop is None else _list(self.stop)


class Tokenize(Body):
    """`POST /v1/tokenize`."""

    model: Name | None = None
    """As in completions; by default the base model."""
    prompt: str | None = None
    """A text."""
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=1024)
    """A conversation instead, as in chat completions."""
    return_token_strs: bool = False
    """Give the tokens as text, too."""
    add_special_tokens: Literal[False] = False
    """None are added, to completions neither."""
    add_generation_prompt: Literal[True] = True
    """Part of every prompt that is made of a conversation."""

    @model_validator(mode="after")
    def _one_text(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return self


class Detokenize(Body):
    """`POST /v1/detokenize`."""

    model: Name | None = None
    """As in completions; by default the base model."""
    tokens: list[Token]
    """Ids of the model's vocabulary."""


def _list(stop: str | list[str] | None) -> list[str]:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else list(stop)
