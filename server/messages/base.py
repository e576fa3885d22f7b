"""What every message is. Knows no message."""

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Base of every message; the class name is the tag."""
