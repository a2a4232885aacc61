"""The coordinator's driver: it hears members and administrators, lets `core` decide, keeps, and only then tells.

Every rule stands in `core/commands`, `core/recovery` and `core/roster`; here events come in from channels, clocks and exits.
What was decided is on disk before any message says so (`decisions`); commands are carried from the asking to the end (`orders`).
What is told is told again until it is repeated back, so that a lost message, a late joiner, and a restart of either side are the
same case.

While it is RECOVERING it says nothing to fronts: they go on with the last they heard.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from interlock.core.errors import ChannelClosed, InterlockError
from interlock.core.fleet_state import (
    Excused,
    FleetState,
    Heard,
    Phase,
    Remembered,
    Tick,
)
from interlock.core.limits import HEARTBEAT_SECONDS, RECOVERING_SECONDS_MAX
from interlock.core.recovery import restarted
from interlock.core.roster import MemberRecord, needs_telling
from interlock.core.targets import State
from interlock.fleet.coordinator_news import News
from interlock.fleet.coordinator_state import CoordinatorFile
from interlock.fleet.decisions import Decisions
from interlock.fleet.kept_fronts import KeptFronts
from interlock.fleet.members import Members
from interlock.fleet.orders import Orders
from interlock.fleet.peer_book import PeerBook
from interlock.fleet.words import hold_in_words, target_in_types, target_in_words
from interlock.host.base import Host, Listener
from interlock.telemetry.events import EventLog
from interlock.wire import fleet_messages as say
from interlock.wire.channel import Channel, Received, serve_channels
from interlock.wire.envelope import Rejected
from interlock.wire.identity import Identity

TICK_SECONDS = 0.1


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one coordinator is started with."""

    address: str
    """Where members, fronts and administrators connect."""
    state_dir: Path
    version: str = "0"
    """Weights version of engines that start from the configured model; counts only where no member heard of another."""
    expected: list[str] = []
    """Names of engines that a coordinator without state waits for, up to `recovering_s`."""
    recovering_s: float = RECOVERING_SECONDS_MAX
    exit_is_proof: bool = False
    """True where no launcher reports `MemberGone`: then the exit of a member's own process makes it LOST."""
    launches: bool = False
    """A launcher follows the target and starts `expected` engines when it is not STOPPED: then START can be asked for."""


class Deposed(InterlockError):  # noqa: N818
    """A higher epoch exists: somebody else leads, and this coordinator has stopped."""


