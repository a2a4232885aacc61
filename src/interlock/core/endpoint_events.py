"""What endpoints say to each other, what their own process tells them, and what follows. The rules are core/endpoints.

Every message says who sends it and its stamp (`me`), and all but Open the stamp of the receiver that it answers (`echo`). Any of
them may be lost, late or repeated.
"""

from __future__ import annotations

import msgspec

from interlock.core.endpoint_state import Lane, Offer, Stamp

# --- messages ----------------------------------------------------------------------------------------------------


class Open(msgspec.Struct, frozen=True):
    """I want a connection, and listen on these."""

    sender: str
    me: Stamp
    lanes: tuple[Offer, ...]


class Accept(msgspec.Struct, frozen=True):
    """I am paired with your endpoint `echo`, and listen on these. No list yet."""

    sender: str
    me: Stamp
    echo: Stamp
    lanes: tuple[Offer, ...]


class Ready(msgspec.Struct, frozen=True):
    """As Accept, and the lanes are `chosen`: the larger name's list, or the smaller's echo of it."""

    sender: str
    me: Stamp
    echo: Stamp
    lanes: tuple[Offer, ...]
    chosen: tuple[Lane, ...]


class Heartbeat(msgspec.Struct, frozen=True):
    """I am CONNECTED with your endpoint `echo` over `chosen`."""

    sender: str
    me: Stamp
    echo: Stamp
    lanes: tuple[Offer, ...]
    chosen: tuple[Lane, ...]


class Reject(msgspec.Struct, frozen=True):
    """What your endpoint `echo` said to mine, `regarding` (None: its Open), is not current and never will be again.

    `highest`: the highest stamp of yours that I know. `refusal`: not stale but refused, and why.
    """

    sender: str
    me: Stamp
    echo: Stamp
    regarding: Stamp | None
    highest: Stamp
    refusal: str = ""


Statement = Accept | Ready | Heartbeat
Message = Open | Accept | Ready | Heartbeat | Reject

# --- events of this process --------------------------------------------------------------------------------------


class Connect(msgspec.Struct, frozen=True):
    """Somebody wants to be CONNECTED; answered by `Opened` or `OpenFailed`. Many may wait for one handshake."""


class LaneReady(msgspec.Struct, frozen=True):
    """This lane's hello, which named both stamps, is complete: both ends hold it."""

    lane: Lane
    mine: Stamp
    theirs: Stamp


class LaneFailed(msgspec.Struct, frozen=True):
    """This lane could not be opened, or broke."""

    lane: Lane
    mine: Stamp
    theirs: Stamp
    reason: str = ""


class Released(msgspec.Struct, frozen=True):
    """No lane of the retired endpoint can carry a byte any more."""


class Retire(msgspec.Struct, frozen=True):
    """This endpoint is not wanted any more: idle, evicted, or suspected."""

    reason: str


class Tick(msgspec.Struct, frozen=True):
    """It is `now_s` on the monotonic clock. To be told about every HEARTBEAT_SECONDS, with jitter: what is said is repeated."""

    now_s: float


class Close(msgspec.Struct, frozen=True):
    """No connection to this peer any more in this life."""


Event = Message | Connect | LaneReady | LaneFailed | Released | Retire | Tick | Close

# --- effects -----------------------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """To the peer; nothing hangs on its arrival."""

    message: Message


class Dial(msgspec.Struct, frozen=True):
    """Open this lane to the peer, off the data path; its hello names both stamps. Then `LaneReady` or `LaneFailed`."""

    lane: Lane
    parameters: bytes
    mine: Stamp
    theirs: Stamp


class DropLanes(msgspec.Struct, frozen=True):
    """The peer left this pairing before any lane was listed: destroy its lanes. No byte went over them, nothing waits for it."""

    mine: Stamp
    theirs: Stamp


class Opened(msgspec.Struct, frozen=True):
    """CONNECTED: bytes may go over these lanes, and over no other."""

    mine: Stamp
    theirs: Stamp
    lanes: tuple[Lane, ...]


class OpenFailed(msgspec.Struct, frozen=True):
    """Nobody has this endpoint; `reason` is a sentence. To whoever waited in `open`."""

    reason: str


class Retired(msgspec.Struct, frozen=True):
    """Destroy all lanes of endpoint `mine` (shutdown, join, close), listed or not. Then `Released`."""

    mine: Stamp
    theirs: Stamp | None
    reason: str


class Superseded(msgspec.Struct, frozen=True):
    """The peer knows a newer life of this name. Whoever was accepted before must stop; else begin again above `highest`."""

    highest: Stamp


Effect = Send | Dial | DropLanes | Opened | OpenFailed | Retired | Superseded
Effects = tuple[Effect, ...]
