"""Which fronts have put their requests on disk: a part of the fleet being SUSPENDED (decision 017).

A front that keeps its requests says so when it begins to watch (`WatchMembership.keeps`), and again when they are on disk. It is
awaited while it is connected, and for a while after a connection that broke: a front that is gone has no requests any more
that an engine does not hold for its next life.
"""

from __future__ import annotations

import msgspec

from interlock.core.fleet_state import FleetState
from interlock.core.identity import Epoch
from interlock.core.limits import CONNECTIONS_MAX, SILENCE_SECONDS_MAX
from interlock.core.roster import Condition
from interlock.core.targets import State
from interlock.wire.fleet_messages import WatchMembership


class FrontWord(msgspec.Struct, frozen=True):
    """The last that one front said."""

    kept: Epoch | None
    trouble: str
    trouble_at: Epoch | None
    holder: object
    """The connection it was said on."""
    gone_s: float | None = None
    """Since when that is over."""


class KeptFronts:
    """Mutable, one a coordinator."""

    def __init__(self) -> None:
        self._words: dict[str, FrontWord] = {}

    def hear(self, name: str, said: WatchMembership, holder: object) -> None:
        if said.keeps and (name in self._words or len(self._words) < CONNECTIONS_MAX):
            self._words[name] = FrontWord(said.kept, said.trouble, said.trouble_at, holder)

    def leave(self, holder: object, now_s: float) -> None:
        """That connection ended."""
        for name, word in self._words.items():
            if word.holder is holder:
                self._words[name] = msgspec.structs.replace(word, gone_s=now_s)

    def _awaited(self, epoch: Epoch, now_s: float) -> dict[str, FrontWord]:
        for name, word in list(self._words.items()):
            if word.gone_s is not None and now_s - word.gone_s > SILENCE_SECONDS_MAX:
                del self._words[name]
        return {name: word for name, word in self._words.items() if word.kept != epoch}

    def judge(
        self, members: Condition, fleet: FleetState, now_s: float, *, expired: bool = False
    ) -> Condition:
        """The members' condition, and the fronts': one is not there before its requests are on disk."""
        if fleet.state is not State.SUSPENDED or (members.done and not members.ok):
            return members
        awaited = self._awaited(fleet.epoch, now_s)
        troubles = [
            f"{name} could not keep its requests: {word.trouble}"
            for name, word in awaited.items()
            if word.trouble and word.trouble_at == fleet.epoch
        ]
        if troubles:
            message = "; ".join(troubles) + "; make room there, then RESUME and SUSPEND again"
            return msgspec.structs.replace(members, done=True, ok=False, message=message)
        if not awaited:
            return members
        message = f"waiting for {', '.join(awaited)} to put requests on disk"
        if expired:
            message = f"{', '.join(awaited)} did not put requests on disk by the deadline"
        return msgspec.structs.replace(members, done=expired, ok=False, message=message)
