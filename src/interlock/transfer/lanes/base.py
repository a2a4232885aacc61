"""What a lane is, whatever carries its bytes: dialled once, used while listed, destroyed for good.

A *kind* belongs to an engine: it listens, says in an offer how it is dialled, and dials. A *lane* belongs to one pairing of two
endpoints. The rules that every kind keeps (`interlock.testing.check_lane` checks them):

* No byte goes over a lane before `list_it`; the owner's end refuses.
* `carry` returns at once. A carrier that joined a transfer leaves it exactly once, and touches its memory never after.
* A lane that breaks says so once (`broken`), gives its chunks back, and is used no more. It is destroyed and made anew, never reset.
* `destroy` returns when no thread is in the lane and its descriptors are closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from interlock.core.endpoint_state import Lane as LaneName
from interlock.core.endpoint_state import Stamp
from interlock.core.errors import InterlockError
from interlock.transfer.outcomes import Outcome, Transfer
from interlock.transfer.prepared import PreparedRead


class LaneUnusable(InterlockError):  # noqa: N818
    """This kind of lane cannot be had to that peer; the sentence says why, for `explain`."""


class Pairing(msgspec.Struct, frozen=True):
    """Between whom a lane is, in whose attempts."""

    me: str
    peer: str
    mine: Stamp
    theirs: Stamp


class Lane(Protocol):
    """One lane of one pairing, at one of its two ends."""

    name: LaneName

    def list_it(self, *, is_only: bool) -> None:
        """Both sides agreed on it: bytes may go. `is_only`: the other side listed none of this kind, so it reads over ours."""
        ...

    def carry(self, transfer: Transfer) -> bool:
        """Take chunks of it until none is left. False: this lane has no way to do so now. From any thread."""
        ...

    def carry_here(self, transfer: Transfer) -> bool:
        """As `carry`, but the calling thread itself may do the work, and returns when it is done or has been handed on."""
        ...

    def read_now(self, prepared: PreparedRead, deadline_s: float) -> Outcome | None:
        """All of it at once, by the calling thread alone, if that is possible now: the outcome, and no buffer is touched any more.

        `deadline_s`: of `monotonic_s`. None: it is not, or was not to the end; `carry` it. Possible only for the life of this pairing.
        """
        ...

    def check(self, now_s: float) -> None:
        """Once a second: is there a connection that should move bytes and does not?"""
        ...

    async def destroy(self) -> None:
        """Shutdown, join, close."""
        ...

    def explain(self) -> list[str]:
        """In sentences: what carries bytes, and why not something faster."""
        ...


class LaneKind(Protocol):
    """One kind of lane for all peers of an engine: listens, dials, makes lanes."""

    kind: str
    rank: int
    """Lower is tried first."""

    async def start(self) -> None: ...

    def offer(self, peer: str) -> bytes:
        """How `peer` may dial it: with a secret of its own."""
        ...

    async def dial(
        self, name: LaneName, parameters: bytes, pairing: Pairing, broken: Callable[[str], None]
    ) -> Lane:
        """Opens the lane to the peer that made this offer: both ends hold it then.

        Raises `LaneUnusable` in words, `ConnectionError`, `RemoteProtocolError`; bounded by the caller.
        """
        ...

    async def close(self) -> None: ...
