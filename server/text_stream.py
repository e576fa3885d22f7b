"""From token ids to text, piece by piece: whole characters only, and never past a stop string.

Knows one sequence's output; knows nothing of models or batches.
"""

from collections.abc import Sequence
from typing import Protocol


class DecodeStream(Protocol):
    """What a tokenizer's `decode_stream()` gives."""

    def step(self, token_id: int) -> str | None:
        """The text that this token completes, or None while a character is incomplete."""


class StopMatcher:
    """Holds text back while it might be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [string for string in stop if string]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take new text, return what is safe to show; after a stop string nothing is."""
        if self.stopped:
            return ""
        text = self._held + text
        # the one that is complete first, so that it does not matter how the text came in pieces
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((self._overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text can follow."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if stop.startswith(text[len(text) - length :]):
                return length
        return 0


class TextStream:
    """The text of one sequence: incremental detokenisation, then stop strings."""

    def __init__(self, stream: DecodeStream, stop: Sequence[str]) -> None:
        self._stream = stream
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token; may be empty."""
        return self._matcher.push(self._stream.step(token_id) or "")

    def flush(self) -> str:
        """The rest, at the sequence's end. Bytes of an incomplete character are dropped."""
        return self._matcher.flush()
