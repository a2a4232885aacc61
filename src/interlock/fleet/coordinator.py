"""The coordinator's driver: it hears members and administrators, lets `core` decide, keeps, and only then tells.

Every rule stands in `core/commands`, `core/recovery` and `core/roster`; here events come in from channels, clocks and exits,
and effects go out. One order is kept: what was decided is on disk before any message says so. What is told is told again until
it is repeated back, so that a lost message, a late joiner, and a restart of either side are the same case.

While it is RECOVERING it says nothing to fronts: they go on with the last they heard.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from interlock.core.commands import CommandRefused, transition
from interlock.core.errors import ChannelClosed, InterlockError
from interlock.core.fleet_state import (
    Accept,
    Excused,
    FleetEffect,
    FleetState,
    Heard,
    Persist,
    Phase,
    Remembered,
    Settled,
    StepDown,
    TellMembers,
    Tick,
)
from interlock.core.identity import Epoch
from interlock.core.limits import HEARTBEAT_SECONDS, RECOVERING_SECONDS_MAX
from interlock.core.recovery import restarted
from interlock.core.roster import MemberRecord, condition, needs_telling
from interlock.core.targets import Command as Verb
from interlock.core.targets import State
from interlock.fleet.command_book import CommandBook, judge, progress_of, report_of
from interlock.fleet.coordinator_news import News
from interlock.fleet.coordinator_state import CommandRecord, KnownMember, StateFile
from interlock.fleet.kept_fronts import KeptFronts
from interlock.fleet.members import Members
from interlock.fleet.peer_book import PeerBook
from interlock.fleet.words import commanded, hold_in_words, target_in_types, target_in_words
from interlock.host.base import Host, Listener
from interlock.telemetry.events import EventLog
from interlock.wire import fleet_messages as say
from interlock.wire.channel import Channel, Received, serve_channels
from interlock.wire.envelope import Rejected
from interlock.wire.identity import Identity

TICK_SECONDS = 0.1
NEEDED = {Verb.UPDATE: "updates", Verb.SUSPEND: "suspends", Verb.RESUME: "suspends"}
"""What every engine must be able to do (`EngineFacts.capabilities`) for a command to be begun."""


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


class Listening(msgspec.Struct):
    """Who wants to hear of a command, under which of its messages, and what it was told last."""

    channel: Channel
    number: int
    told: say.CommandProgress | None = None


class Deposed(InterlockError):  # noqa: N818
    """A higher epoch exists: somebody else leads, and this coordinator has stopped."""


class Coordinator:
    """`start`, then `run` until it is cancelled or deposed, then `close`."""

    def __init__(
        self, host: Host, me: Identity, config: CoordinatorConfig, events: EventLog | None = None
    ) -> None:
        self._host, self._me, self._config = host, me, config
        self._news = News(host.clock, events or EventLog(host.clock))
        self._file = StateFile(host, config.state_dir)
        self._members = Members(host, exit_is_proof=config.exit_is_proof, on_change=self._on_member)
        self._book = CommandBook()
        self._listeners: dict[tuple[str, str], list[Listening]] = {}
        self._watchers: dict[Channel, None] = {}
        self._fronts = KeptFronts()
        self._launching: dict[str, int] = {}
        """By name, the last life before the START that awaits a newer one: its end excuses nobody."""
        self._peers = PeerBook()
        self._changed = asyncio.Event()
        self._unsaved_members = False
        self._kept_members: list[KnownMember] = []
        """Which the file names: a member that only changes its state is no reason to write it."""
        self._settled = False
        """Whether the members were judged to stand at the current epoch."""
        self._listener: Listener | None = None
        self._started_s = 0.0
        self.fleet = FleetState(Phase.RECOVERING, Epoch(), State.RUNNING, config.version)

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads the state, decides what this life begins with, and listens. Raises `OSError` where it cannot."""
        self._started_s = self._host.clock.monotonic_s()
        stored, why = self._file.load()
        if stored is None:
            self._news.emit("coordinator_without_state", reason=why)
        else:
            self._book = CommandBook(stored.commands)
            self._members.restore(stored.members)
        names = frozenset(self._config.expected) | {
            member.name for member in (stored.members if stored else ())
        }
        fleet, effects = restarted(
            stored.fleet if stored else None,
            term=self._me.incarnation,
            version=self._config.version,
            deadline_s=self._started_s + self._config.recovering_s,
            expected=names,
        )
        await self._apply(fleet, effects)
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
                refused = ""
            except OSError as error:
                if str(error) != refused:
                    self._news.emit("state_not_kept", reason=str(error))
                refused = str(error)
            await self._wait_for_change()
        raise Deposed(
            f"{self._me.name} has heard of a higher epoch and leads no more", hint="ask its successor"
        )

    async def _turn(self, now: float, *, heartbeat: bool) -> None:
        self._members.look()
        await self._apply(*transition(self.fleet, Tick(now)))
        if heartbeat or self._changed.is_set():
            self._changed.clear()
            await self._tell_fronts()
        await self._judge()
        if self._unsaved_members and self._members.known() != self._kept_members:
            self._save(self.fleet)
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

    # --- what is decided ------------------------------------------------------------------------------------------

    async def _apply(
        self, fleet: FleetState, effects: tuple[FleetEffect, ...], ask: say.Command | None = None
    ) -> None:
        """Raises `OSError` when it cannot be kept; then nothing has changed and nobody was told."""
        if any(isinstance(effect, Persist) for effect in effects):
            self._save(fleet)
        if fleet.epoch != self.fleet.epoch:
            self._settled = False
        before, self.fleet = self.fleet, fleet
        self._news.decided(before, fleet, ask)
        for effect in effects:
            match effect:
                case TellMembers(target):
                    self._news.emit("target", epoch=target.epoch, state=target.state, mode=target.mode)
                    self._changed.set()
                    await self._tell_members()
                case StepDown(epoch):
                    self._news.emit("coordinator_deposed", epoch=epoch)
                    self._changed.set()
                case Persist() | Accept():
                    pass  # kept above; answered where the command was asked

    def _save(self, fleet: FleetState) -> None:
        members = self._members.known()
        self._file.save(fleet, self._book.records(), members)
        self._kept_members, self._unsaved_members = members, False

    def _on_member(self, record: MemberRecord) -> None:
        self._unsaved_members = True
        self._changed.set()
        self._news.member(record)

    # --- what is told ---------------------------------------------------------------------------------------------

    async def _tell_fronts(self) -> None:
        if self.fleet.phase is Phase.LEADING:
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
        )

    async def _send(self, channel: Channel, body: msgspec.Struct, answers: int = 0) -> None:
        """A peer that cannot be told now is told when it comes back."""
        try:
            await channel.send(body, answers)
        except ChannelClosed:
            self._members.unbind(channel)
            self._watchers.pop(channel, None)

    # --- commands -------------------------------------------------------------------------------------------------

    async def _judge(self) -> None:
        """Finish the commands that can be, tell their listeners how far the others are, settle the epoch once."""
        fleet, now = self.fleet, self._host.clock.monotonic_s()
        if fleet.phase is not Phase.LEADING:
            return
        records = self._members.records()
        settled = False
        for record in self._book.under_way():
            after, judged = judge(record, fleet, records, now, self._fronts)
            if after.done:
                self._finish(record, after)
            own = record.epoch == fleet.epoch or fleet.stop_for is not None
            settled |= own and bool(judged and judged.done and judged.ok)
            await self._tell_listeners(after, self._measured(progress_of(after, judged)))
        if not self._settled:
            stands = condition(records, fleet.epoch, fleet.state, unseen=fleet.awaited)
            settled |= self._fronts.judge(stands, fleet, now).ok
            if settled:
                self._settled = self.fleet.epoch == fleet.epoch
                await self._apply(*transition(self.fleet, Settled(fleet.epoch, ok=True)))

    def _finish(self, record: CommandRecord, after: CommandRecord) -> None:
        """Raises `OSError`: it is under way until its outcome is kept."""
        self._book.put(after)
        try:
            self._save(self.fleet)
        except OSError:
            self._book.put(record)
            raise
        self._news.finished(after)

    def _measured(self, progress: say.CommandProgress) -> say.CommandProgress:
        """With what each member said of its memory last."""
        memories = self._members.memories()
        if not memories:
            return progress
        members = [
            msgspec.structs.replace(member, memory=memories.get((member.name, member.incarnation)))
            for member in progress.members
        ]
        return msgspec.structs.replace(progress, members=members)

    async def _tell_listeners(self, record: CommandRecord, progress: say.CommandProgress) -> None:
        listeners = self._listeners.get(record.key, [])
        for listening in listeners:
            if listening.told != progress:
                listening.told = progress
                await self._send(listening.channel, progress, listening.number)
        if progress.done:
            self._listeners.pop(record.key, None)
        elif listeners:  # others may have come while these were told
            living = [item for item in self._listeners.get(record.key, []) if item.channel.closed is None]
            self._listeners[record.key] = living

    async def _command(self, channel: Channel, received: Received, ask: say.Command) -> None:
        record = self._book.get(ask.owner, ask.command_id)
        if record is None:
            try:
                record = await self._accept(ask)
            except CommandRefused as refused:
                self._news.refused(ask, refused, self.fleet.state)
                code = "recovering" if self.fleet.phase is Phase.RECOVERING else "refused"
                await channel.fault(received, code, str(refused), refused.retryable)
                return
            except ValueError as error:
                self._news.invalid(ask, error)
                await channel.fault(received, "invalid", str(error))
                return
            except OSError as error:
                self._book.drop(ask.owner, ask.command_id)
                why = f"the coordinator could not keep the command, so it was not begun: {error}"
                await channel.fault(received, "not_kept", why, retryable=True)
                return
        await self._send(channel, say.CommandAccepted(record.epoch), received.number)
        record = self._book.get(ask.owner, ask.command_id) or record  # it may have ended meanwhile
        if record.done:
            await self._send(channel, self._measured(progress_of(record)), received.number)
        else:
            listeners = [item for item in self._listeners.get(record.key, []) if item.channel is not channel]
            self._listeners[record.key] = [*listeners, Listening(channel, received.number)]
            self._changed.set()

    async def _accept(self, ask: say.Command) -> CommandRecord:
        """Raises `CommandRefused`, or ValueError in words; then nothing has changed."""
        event = commanded(ask, self._host.clock.monotonic_s())
        starts = event.command is Verb.START
        if starts:
            event = msgspec.structs.replace(event, expected=frozenset(self._config.expected))
        fleet, effects = transition(self.fleet, event)
        self._check_able(event.command)
        if self._book.full:
            raise CommandRefused("too many commands are under way", hint="ask again later", retryable=True)
        record = CommandRecord(
            owner=ask.owner,
            command_id=ask.command_id,
            command=event.command,
            epoch=fleet.epoch,
            wanted=State.STOPPED if event.command is Verb.STOP else fleet.state,
            deadline_s=self._host.clock.monotonic_s() + ask.timeout_s,
            allow_unknown=ask.allow_unknown,
            version=fleet.version if event.command is Verb.UPDATE else None,
        )
        self._book.put(record)
        if not any(isinstance(effect, Persist) for effect in effects):
            effects = (Persist(), *effects)  # the record itself must outlive us
        await self._apply(fleet, effects, ask)
        if starts:
            self._launching = self._members.lives()
            self._members.forget_lost()
        return record

    def _check_able(self, command: Verb) -> None:
        """A fleet of which one engine cannot follow would stand half way: refused before anything has changed."""
        needed = NEEDED.get(command)
        unable = [member.name for member in self._members.known() if needed not in member.facts.capabilities]
        if needed is not None and unable:
            why, hint = f"{', '.join(unable)} cannot do it", "STOP the fleet and start it anew instead"
        elif command is Verb.START and not self._config.launches:
            why, hint = "this coordinator launches nothing", "start the fleet again with `interlock serve`"
        else:
            return
        raise CommandRefused(
            f"{command} is refused at epoch {self.fleet.epoch}: {why}",
            hint=hint,
            command=command,
            state=self.fleet.state,
            epoch=self.fleet.epoch,
        )

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
            case say.GetStatus() if self.fleet.phase is Phase.LEADING:
                await self._send(channel, self._membership(), received.number)
            case say.GetStatus():
                why = "the coordinator lost its state and is still hearing what its members stand at"
                await channel.fault(received, "recovering", why, retryable=True)
            case say.GetCommand(command_id, owner):
                await self._report_command(channel, received, command_id, owner)
            case say.GetEvents() as asked:
                await self._send(channel, await self._news.answer(asked), received.number)
            case say.GetMetrics():
                answer = self._news.render(self.fleet, self._members.records())
                await self._send(channel, answer, received.number)
            case say.MemberGone(name, incarnation):
                await self._gone(channel, received, name, incarnation)
            case say.Announce() | say.FindPeer():
                await self._peers.hear(channel, received, self._host.clock.monotonic_s())
            case say.Command() as ask:
                await self._command(channel, received, ask)

    async def _report_command(
        self, channel: Channel, received: Received, command_id: str, owner: str
    ) -> None:
        record = self._book.find(command_id, owner)
        if record is None:
            why = f"no command {command_id} is known: it was never begun here, or is too long ago"
            await channel.fault(received, "unknown_command", why)
            return
        judged = None
        if not record.done:
            now = self._host.clock.monotonic_s()
            record, judged = judge(record, self.fleet, self._members.records(), now, self._fronts)
        left_s = record.deadline_s - self._host.clock.monotonic_s()
        await self._send(
            channel, report_of(record, self._measured(progress_of(record, judged)), left_s), received.number
        )

    async def _watch(self, channel: Channel, received: Received) -> None:
        """A front may know what this coordinator forgot: that is heard before it is told anything."""
        assert isinstance(received.body, say.WatchMembership)
        known = received.body.heard
        try:
            if known is not None:
                await self._apply(*transition(self.fleet, Remembered(target_in_types(known))))
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
        if self.fleet.phase is Phase.LEADING:
            await self._send(channel, self._membership())

    async def _gone(self, channel: Channel, received: Received, name: str, incarnation: int) -> None:
        """Answered once it is kept: until then the launcher says it again."""
        self._members.gone(name, incarnation)
        if 0 < incarnation <= self._launching.get(name, 0):
            self._members.forget_lost()
            await self._send(channel, self._membership(), received.number)
            return
        try:
            await self._apply(*transition(self.fleet, Excused(name)))
        except OSError as error:
            await channel.fault(received, "not_kept", str(error), retryable=True)
            return
        await self._send(channel, self._membership(), received.number)

    async def _report(self, channel: Channel, received: Received, said: say.MemberReport) -> None:
        try:
            stale = self._members.report(channel, said)
            heard = None if said.heard is None else target_in_types(said.heard)
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
            await self._apply(*transition(self.fleet, Heard(channel.peer.name, heard, said.version)))
        except OSError as error:  # it reports again
            self._news.emit("state_not_kept", reason=str(error))
            return
        record = self._members.record(channel.peer.name)
        if self.fleet.phase is Phase.LEADING and needs_telling(record, self.fleet.epoch):
            await self._send(channel, target_in_words(self.fleet.target))
