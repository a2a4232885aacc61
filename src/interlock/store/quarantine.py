"""Slots of ended sessions that wait for silent processes: how many there may be, and who keeps them.

A slot leaves the quarantine when every process that was given it has reported or is proven gone (core/sessions). Here is only
counted: above its share of the slab nothing is granted any more, and those who keep it longest are named, to be ended.
"""

from __future__ import annotations

from collections import Counter

from interlock.core.joins import JoinName
from interlock.core.limits import FROZEN_WRITER_SECONDS, QUARANTINE_SHARE_MAX
from interlock.core.session_book import SessionBook
from interlock.core.sessions import Phase
from interlock.store.refusal import Refusal
from interlock.store.slots import QUARANTINED, SlotTable


class Quarantine:
    """That of one slab."""

    def __init__(self, sessions: SessionBook, slots: SlotTable, slab_bytes: int) -> None:
        self._sessions, self._slots, self._slab_bytes = sessions, slots, slab_bytes
        self._since_s: dict[JoinName, float] = {}

    @property
    def over_share(self) -> bool:
        """Whether so much memory waits for silent processes that nothing is granted any more."""
        return self._slots.bytes[QUARANTINED] > QUARANTINE_SHARE_MAX * self._slab_bytes

    def check(self) -> None:
        """Raises `Refusal` while it is above its share."""
        if self.over_share:
            holders = ", ".join(sorted(self._sessions.quarantine_holders()))
            raise Refusal(
                "quarantine_full",
                f"{self._slots.bytes[QUARANTINED]} of {self._slab_bytes} bytes wait for processes that were given them and neither "
                f"reported nor ended: {holders}",
                retryable=True,
                hint="end those processes",
            )

    def tick(self, now_s: float) -> None:
        """Notes since when each session's slots wait."""
        since = self._since_s
        self._since_s = {
            session.name: since.get(session.name, now_s)
            for session in self._sessions
            if session.phase is Phase.QUARANTINED
        }

    def frozen(self, now_s: float) -> dict[str, int]:
        """Processes to be ended, and how many slots each keeps: empty while the quarantine is below its share.

        A process is frozen when a session that gave it slots ended `FROZEN_WRITER_SECONDS` ago and it has neither
        reported nor exited since. Ending it is the only way to its slots: nobody else can promise in its place.
        """
        if not self.over_share:
            return {}
        frozen: Counter[str] = Counter()
        for session in self._sessions:
            since_s = self._since_s.get(session.name)
            if since_s is not None and now_s - since_s >= FROZEN_WRITER_SECONDS:
                frozen.update(dict.fromkeys(session.holders, len(session.slots)))
        return dict(frozen)
