"""Messages as bytes: one version byte, then msgpack.

A frame of another version or shape raises `ProtocolError`, so that two builds never half-understand
each other.
"""

from typing import TypeVar

import msgspec

from imprint.server.messages.base import Message
from imprint.server.messages.from_worker import FromWorker
from imprint.server.messages.to_worker import ToWorker

PROTOCOL_VERSION = 2

T = TypeVar("T")


class ProtocolError(ValueError):
    """A frame that this build cannot read: wrong version, unknown tag or wrong field."""


_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Message) -> bytes:
    """One frame."""
    return bytes([PROTOCOL_VERSION]) + _encoder.encode(message)


def decode_to_worker(frame: bytes) -> ToWorker:
    """The message of a frame that the API sent; raises `ProtocolError`."""
    return _decode(_to_worker, frame)


def decode_from_worker(frame: bytes) -> FromWorker:
    """The message of a frame that a worker sent; raises `ProtocolError`."""
    return _decode(_from_worker, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    if not frame or frame[0] != PROTOCOL_VERSION:
        found = frame[0] if frame else "an empty frame"
        raise ProtocolError(f"expected protocol version {PROTOCOL_VERSION}, got {found}")
    try:
        return decoder.decode(memoryview(frame)[1:])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"unreadable message: {error}") from error
