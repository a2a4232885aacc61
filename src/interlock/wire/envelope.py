"""What every message carries: who says it, in which life, which message it is, and what it answers."""

from __future__ import annotations

import msgspec


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The header of one frame. `body` is decoded only after the header was judged: stale senders cost nothing.

    `number` counts the sender's messages on this connection from 1; `answers` is the number of the peer's message that
    this one answers, 0 for none. A late answer to a question that is no longer asked is thus dropped by rule.
    """

    sender: str
    incarnation: int
    number: int
    answers: int
    body: msgspec.Raw
    fds: int = 0
    """Descriptors that came with this frame: the kernel says only that they arrived no later than its first byte."""


class Hello(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """First message of whoever connects."""

    protocol: int
    role: str
    attempt: int
    token: bytes = b""
    life: bytes = b""
    """Drawn at random by each process: two that claim one name and incarnation differ here (hazards E3)."""


class Welcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """First message of whoever was connected to: this is who I am, you are accepted."""

    protocol: int


class Rejected(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """You are not accepted. `highest` is the highest incarnation of you that is known here (0: that is not the reason)."""

    reason: str
    highest: int = 0


class Ping(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Idle is not silence: sent when nothing else was, answered with `Pong`."""


class Pong(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Answers `Ping`."""


class Fault(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The request that this answers was refused or failed; nothing was changed by it."""

    code: str
    message: str
    retryable: bool = False


PROTOCOL_VERSION = 1
