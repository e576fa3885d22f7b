"""Replies and chunks of completions and chat completions in the OpenAI shape. Does no work."""

import time
from typing import Any

from imprint.models.tokenizer import Tokenizer
from imprint.server.generation import TokenInfo

MIN_LOGPROB = -9999.0
"""What the OpenAI API says of a token that has next to no probability."""


def head(id: str, kind: str, model: str) -> dict[str, Any]:
    """What every reply and chunk begins with."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def completion_choice(
    index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    """A choice of a completion, whole or as it comes."""
    return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": logprobs}


def chat_choice(
    index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    """A choice of a chat completion."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "index": index,
        "message": message,
        "finish_reason": finish_reason,
        "logprobs": logprobs,
    }


def chat_delta(
    index: int,
    delta: dict[str, Any],
    finish_reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A choice of a chunk of a chat completion."""
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}


def completion_logprobs(tokenizer: Tokenizer, tokens: list[TokenInfo]) -> dict[str, Any]:
    """`logprobs` of a completion; the sampled token is always among the top ones."""
    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [_clipped(token.logprob) for token in tokens],
        "top_logprobs": [
            {
                token_text(tokenizer, id): _clipped(logprob)
                # the likelier of two tokens with the same text is said last, and stays
                for id, logprob in [(token.id, token.logprob), *reversed(token.top)]
            }
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: list[TokenInfo]) -> dict[str, Any]:
    """`logprobs` of a chat completion's choice."""
    content = [
        {
            **_chat_token(tokenizer, token.id, token.logprob),
            "top_logprobs": [_chat_token(tokenizer, id, value) for id, value in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, id),
        "logprob": _clipped(logprob),
        "bytes": list(tokenizer.token_bytes(id)),
    }


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as text; what is no whole character is shown as its bytes, as the OpenAI API does."""
    data = tokenizer.token_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _clipped(logprob: float) -> float:
    return max(MIN_LOGPROB, logprob)
