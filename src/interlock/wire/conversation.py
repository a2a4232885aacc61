"""One side of an open channel, without I/O: numbers what is said, judges what is heard.

Shared by the asynchronous and the blocking channel, so that both hold the same rules: a peer keeps its name and life, its
numbers grow, it answers only what was said, and a life that was overtaken is told so.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.errors import RemoteProtocolError, StaleError
from interlock.wire.envelope import Envelope, Rejected
from interlock.wire.framing import InvalidBody, channel_bodies, decode_envelope, encode_frame
from interlock.wire.identity import Identity, KnownPeers


class Invalid(msgspec.Struct, frozen=True):
    """Stands for a body that could not be decoded as anything accepted here."""

    reason: str


class Conversation:
    """`incarnation` is that of the Hello or Welcome: it stays, whatever becomes of `me`."""

    def __init__(self, me: Identity, peer: Identity, accept: Any, known: KnownPeers | None) -> None:
        self.peer, self._me = peer, me
        self._name, self._incarnation = me.name, me.incarnation
        self._bodies = channel_bodies(accept)
        self._known = known
        self._said = 1  # Hello or Welcome
        self._heard = 1

    def say(self, body: msgspec.Struct, answers: int = 0, fds: int = 0) -> tuple[int, bytes]:
        """(number, frame). Raises `LocalProtocolError` when it is too long."""
        frame = encode_frame(self._name, self._incarnation, self._said + 1, answers, body, fds)
        self._said += 1
        return self._said, frame

    def hear(self, frame: bytes) -> tuple[Envelope, Any]:
        """The header and the body, which is `Invalid` where it is none that is accepted here.

        Raises `RemoteProtocolError` when the channel cannot go on, `StaleError` when the peer told us that this life is
        over, `OvertakenError` when the peer's is.
        """
        envelope = decode_envelope(frame)
        if (envelope.sender, envelope.incarnation) != (self.peer.name, self.peer.incarnation):
            raise RemoteProtocolError(
                f"{self.peer} spoke as {envelope.sender}@{envelope.incarnation} on its channel"
            )
        if envelope.number <= self._heard or envelope.answers > self._said:
            raise RemoteProtocolError(
                f"{self.peer} sent message {envelope.number}, answering {envelope.answers}, after its {self._heard} "
                f"and our {self._said}: out of order"
            )
        self._heard = envelope.number
        if (
            self._known is not None
            and (highest := self._known.highest(self.peer.name)) > self.peer.incarnation
        ):
            raise OvertakenError(f"{self.peer} was overtaken by its newer life {highest}", highest=highest)
        try:
            body = self._bodies.decode(envelope.body)
        except InvalidBody as error:
            return envelope, Invalid(str(error))
        if isinstance(body, Rejected):
            self._me.outlived(body.highest)
            raise StaleError(
                f"{self.peer} says: {body.reason}", highest=body.highest, hint="stop this process"
            )
        return envelope, body


class OvertakenError(StaleError):
    """The peer's life is over, not ours: it is told `Rejected` with the highest life known."""
