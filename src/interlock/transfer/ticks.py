"""When endpoints speak: each about every heartbeat, those that open more often, and a thousand that open at once not all at once."""

from __future__ import annotations

import asyncio
import logging
import random

from interlock.core.endpoint_state import Phase
from interlock.core.limits import HEARTBEAT_SECONDS
from interlock.host.base import Clock
from interlock.transfer.peer import Peer, PeerStore

HANDSHAKE_TICK_SECONDS = 0.5
"""How often an endpoint that is not connected yet says again what it says."""
TICK_GRAIN_SECONDS = 0.02
"""Endpoints that are due within it are looked at together: a thousand that open must not each cost a look at all."""
HANDSHAKE_TICK_SECONDS_MAX = 2.0
STEADY = (Phase.IDLE, Phase.CONNECTED, Phase.CLOSED)
_log = logging.getLogger(__name__)


class Ticks:
    """The clock of an engine's endpoints. `run` until it is cancelled."""

    def __init__(self, clock: Clock, peers: PeerStore) -> None:
        self._clock, self._peers = clock, peers
        self._due = asyncio.Event()
        self._next_s = 0.0

    def begin(self, peer: Peer) -> None:
        """A new endpoint: its first tick is soon."""
        peer.next_tick_s = self._clock.monotonic_s() + HANDSHAKE_TICK_SECONDS
        self._wake_for(peer)

    def sooner(self, peer: Peer) -> None:
        """An endpoint that is not connected yet speaks more often than one that is."""
        if peer.driver.state.phase in STEADY or peer.repeats:
            return
        next_s = self._clock.monotonic_s() + HANDSHAKE_TICK_SECONDS
        if peer.next_tick_s > next_s:
            peer.next_tick_s = next_s
        self._wake_for(peer)

    def _wake_for(self, peer: Peer) -> None:
        if self._next_s > peer.next_tick_s + TICK_GRAIN_SECONDS:
            self._due.set()

    def _pause_s(self, peer: Peer) -> float:
        """Words are seldom lost, and late when there are many: who repeats them at a fixed pace drowns a busy peer (a thousand that
        open at once never got through). So each repetition of a handshake waits twice as long as the one before."""
        if peer.driver.state.phase in STEADY:
            peer.repeats = 0
            return HEARTBEAT_SECONDS
        peer.repeats += 1
        return min(HANDSHAKE_TICK_SECONDS * float(2**peer.repeats), HANDSHAKE_TICK_SECONDS_MAX)

    async def run(self) -> None:
        """Each endpoint says what it says about every heartbeat, more often while it is not connected, each at its own moments."""
        while True:
            now_s = self._clock.monotonic_s()
            self._next_s = now_s + HEARTBEAT_SECONDS
            for peer in self._peers:
                if peer.next_tick_s <= now_s:
                    try:
                        peer.driver.tick()
                    except Exception:  # a defect of ours must not stop the other endpoints' clocks
                        _log.exception("a tick of the endpoint to %s failed", peer.name)
                    peer.next_tick_s = now_s + self._pause_s(peer) * (0.75 + 0.5 * random.random())
                self._next_s = min(self._next_s, peer.next_tick_s)
            self._due.clear()
            try:
                async with asyncio.timeout(max(TICK_GRAIN_SECONDS, self._next_s - now_s)):
                    await self._due.wait()
            except TimeoutError:
                pass
