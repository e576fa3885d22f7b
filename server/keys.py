"""API keys: read from text, kept as hashes, compared in constant time. Knows no HTTP.

A key has a name, and the name owns what is made with it. One name may have several keys, so that
a key can be replaced without a gap.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

LOCAL_OWNER = "local"
"""Owns everything that is made while no keys are configured."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{16,256}")  # printable ASCII, no space, no comma
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class KeysError(ValueError):
    """The keys cannot be used as they are given; the message never shows one."""


class KeyRing:
    """Names and hashes of keys; the keys themselves are not kept."""

    def __init__(self, digests: Iterable[tuple[str, bytes]] = ()) -> None:
        """Pairs of a name and the SHA-256 of a key; raises KeysError for a key of two names."""
        self._digests = tuple(dict.fromkeys(digests))
        if len({digest for _, digest in self._digests}) < len(self._digests):
            names = ", ".join(sorted({name for name, _ in self._digests}))
            raise KeysError(f"one key has two names, of {names}")

    @classmethod
    def parse(cls, text: str) -> "KeyRing":
        """Keys from `NAME:KEY` or `NAME:sha256:HEX`, one a line or with commas between them.

        Empty lines and those that begin with `#` are skipped. Raises KeysError that names the
        entry by its number and never shows it.
        """
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        entries = [entry.strip() for line in lines for entry in line.split(",")]
        entries = [entry for entry in entries if entry]
        return cls(_entry(number, entry) for number, entry in enumerate(entries, start=1))

    @classmethod
    def load(cls, path: Path) -> "KeyRing":
        """Keys of a file; raises KeysError that names it."""
        try:
            ring = cls.parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise KeysError(f"the keys in {path} cannot be read: {error.strerror}") from None
        except (KeysError, UnicodeDecodeError) as error:
            raise KeysError(f"{path}: {error}") from None
        if not ring:
            raise KeysError(f"{path} holds no keys")
        return ring

    def __or__(self, other: "KeyRing") -> "KeyRing":
        return KeyRing((*self._digests, *other._digests))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """The owners, sorted."""
        return sorted({name for name, _ in self._digests})

    def owner_of(self, key: str) -> str | None:
        """The name of the key; None for an unknown one. Takes as long for each."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        owner = None
        for name, known in self._digests:
            if hmac.compare_digest(digest, known):
                owner = name
        return owner


def _entry(number: int, entry: str) -> tuple[str, bytes]:
    name, colon, key = entry.partition(":")
    if not colon:
        raise KeysError(f"key {number} has no name; write NAME:KEY")
    if not _NAME.fullmatch(name):
        raise KeysError(
            f"the name of key {number} must be 1 to 64 of A-Z a-z 0-9 . _ -, "
            "with a letter or digit first"
        )
    if digest := _DIGEST.fullmatch(key):
        return name, bytes.fromhex(digest[1])
    if key.startswith("sha256:"):
        raise KeysError(f"key {number} must have 64 small hexadecimal digits behind sha256:")
    if not _KEY.fullmatch(key):
        raise KeysError(
            f"key {number} must be 16 to 256 printable ASCII characters without spaces and commas"
        )
    return name, hashlib.sha256(key.encode()).digest()
