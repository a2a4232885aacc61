"""What a front knows of the fleet: the coordinator's last word, kept while the coordinator is away.

The link is made again for ever. A coordinator that is dead, or has lost its state and is not sure yet, says nothing; the
last membership then stays in force, so that no stream notices. A word of an epoch lower than one heard is an old
coordinator's and is dropped; it is told what we know, so that it stops or, having lost its state, leads above it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

from interlock.core.errors import InterlockError, StaleError
from interlock.core.identity import Epoch
from interlock.core.limits import (
    HELLO_SECONDS_MAX,
    MEMBERS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
    SILENCE_SECONDS_MAX,
)
from interlock.core.roster import Sight
from interlock.core.targets import Mode, State
from interlock.host.base import Host
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.fleet_messages import LifeOver, Member, Membership, Target, WatchMembership
from interlock.wire.identity import Identity

ENDED = (Sight.LOST, State.STOPPED)
"""Words for members that take no work again."""


class Keeps(Protocol):
    """Of a front that keeps its requests over a suspension (`fleet.keeping`)."""

    kept_at: Epoch | None
    trouble: str
    trouble_at: Epoch | None


class MembershipView:
    """Follows the coordinator at `address`; `on_change` is called after each word that differs from the last."""

    def __init__(
        self,
        host: Host,
        me: Identity,
        address: str,
        on_change: Callable[[Membership], None],
        on_stale: Callable[[Exception], None],
        over: Mapping[str, int] | None = None,
        keeper: Keeps | None = None,
    ) -> None:
        """`over`, read anew each time: by name, the highest life that is known to be over. `keeper` says what of this front's
        requests is on disk."""
        self.current: Membership | None = None
        self.last_error = "not connected yet"
        self._host, self._me, self._address = host, me, address
        self._on_change, self._on_stale = on_change, on_stale
        self._over: Mapping[str, int] = {} if over is None else over
        self._keeper = keeper
        self._channel: Channel | None = None
        self._task = asyncio.create_task(self._run(), name="membership")
        self._task.add_done_callback(self._on_end)

    @property
    def connected(self) -> bool:
        channel = self._channel
        return channel is not None and channel.closed is None and channel.silent_for_s < SILENCE_SECONDS_MAX

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._on_stale(error)

    async def _run(self) -> None:
        pause_s = RECONNECT_SECONDS_MIN
        while True:
            try:
                channel = await connect_channel(
                    self._host,
                    self._address,
                    me=self._me,
                    role="front",
                    accept=Membership,
                    deadline_s=HELLO_SECONDS_MAX,
                )
                try:
                    pause_s = RECONNECT_SECONDS_MIN
                    await self._follow(channel)
                finally:
                    self._channel = None
                    await channel.close()
            except StaleError as error:
                self._on_stale(error)
                return
            except (OSError, TimeoutError, InterlockError) as error:
                self.last_error = str(error)
            await self._host.clock.sleep_s(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_SECONDS_MAX)

    def _watch(self) -> WatchMembership:
        over = [LifeOver(name, life) for name, life in self._over.items()]
        if self._keeper is None:
            return WatchMembership(self._heard(), over[-MEMBERS_MAX:])
        keeper = self._keeper
        return WatchMembership(
            self._heard(), over[-MEMBERS_MAX:], True, keeper.kept_at, keeper.trouble, keeper.trouble_at
        )

    async def say(self) -> None:
        """The coordinator is told anew what this front knows and keeps, if it can be reached; else when it can."""
        if self._channel is not None:
            with contextlib.suppress(ConnectionError):
                await self._channel.send(self._watch())

    def _is_over(self, member: Member) -> bool:
        return member.state not in ENDED and member.incarnation < self._over.get(member.name, 0)

    def _heard(self) -> Target | None:
        """What we were told last, as a member would say it; the mode that counts is that of the holds."""
        known = self.current
        if known is None:
            return None
        return Target(
            known.epoch, known.target, Mode.KEEP, known.version, known.holds, known.weights, known.kv
        )

    async def _follow(self, channel: Channel) -> None:
        self._channel = channel
        told: set[tuple[str, int]] = set()
        await channel.send(self._watch())
        async for received in channel.messages():
            word = received.body
            if not isinstance(word, Membership):
                continue
            known = self.current
            if known is not None and word.epoch < known.epoch:
                self.last_error = f"{channel.peer} speaks of epoch {word.epoch}, {known.epoch} is known"
                await channel.send(self._watch())
                continue
            over = {(member.name, member.incarnation) for member in word.members if self._is_over(member)}
            if not over <= told:  # a coordinator that started again has forgotten those lives' successors
                await channel.send(self._watch())
            told = over  # once: it answers each of our words, and may list them until their next lives report
            self.current = word
            if word != known:
                self._on_change(word)
        self.last_error = str(channel.closed)