class Coordinator:
    """`start`, then `run` until it is cancelled or deposed, then `close`."""

    def __init__(
        self, host: Host, me: Identity, config: CoordinatorConfig, events: EventLog | None = None
    ) -> None:
        self._host, self._me, self._config = host, me, config
        self._news = News(host.clock, events or EventLog(host.clock))
        self._members = Members(host, exit_is_proof=config.exit_is_proof, on_change=self._on_member)
        self._watchers: dict[Channel, None] = {}
        self._fronts = KeptFronts()
        self._peers = PeerBook()
        self._changed = asyncio.Event()
        self._unsaved_members = False
        self._decisions = Decisions(
            CoordinatorFile(host, config.state_dir),
            self._members,
            self._news,
            config.version,
            self._changed,
            self._tell_members,
        )
        launched = frozenset(config.expected) if config.launches else None
        self._orders = Orders(
            host.clock, self._decisions, self._members, self._fronts, self._news, launched, self._send
        )
        self._listener: Listener | None = None

    @property
    def fleet(self) -> FleetState:
        """What is decided, and kept."""
        return self._decisions.fleet

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads the state, decides what this life begins with, and listens. Raises `OSError` where it cannot."""
        stored = self._decisions.load()
        names = frozenset(self._config.expected) | {
            member.name for member in (stored.members if stored else ())
        }
        fleet, effects = restarted(
            stored.fleet if stored else None,
            term=self._me.incarnation,
            version=self._config.version,
            deadline_s=self._host.clock.monotonic_s() + self._config.recovering_s,
            expected=names,
        )
        await self._decisions.apply(fleet, effects)
        self._listener = await serve_channels(
            self._host,
            self._config.address,
            me=self._me,
            accept=say.ToCoordinator,
            on_channel=self._serve,
        )

    async def run(self) -> None:
        """Raises `Deposed` when somebody else leads. A disk that takes nothing stops all changes, and no stream."""
        told_s, refused = 0.0, ""
        while self.fleet.phase is not Phase.DEPOSED:
            now = self._host.clock.monotonic_s()
            heartbeat = now - told_s >= HEARTBEAT_SECONDS
            told_s = now if heartbeat else told_s
            try:
                await self._turn(now, heartbeat=heartbeat)
            except OSError as error:
                if str(error) != refused:
                    self._news.emit("state_not_kept", reason=str(error))
                refused = str(error)
                # Not `_wait_for_change`: what has changed is not told yet, so that would not wait, and nobody else would run.
                await self._host.clock.sleep_s(TICK_SECONDS)
            else:
                refused = ""
                await self._wait_for_change()
        raise Deposed(
            f"{self._me.name} has heard of a higher epoch and leads no more", hint="ask its successor"
        )

    async def _turn(self, now: float, *, heartbeat: bool) -> None:
        self._members.look()
        await self._decisions.decide(Tick(now))
        if heartbeat or self._changed.is_set():
            self._changed.clear()
            await self._tell_fronts()
        await self._orders.judge()
        if self._unsaved_members:
            self._decisions.save_members()
            self._unsaved_members = False

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        await self._members.close()

    async def _wait_for_change(self) -> None:
        try:
            async with asyncio.timeout(TICK_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _on_member(self, record: MemberRecord) -> None:
        self._unsaved_members = True
        self._changed.set()
        self._news.member(record)

    # --- what is told ---------------------------------------------------------------------------------------------

    async def _tell_fronts(self) -> None:
        if self._decisions.leads:
            membership = self._membership()
            for watcher in list(self._watchers):
                await self._send(watcher, membership)

    async def _tell_members(self) -> None:
        """At once; who misses it is told again in answer to each of its reports (`_report`)."""
        if self.fleet.phase is not Phase.LEADING:
            return
        target = target_in_words(self.fleet.target)
        for seat in self._members.seats():
            if seat.channel is not None and needs_telling(seat.record, self.fleet.epoch):
                await self._send(seat.channel, target)

    def _membership(self) -> say.Membership:
        fleet = self.fleet
        holds = [hold_in_words(hold) for hold in fleet.holds]
        return say.Membership(
            fleet.epoch,
            fleet.state,
            fleet.version,
            holds,
            self._members.listing(fleet.epoch),
            fleet.weights,
            fleet.kv,
            fleet.version_known,
            sorted(fleet.awaited),
        )

    async def _send(self, channel: Channel, body: msgspec.Struct, answers: int = 0) -> None:
        """A peer that cannot be told now is told when it comes back."""
        try:
            await channel.send(body, answers)
        except ChannelClosed:
            self._members.unbind(channel)
            self._watchers.pop(channel, None)

    # --- what is heard --------------------------------------------------------------------------------------------

    async def _serve(self, channel: Channel) -> None:
        try:
            async for received in channel.messages():
                await self._hear(channel, received)
        finally:
            self._members.unbind(channel)
            self._watchers.pop(channel, None)
            self._fronts.leave(channel, self._host.clock.monotonic_s())
            self._peers.drop(channel)

    async def _hear(self, channel: Channel, received: Received) -> None:
        match received.body:
            case say.MemberReport() as said:
                await self._report(channel, received, said)
            case say.WatchMembership():
                await self._watch(channel, received)
            case say.GetStatus() if self._decisions.leads:
                await self._send(channel, self._membership(), received.number)
            case say.GetStatus():
                why = "the coordinator lost its state and is still hearing what its members stand at"
                await channel.fault(received, "recovering", why, retryable=True)
            case say.GetCommand(command_id, owner):
                await self._orders.report(channel, received, command_id, owner)
            case say.GetEvents() as asked:
                await self._send(channel, await self._news.answer(asked), received.number)
            case say.GetMetrics():
                answer = self._news.render(self.fleet, self._members.records())
                await self._send(channel, answer, received.number)
            case say.MemberGone() as said:
                await self._gone(channel, received, said)
            case say.Announce() | say.FindPeer():
                await self._peers.hear(channel, received, self._host.clock.monotonic_s())
            case say.Command() as ask:
                await self._orders.hear(channel, received, ask)

    async def _watch(self, channel: Channel, received: Received) -> None:
        """A front may know what this coordinator forgot: that is heard before it is told anything."""
        assert isinstance(received.body, say.WatchMembership)
        known = received.body.heard
        try:
            if known is not None:
                await self._decisions.decide(Remembered(target_in_types(known)))
        except ValueError as error:
            await channel.fault(received, "invalid", str(error))
            return
        except OSError as error:
            self._news.emit("state_not_kept", reason=str(error))
            await channel.close()  # it comes again, and tells again
            return
        for life in received.body.over:
            self._members.forbid(life.name, life.incarnation)
        self._watchers[channel] = None
        self._fronts.hear(channel.peer.name, received.body, channel)
        self._changed.set()
        if self._decisions.leads:
            await self._send(channel, self._membership())

    async def _gone(self, channel: Channel, received: Received, said: say.MemberGone) -> None:
        """Answered once it is kept: until then the launcher says it again."""
        name = said.name
        self._members.gone(name, said.incarnation)
        try:
            if not said.again:
                await self._decisions.decide(Excused(name, said.incarnation))
            self._decisions.save_members()
        except OSError as error:
            await channel.fault(received, "not_kept", str(error), retryable=True)
            return
        if name in self.fleet.awaited:
            self._members.forget_lost()  # who was launched in its place is waited for
        await self._send(channel, self._membership(), received.number)

    async def _report(self, channel: Channel, received: Received, said: say.MemberReport) -> None:
        try:
            heard = None if said.heard is None else target_in_types(said.heard)
            stale = self._members.report(channel, said)
        except ValueError as error:
            await channel.fault(received, "invalid", str(error))
            return
        except InterlockError as error:
            await channel.fault(received, "full", str(error), retryable=True)
            return
        if stale is not None:
            self._news.stale(channel.peer.name, channel.peer.incarnation)
            over = f"this life of {channel.peer.name} is over"
            await self._send(channel, Rejected(over, stale.known), received.number)
            return
        try:
            me = channel.peer
            event = Heard(me.name, me.incarnation, State(said.state), heard, said.version)
            await self._decisions.decide(event)
        except OSError as error:  # it reports again
            self._news.emit("state_not_kept", reason=str(error))
            return
        record = self._members.record(channel.peer.name)
        if self._decisions.leads and needs_telling(record, self.fleet.epoch):
            await self._send(channel, target_in_words(self.fleet.target))
