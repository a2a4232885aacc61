"""The launcher's word that an engine's life is over, said until the coordinator has heard it.

It may be heard late, by a coordinator that has lost its state, when the next life of that name runs already: that it is over
must then not be taken for *nobody of that name is there* (a pause would be said to stand in which that engine runs).
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from interlock.core.errors import InterlockError
from interlock.fleet.client import FleetClient
from interlock.host.base import Host
from interlock.wire.identity import incarnation_in

_log = logging.getLogger(__name__)

ANSWER_SECONDS_MAX = 2.0
AGAIN_SECONDS = 0.25
IDENTITY_BYTES_MAX = 4096


class EndedLives:
    """`states`: where each engine keeps its identity, `<states>/<name>/identity.json`."""

    def __init__(self, host: Host, client: FleetClient, states: Path) -> None:
        self._host, self._client, self._states = host, client, states
        self._tellers: set[asyncio.Task[None]] = set()
        self._begun: dict[str, int] = {}
        """By name, how many lives."""

    def next_begins(self, name: str) -> None:
        """To be called before a life of that name is started."""
        self._begun[name] = self._begun.get(name, 0) + 1

    def tell(self, name: str) -> None:
        """Of an engine whose whole tree is proven gone. Called before its next life begins: which one it was stands in its file."""
        try:
            data = self._host.files.read(self._states / name / "identity.json", IDENTITY_BYTES_MAX)
        except (OSError, ValueError):
            data = None
        incarnation = incarnation_in(data)
        if not incarnation:
            return  # it had not begun a life
        begun = self._begun.get(name)
        task = asyncio.create_task(self._repeat(name, incarnation, begun), name=f"gone {name}")
        self._tellers.add(task)
        task.add_done_callback(self._tellers.discard)

    async def all_told(self, seconds_max: float) -> None:
        """Waits until the coordinator has heard of all of them, or so long."""
        if self._tellers:
            await asyncio.wait(set(self._tellers), timeout=seconds_max)

    def close(self) -> None:
        for teller in self._tellers:
            teller.cancel()

    async def _repeat(self, name: str, incarnation: int, begun: int | None) -> None:
        while True:
            again = self._begun.get(name) != begun
            try:
                await self._client.member_gone(name, incarnation, ANSWER_SECONDS_MAX, again=again)
                return
            except (OSError, InterlockError, TimeoutError) as error:
                _log.debug("MemberGone %s was not heard: %s", name, error)
            await self._host.clock.sleep_s(AGAIN_SECONDS)
