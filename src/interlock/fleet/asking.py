"""Questions to a fleet's coordinator: what is, what became of a command, what has happened, how often. Nothing is changed by them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, TypeVar

import msgspec

from interlock.core.errors import InterlockError, RemoteProtocolError, StaleError
from interlock.core.limits import (
    EVENTS_WAIT_SECONDS_MAX,
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
)
from interlock.host.base import Host
from interlock.wire import fleet_messages as say
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.fleet_messages import CommandReport, Membership
from interlock.wire.identity import Identity, passing_identity

T = TypeVar("T", bound=msgspec.Struct)


class Questions:
    """One user of one coordinator. No connection is held between questions."""

    def __init__(self, host: Host, address: str, identity: Identity | None = None) -> None:
        self._host, self._address = host, address
        self._me = identity or passing_identity(host, "admin")

    async def status(self, timeout_s: float = HELLO_SECONDS_MAX) -> Membership:
        """Raises `ConnectionError` or `TimeoutError` (no coordinator), `ChannelFault` "recovering"."""
        return await self._ask(say.GetStatus(), Membership, timeout_s)

    async def command(
        self, command_id: str, *, owner: str = "", timeout_s: float = HELLO_SECONDS_MAX
    ) -> CommandReport:
        """What became of the command of this id (`order` draws it, events and `ctl` show it), under way or ended.

        Raises as `status`, and `ChannelFault` "unknown_command" when it was never begun or is too long ago.
        """
        return await self._ask(say.GetCommand(command_id, owner), CommandReport, timeout_s)

    async def metrics(self, timeout_s: float = HELLO_SECONDS_MAX) -> str:
        """The coordinator's own, as Prometheus reads them. Raises as `status`."""
        return (await self._ask(say.GetMetrics(), say.MetricsText, timeout_s)).text

    async def events(
        self,
        after: int = 0,
        ring: str = "",
        *,
        wait_seconds: float = 0.0,
        timeout_s: float = HELLO_SECONDS_MAX,
    ) -> say.Events:
        """What has happened after number `after` of the ring `ring` (empty: whatever ring there is), oldest first.

        Waits up to `wait_seconds` where nothing has happened yet. `gap` says in words what is missing. Raises as `status`.
        """
        asked = say.GetEvents(after, ring, wait_seconds)
        return await self._ask(asked, say.Events, timeout_s + wait_seconds)

    async def follow_events(self, after: int = 0, ring: str = "") -> AsyncGenerator[say.Events, None]:
        """Batches for ever, over restarts of the coordinator; a batch with a `gap` says what was missed. Never raises
        for a coordinator that is away: it is asked again, at most once a second."""
        pause_s = RECONNECT_SECONDS_MIN
        while True:
            try:
                told = await self.events(after, ring, wait_seconds=EVENTS_WAIT_SECONDS_MAX)
            except StaleError:
                raise
            except (OSError, TimeoutError, InterlockError):
                await self._host.clock.sleep_s(pause_s)
                pause_s = min(2 * pause_s, RECONNECT_SECONDS_MAX)
                continue
            pause_s = RECONNECT_SECONDS_MIN
            if told.events or told.gap:
                yield told
            ring = told.ring
            after = told.events[-1].number if told.events else (told.last if told.gap else after)

    async def member_gone(
        self, name: str, incarnation: int, timeout_s: float = HELLO_SECONDS_MAX, *, again: bool = False
    ) -> None:
        """For launchers: all processes of this life are proven ended. Raises as `status`; to be repeated until it returns.

        `again`: the next life may have begun by now.
        """
        await self._ask(say.MemberGone(name, incarnation, again), Membership, timeout_s)

    # --- channels -------------------------------------------------------------------------------------------------

    async def _ask(self, question: msgspec.Struct, wanted: type[T], timeout_s: float) -> T:
        channel = await self._connect(min(timeout_s, HELLO_SECONDS_MAX))
        try:
            answer: Any = await channel.request(question, timeout_s)
        finally:
            await channel.close()
        if not isinstance(answer, wanted):
            raise RemoteProtocolError(f"{type(question).__name__} was answered by {type(answer).__name__}")
        return answer

    async def _connect(self, timeout_s: float) -> Channel:
        return await connect_channel(
            self._host,
            self._address,
            me=self._me,
            role="admin",
            accept=say.ToAdmin,
            deadline_s=timeout_s,
        )
