"""Frames: 4 bytes of length, big-endian, then one msgpack `Envelope`; and what may be said in them.

Two attacks are answered here. A length is judged before anything is read or allocated for it. And a body is decoded
only as one of the types that its receiver named: msgspec walks the whole envelope first, so that no length inside it can
claim more than arrived, and builds nothing but those types.
"""

from __future__ import annotations

import functools
from typing import Any, Union

import msgspec

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import FDS_PER_MESSAGE_MAX, FRAME_BYTES_MAX, NAME_CHARS_MAX
from interlock.wire.envelope import Envelope, Fault, Hello, Ping, Pong, Rejected, Welcome

HEADER_BYTES = 4
_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
"""What msgspec raises on bytes from outside; ValueError covers invalid UTF-8."""


class InvalidBody(Exception):  # noqa: N818 - not an error of the channel: it is answered with a Fault
    """The envelope is sound, its body is none of the types that are accepted here."""


def encode_frame(
    sender: str, incarnation: int, number: int, answers: int, body: msgspec.Struct, fds: int = 0
) -> bytes:
    """Raises `LocalProtocolError` when the frame would be longer than any receiver takes."""
    raw = msgspec.Raw(_encoder.encode(body))
    envelope = _encoder.encode(Envelope(sender, incarnation, number, answers, raw, fds))
    if len(envelope) > FRAME_BYTES_MAX:
        raise LocalProtocolError(
            f"a {type(body).__name__} of {len(envelope)} bytes does not fit into a frame of {FRAME_BYTES_MAX}",
            hint="send it in parts",
        )
    return len(envelope).to_bytes(HEADER_BYTES, "big") + envelope


def frame_length(header: bytes, limit_bytes: int) -> int:
    """Raises `RemoteProtocolError` for a length that is not allowed, before anything is allocated for it."""
    length = int.from_bytes(header, "big")
    if not 0 < length <= limit_bytes:
        raise RemoteProtocolError(
            f"the peer announced a frame of {length} bytes; 1 to {limit_bytes} are allowed here"
        )
    return length


def decode_envelope(frame: bytes) -> Envelope:
    """Raises `RemoteProtocolError` for anything but a sound envelope."""
    try:
        envelope = _envelopes.decode(frame)
    except _MALFORMED as error:
        raise RemoteProtocolError(f"the peer sent a frame that is no message: {error}") from error
    if not 0 < len(envelope.sender) <= NAME_CHARS_MAX:
        raise RemoteProtocolError(
            f"the peer's name has {len(envelope.sender)} characters; 1 to {NAME_CHARS_MAX} are allowed"
        )
    if envelope.incarnation <= 0 or envelope.number <= 0 or envelope.answers < 0:
        raise RemoteProtocolError("the peer's incarnation and message numbers must be positive")
    if not 0 <= envelope.fds <= FDS_PER_MESSAGE_MAX:
        raise RemoteProtocolError(
            f"the peer announced {envelope.fds} descriptors; at most {FDS_PER_MESSAGE_MAX} are allowed"
        )
    return envelope


class BodyDecoder:
    """Decodes bodies as one of `accept` (a Struct or a union of tagged ones) or as the channel's own messages."""

    def __init__(self, accept: Any, *own: type) -> None:
        self._decoder = msgspec.msgpack.Decoder(Union[(accept, *own)])

    def decode(self, body: msgspec.Raw) -> Any:
        """Raises `InvalidBody` in words."""
        try:
            return self._decoder.decode(body)
        except _MALFORMED as error:
            raise InvalidBody(str(error)) from error


@functools.lru_cache(maxsize=256)
def channel_bodies(accept: Any) -> BodyDecoder:
    """What an open channel may hear."""
    return BodyDecoder(accept, Ping, Pong, Fault, Rejected)


HELLO_BODIES = BodyDecoder(Hello)
WELCOME_BODIES = BodyDecoder(Welcome, Rejected)
