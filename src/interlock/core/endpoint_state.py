"""What one endpoint is: whose connection to whom, in which attempt, over which lanes. The rules are core/endpoints."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Phase(StrEnum):
    """Where one side's endpoint stands."""

    IDLE = "IDLE"
    """Nothing to the peer; its Open is answered. The stamp is that of the next endpoint."""
    CONNECTING = "CONNECTING"
    """Our Open was sent; which of the peer's endpoints we talk to is not known yet."""
    WAIT_READY = "WAIT_READY"
    """Paired with one endpoint of the peer; lanes are dialled, listed, echoed."""
    CONNECTED = "CONNECTED"
    """The peer echoed our Ready. Lives by heartbeats."""
    RETIRING = "RETIRING"
    """Over for good; its lanes are being destroyed. The stamp is that of the next endpoint already."""
    CLOSED = "CLOSED"


class Stamp(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Which life, and which endpoint towards this peer in that life. Only grows."""

    incarnation: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.incarnation}/{self.attempt}"


NOBODY = Stamp(0, 0)


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A kind of lane that its sender listens on, and what a dialler must know (address, token, QP numbers): opaque here.

    Nothing is ever told from parameters: a restarted peer may have the same ones (Mooncake took it for a duplicate).
    """

    kind: str
    parameters: bytes = b""


class Lane(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A directed way for bytes between two paired endpoints."""

    kind: str
    dialler: str


class Endpoint(msgspec.Struct, frozen=True):
    """This side, `name`, of the connection to one `peer`, for one life of this process. Begin it with its first five fields."""

    name: str
    peer: str
    incarnation: int
    offers: tuple[Offer, ...]
    attempt: int = 1
    phase: Phase = Phase.IDLE
    known: Stamp = NOBODY
    """The highest that any message of the peer said of itself. What is older is not listened to."""
    theirs: Stamp | None = None
    """The peer's endpoint that this one is paired with."""
    their_offers: tuple[Offer, ...] = ()
    ready: tuple[Lane, ...] = ()
    """Of the chooser: the lanes that completed a hello."""
    failed: tuple[Lane, ...] = ()
    chosen: tuple[Lane, ...] = ()
    """The list. Made once a pairing, by the larger name; never changed."""
    is_wanted: bool = False
    """Somebody here waits for CONNECTED."""
    is_closing: bool = False
    expires_s: float | None = None
    """Deadline of the handshake, or heartbeat lease; None until the next tick sets it."""
    choose_s: float | None = None
    """When to list what is ready, although other lanes might follow."""

    @property
    def stamp(self) -> Stamp:
        """(incarnation, attempt) of this side, which every word of it carries."""
        return Stamp(self.incarnation, self.attempt)

    @property
    def is_chooser(self) -> bool:
        """The larger identity chooses the lanes; the smaller echoes the list."""
        return self.name > self.peer

    @property
    def candidates(self) -> tuple[Lane, ...]:
        """The lanes that these two may have: each kind that both know, dialled from either side."""
        kinds = {offer.kind for offer in self.offers}
        return tuple(
            Lane(offer.kind, dialler)
            for offer in self.their_offers
            if offer.kind in kinds
            for dialler in (self.name, self.peer)
        )
