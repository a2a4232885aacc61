"""Commands of administrators, from the asking to the end: accepted or refused, told member by member, judged, asked about later."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from interlock.core.commands import CommandRefused, transition
from interlock.core.fleet_state import Persist, Phase, Settled
from interlock.core.roster import condition
from interlock.core.targets import Command as Verb
from interlock.core.targets import State
from interlock.fleet.command_book import judge, progress_of, report_of
from interlock.fleet.coordinator_news import News
from interlock.fleet.coordinator_state import CommandRecord
from interlock.fleet.decisions import Decisions
from interlock.fleet.kept_fronts import KeptFronts
from interlock.fleet.members import Members
from interlock.fleet.words import commanded
from interlock.host.base import Clock
from interlock.wire import fleet_messages as say
from interlock.wire.channel import Channel, Received

NEEDED = {Verb.UPDATE: "updates", Verb.SUSPEND: "suspends", Verb.RESUME: "suspends"}
"""What every engine must be able to do (`EngineFacts.capabilities`) for a command to be begun."""
Send = Callable[[Channel, msgspec.Struct, int], Awaitable[None]]


class Listening(msgspec.Struct):
    """Who wants to hear of a command, under which of its messages, and what it was told last."""

    channel: Channel
    number: int
    told: say.CommandProgress | None = None


class Orders:
    """`launched`: the engines that a launcher starts when the target is STOPPED no more; None: nobody does."""

    def __init__(
        self,
        clock: Clock,
        decisions: Decisions,
        members: Members,
        fronts: KeptFronts,
        news: News,
        launched: frozenset[str] | None,
        send: Send,
    ) -> None:
        self._clock, self._decisions, self._members = clock, decisions, members
        self._fronts, self._news, self._launched, self._send = fronts, news, launched, send
        self._listeners: dict[tuple[str, str], list[Listening]] = {}

    # --- asked ----------------------------------------------------------------------------------------------------

    async def hear(self, channel: Channel, received: Received, ask: say.Command) -> None:
        """Answers it, and goes on telling until it is done. Said again under its name it is the same command."""
        book = self._decisions.book
        record = book.get(ask.owner, ask.command_id)
        if record is None:
            try:
                record = await self._accept(ask)
            except CommandRefused as refused:
                self._news.refused(ask, refused, self._decisions.fleet.state)
                recovering = self._decisions.fleet.phase is Phase.RECOVERING
                code = "recovering" if recovering else "refused"
                await channel.fault(received, code, str(refused), refused.retryable)
                return
            except ValueError as error:
                self._news.invalid(ask, error)
                await channel.fault(received, "invalid", str(error))
                return
            except OSError as error:
                book.drop(ask.owner, ask.command_id)
                why = f"the coordinator could not keep the command, so it was not begun: {error}"
                await channel.fault(received, "not_kept", why, retryable=True)
                return
        await self._send(channel, say.CommandAccepted(record.epoch), received.number)
        record = book.get(ask.owner, ask.command_id) or record  # it may have ended meanwhile
        if record.done:
            await self._send(channel, self._measured(progress_of(record)), received.number)
        else:
            listeners = [item for item in self._listeners.get(record.key, []) if item.channel is not channel]
            self._listeners[record.key] = [*listeners, Listening(channel, received.number)]
            self._decisions.changed.set()

    async def _accept(self, ask: say.Command) -> CommandRecord:
        """Raises `CommandRefused`, ValueError in words, or `OSError`; then nothing has changed."""
        decisions, now_s = self._decisions, self._clock.monotonic_s()
        event = commanded(ask, now_s)
        starts = event.command is Verb.START
        if starts:
            names, lives = self._launched or frozenset(), self._members.lives()
            before = frozenset((name, lives[name]) for name in names if lives.get(name))
            event = msgspec.structs.replace(event, expected=names, before=before)
        fleet, effects = transition(decisions.fleet, event)
        self._check_able(event.command)
        if decisions.book.full:
            raise CommandRefused("too many commands are under way", hint="ask again later", retryable=True)
        record = CommandRecord(
            owner=ask.owner,
            command_id=ask.command_id,
            command=event.command,
            epoch=fleet.epoch,
            wanted=State.STOPPED if event.command is Verb.STOP else fleet.state,
            deadline_s=now_s + ask.timeout_s,
            allow_unknown=ask.allow_unknown,
            version=fleet.version if event.command in (Verb.UPDATE, Verb.START) else None,
        )
        decisions.book.put(record)
        if not any(isinstance(effect, Persist) for effect in effects):
            effects = (Persist(), *effects)  # the record itself must outlive us
        await decisions.apply(fleet, effects, ask)
        if starts:
            self._members.forget_lost()
        return record

    def _check_able(self, command: Verb) -> None:
        """A fleet of which one engine cannot follow would stand half way: refused before anything has changed."""
        fleet, needed = self._decisions.fleet, NEEDED.get(command)
        unable = [member.name for member in self._members.known() if needed not in member.facts.capabilities]
        if needed is not None and unable:
            why, hint = f"{', '.join(unable)} cannot do it", "STOP the fleet and start it anew instead"
        elif command is Verb.START and self._launched is None:
            why, hint = "this coordinator launches nothing", "start the fleet again with `interlock serve`"
        else:
            return
        raise CommandRefused(
            f"{command} is refused at epoch {fleet.epoch.number}: {why}",
            hint=hint,
            command=command,
            state=fleet.state,
            epoch=fleet.epoch,
        )

    # --- under way ------------------------------------------------------------------------------------------------

    async def judge(self) -> None:
        """Settle the epoch once, finish the commands that can be, tell their listeners how far the others are.

        Raises `OSError`: what could not be kept is under way still.
        """
        decisions, now_s = self._decisions, self._clock.monotonic_s()
        fleet = decisions.fleet
        if fleet.phase is not Phase.LEADING:
            return
        records = self._members.records()
        settled, found = False, []
        for record in decisions.book.under_way():
            after, judged = judge(record, fleet, records, now_s, self._fronts)
            own = record.epoch == fleet.epoch or fleet.stop_for is not None
            settled |= own and bool(judged and judged.done and judged.ok)
            found.append((record, after, judged))
        if not decisions.settled:
            stands = condition(records, fleet.epoch, fleet.state, unseen=fleet.awaited)
            if settled or self._fronts.judge(stands, fleet, now_s).ok:
                # Kept before anybody is told: who hears that an update is done may say UNPAUSE at once.
                await decisions.decide(Settled(fleet.epoch, ok=True))
                decisions.settled = decisions.fleet.epoch == fleet.epoch
        for record, after, judged in found:
            if after.done:
                self._finish(record, after)
            await self._tell_listeners(after, self._measured(progress_of(after, judged)))

    def _finish(self, record: CommandRecord, after: CommandRecord) -> None:
        """Raises `OSError`: it is under way until its outcome is kept."""
        book = self._decisions.book
        book.put(after)
        try:
            self._decisions.save()
        except OSError:
            book.put(record)
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

    # --- asked about ----------------------------------------------------------------------------------------------

    async def report(self, channel: Channel, received: Received, command_id: str, owner: str) -> None:
        """What became of a command, under way or ended."""
        record = self._decisions.book.find(command_id, owner)
        if record is None:
            why = f"no command {command_id} is known: it was never begun here, or is too long ago"
            await channel.fault(received, "unknown_command", why)
            return
        judged, now_s = None, self._clock.monotonic_s()
        left_s = record.deadline_s - now_s
        if not record.done:
            fleet, records = self._decisions.fleet, self._members.records()
            record, judged = judge(record, fleet, records, now_s, self._fronts)
        progress = self._measured(progress_of(record, judged))
        await self._send(channel, report_of(record, progress, left_s), received.number)
