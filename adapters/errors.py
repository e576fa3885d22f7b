"""What can go wrong with an adaptation or an adapter, said so that the user can act on it."""

from __future__ import annotations


class AdaptationError(Exception):
    """An adaptation cannot go on. `code` is a stable name for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CorruptAdapterError(Exception):
    """A stored adapter is torn, foreign or of another model; the message names the file."""


class ConfigError(ValueError):
    """A setting that cannot be used. `field` names it, the message carries its value."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
