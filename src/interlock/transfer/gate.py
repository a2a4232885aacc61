"""How many peers are in the middle of their handshake here at a time, so that a thousand that come at once are served one after the other.

Served all at once, each waits for the words of all the others, says its own again meanwhile, and every repetition is answered: a thousand that
opened within 50 ms cost half as much again, all were through at the same late moment, and on a loaded machine none before its deadline.

A place is held from the first word that is heard until the endpoint is connected, for PLACE_SECONDS_MAX at most, so nobody who dawdles or is dead
holds the others up for long. Who waits is not forgotten: its words wait in its channel.
"""

from __future__ import annotations

import asyncio
from collections import deque

from interlock.core.limits import HANDSHAKES_AT_ONCE_MAX

PLACE_SECONDS = 0.5
PLACE_SECONDS_MAX = 8.0
LATE_SECONDS = 0.05
LATE_TIMES = 8
"""Steps of a handshake that each wait for the loop once."""


class Gate:
    """On the loop."""

    def __init__(self, most: int = HANDSHAKES_AT_ONCE_MAX) -> None:
        self._most = most
        self._inside: dict[str, asyncio.TimerHandle] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._inside)

    async def enter(self, name: str) -> None:
        """Returns when `name` has a place, in the order in which they came; at once if it has one."""
        if name not in self._inside and (self._waiting or len(self._inside) >= self._most):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._let_in()  # the place was ours already
                elif turn in self._waiting:
                    self._waiting.remove(turn)
                raise
        self.leave(name, lets_in=False)
        self._hold(name, PLACE_SECONDS, PLACE_SECONDS_MAX)

    def _hold(self, name: str, seconds: float, left_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._inside[name] = loop.call_later(
            seconds, self._lapse, name, loop.time() + seconds, left_s - seconds
        )

    def _lapse(self, name: str, due_s: float, left_s: float) -> None:
        """Was it the peer that dawdled, or we? Who is looked at late by a loop that is slow itself keeps its place as many times longer."""
        late_s = asyncio.get_running_loop().time() - due_s
        if late_s > LATE_SECONDS and left_s > 0:
            self._inside.pop(name)
            self._hold(name, min(left_s, LATE_TIMES * late_s), left_s - late_s)
        else:
            self.leave(name)

    def leave(self, name: str, *, lets_in: bool = True) -> None:
        """Idempotent."""
        timer = self._inside.pop(name, None)
        if timer is not None:
            timer.cancel()
            if lets_in:
                self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
