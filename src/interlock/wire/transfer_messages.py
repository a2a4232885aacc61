"""What transfer engines say to each other over their control channels. Bytes of segments never go here.

`Said` is a message of core/endpoints. Stamps are (incarnation, attempt); whatever is old in them is dropped there, not here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from interlock.core.endpoint_events import Accept, Heartbeat, Message, Open, Ready, Reject
from interlock.core.endpoint_state import Lane, Offer, Stamp
from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import (
    LABEL_CHARS_MAX,
    LANES_PER_ENDPOINT_MAX,
    NOTICE_BYTES_MAX,
    PIECES_PER_TRANSFER_MAX,
    QUESTION_BYTES_MAX,
    SEGMENTS_MAX,
)

Lanes = Annotated[tuple[Lane, ...], msgspec.Meta(max_length=2 * LANES_PER_ENDPOINT_MAX)]
Offers = Annotated[tuple[Offer, ...], msgspec.Meta(max_length=LANES_PER_ENDPOINT_MAX)]


class Word(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What two transfer engines say to each other."""


class Said(Word, frozen=True):
    """One message between endpoints."""

    what: Literal["open", "accept", "ready", "heartbeat", "reject"]
    me: Stamp
    echo: Stamp | None = None
    lanes: Offers = ()
    chosen: Lanes = ()
    regarding: Stamp | None = None
    highest: Stamp | None = None
    refusal: Annotated[str, msgspec.Meta(max_length=1024)] = ""


class Notify(Word, frozen=True):
    """Number `number` of this sender's life. Repeated until `Notified`; delivered once."""

    number: int
    payload: Annotated[bytes, msgspec.Meta(max_length=NOTICE_BYTES_MAX)]


class Notified(Word, frozen=True):
    """The notice of this number was taken: it need not be said again."""

    number: int


class FindSegments(Word, frozen=True):
    """Which segments of this label (empty: any) do you offer? Answered by `FoundSegments`."""

    label: Annotated[str, msgspec.Meta(max_length=LABEL_CHARS_MAX)] = ""


class FoundSegments(Word, frozen=True):
    """Answers `FindSegments`."""

    segments: Annotated[
        list[tuple[int, int, str, bool]], msgspec.Meta(max_length=SEGMENTS_MAX)
    ]  # number, bytes, label, takes writes


class Pull(Word, frozen=True):
    """Read these pieces of my segments into yours: how a write is done. Answered by `Pulled` when it is over, or by a `Fault`.

    `rows`: little-endian 8-byte (my segment, my offset, your segment, your offset, bytes), one after the other.
    """

    number: int
    incarnation: int
    """The life of yours whose segments are meant."""
    seconds: float
    rows: Annotated[bytes, msgspec.Meta(max_length=40 * PIECES_PER_TRANSFER_MAX)]


class Pulled(Word, frozen=True):
    """The pull is over, and nothing of it touches your memory any more."""

    number: int
    ok: bool
    size_bytes: int
    code: str = ""
    message: str = ""


class Ask(Word, frozen=True):
    """A question of what is built on transfer (the store's nodes), in its own encoding. Answered by `Answer`, or a `Fault`."""

    payload: Annotated[bytes, msgspec.Meta(max_length=QUESTION_BYTES_MAX)]


class Answer(Word, frozen=True):
    """Answers `Ask`, in words of the lane that asked."""

    payload: Annotated[bytes, msgspec.Meta(max_length=QUESTION_BYTES_MAX)]


class AskEcho(Word, frozen=True):
    """Answered by `Echo`: how far is it to you?"""


class Echo(Word, frozen=True):
    """Answers `AskEcho`."""


TransferWord = (
    Said | Notify | Notified | FindSegments | FoundSegments | Pull | Pulled | Ask | Answer | AskEcho | Echo
)


def to_wire(message: Message) -> Said:
    """A message of `core/endpoints` as it travels."""
    match message:
        case Open(_, me, lanes):
            return Said("open", me, lanes=lanes)
        case Accept(_, me, echo, lanes):
            return Said("accept", me, echo, lanes)
        case Ready(_, me, echo, lanes, chosen):
            return Said("ready", me, echo, lanes, chosen)
        case Heartbeat(_, me, echo, lanes, chosen):
            return Said("heartbeat", me, echo, lanes, chosen)
        case Reject(_, me, echo, regarding, highest, refusal):
            return Said("reject", me, echo, (), (), regarding, highest, refusal[:1024])


def from_wire(sender: str, incarnation: int, said: Said) -> Message:
    """Raises `RemoteProtocolError` for what lacks a part or speaks for another life than the channel's."""
    if said.me.incarnation != incarnation:
        raise RemoteProtocolError(f"{sender}@{incarnation} spoke for its life {said.me.incarnation}")
    if said.what == "open":
        return Open(sender, said.me, said.lanes)
    if said.echo is None or (said.what == "reject" and said.highest is None):
        raise RemoteProtocolError(f"a {said.what} of {sender} lacks what it answers")
    if said.what == "reject":
        assert said.highest is not None
        return Reject(sender, said.me, said.echo, said.regarding, said.highest, said.refusal)
    if said.what == "accept":
        return Accept(sender, said.me, said.echo, said.lanes)
    kind = Ready if said.what == "ready" else Heartbeat
    return kind(sender, said.me, said.echo, said.lanes, said.chosen)
