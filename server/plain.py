"""Values as a message can carry them. Knows JSON; knows nothing of who says what to whom."""

from typing import Any

import msgspec


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """A copy in JSON's own types; numbers that are not finite become None.

    Raises TypeError for anything else, tensors included: what is sent must be chosen.
    """
    built: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
    return built
