"""What a coordinator tells of itself: an event and a count for every state, transition, command, hold and refusal.

It only looks: the coordinator says what it was and what it is, here that becomes words and numbers. Events are for whoever asks
what happened (`interlock ctl events`), metrics for whoever asks how often (`/metrics` of any front passes them on).
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.commands import CommandRefused
from interlock.core.fleet_state import FleetState, Phase
from interlock.core.identity import Epoch
from interlock.core.limits import (
    EVENT_FIELD_CHARS_MAX,
    EVENTS_PER_CALL_MAX,
    EVENTS_WAIT_SECONDS_MAX,
    MEMBERS_MAX,
)
from interlock.core.roster import MemberRecord, Sight
from interlock.core.targets import STRICTNESS, TARGETS, Hold, State
from interlock.core.targets import Command as Verb
from interlock.fleet.coordinator_state import CommandRecord
from interlock.host.base import Clock
from interlock.telemetry.events import Event, EventLog
from interlock.telemetry.metrics import Metrics
from interlock.wire import fleet_messages as say

COMMAND_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
WORDS = (*State, Sight.SUSPECT, Sight.LOST)
RELEASES = ("released", "broken", "expired", "stopped")
ENDS = ("ok", "failed")
NEW = "new"
"""Where the first transition of a life begins."""


class CoordinatorMetrics:
    """Every label value that is known beforehand stands from the start, at zero: what never happened is seen, too."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        counter, gauge = self._metrics.counter, self._metrics.gauge
        self.members = gauge("interlock_coordinator_members", "Members by state, as heard.", ["state"])
        self.target = gauge("interlock_coordinator_target_info", "1 for the fleet's target.", ["state"])
        self.phase = gauge("interlock_coordinator_phase_info", "1 for its phase.", ["phase"])
        self.holds = gauge("interlock_coordinator_holds", "Holds in force, by pause mode.", ["mode"])
        self.epoch_term = gauge("interlock_coordinator_epoch_term_number", "Term of its epoch.")
        self.epoch = gauge("interlock_coordinator_epoch_number", "Number of its epoch, within the term.")
        self.unknown = gauge(
            "interlock_coordinator_weights_unknown_info", "1 while the fleet's weights are unknown."
        )
        self.moved = counter(
            "interlock_member_transitions_total", "Changes of a member's state.", ["before", "after"]
        )
        self.targets = counter(
            "interlock_target_transitions_total", "Changes of the fleet's target.", ["before", "after"]
        )
        self.placed = counter("interlock_placed_holds_total", "Holds placed, by pause mode.", ["mode"])
        self.ended = counter("interlock_ended_holds_total", "Holds ended, by how.", ["how"])
        self.accepted = counter("interlock_accepted_commands_total", "Commands begun.", ["command"])
        self.finished = counter(
            "interlock_finished_commands_total", "Commands ended, by outcome.", ["command", "outcome"]
        )
        self.refused = counter(
            "interlock_refused_commands_total",
            "Commands refused, by the fleet's target.",
            ["command", "target"],
        )
        self.invalid = counter("interlock_invalid_commands_total", "Commands that no coordinator takes.")
        self.stale = counter("interlock_stale_lives_total", "Words of lives that are over.")
        self.duration = self._metrics.histogram(
            "interlock_command_duration_seconds",
            "From a command's acceptance to its end.",
            COMMAND_SECONDS,
            ["command"],
        )
        self._stand_at_zero()

    def _stand_at_zero(self) -> None:
        for verb in Verb:
            self.accepted.labels(verb)
            for end in ENDS:
                self.finished.labels(verb, end)
            for target in TARGETS:
                self.refused.labels(verb, target)
        for mode in STRICTNESS:
            self.placed.labels(mode)
        for how in RELEASES:
            self.ended.labels(how)

    def show(self, fleet: FleetState, words: dict[str, str]) -> None:
        """Sets what is, as opposed to what has happened."""
        counts = dict.fromkeys((str(word) for word in WORDS), 0)
        for word in words.values():
            counts[word] += 1
        for word, count in counts.items():
            self.members.labels(word).set(count)
        for state in TARGETS:
            self.target.labels(state).set(fleet.state is state)
        for phase in Phase:
            self.phase.labels(phase).set(fleet.phase is phase)
        for mode in STRICTNESS:
            self.holds.labels(mode).set(sum(hold.mode is mode for hold in fleet.holds))
        self.epoch_term.set(fleet.epoch.term)
        self.epoch.set(fleet.epoch.number)
        self.unknown.set(not fleet.version_known)

    def render(self) -> str:
        return self._metrics.render().decode()


class News:
    """One a coordinator. `emit` is for what has no method here."""

    def __init__(self, clock: Clock, events: EventLog) -> None:
        self._clock, self.events = clock, events
        self.metrics = CoordinatorMetrics()
        self.emit = events.emit
        self._words: dict[str, str] = {}
        """By member: its last word."""
        self._begun: dict[tuple[str, str], float] = {}

    # --- what the coordinator tells -------------------------------------------------------------------------------

    def decided(self, before: FleetState, after: FleetState, ask: say.Command | None = None) -> None:
        """The fleet's state may have changed, and that is kept. `ask`: the command that was begun by it."""
        if ask is not None:
            self._accepted(ask, after.epoch)
        if before is after:
            return
        if before.epoch == Epoch():
            self._began(after)
            return
        if before.phase is not after.phase:
            self.emit("phase", before=before.phase, after=after.phase, epoch=after.epoch)
        if before.state is not after.state:
            self.metrics.targets.labels(before.state, after.state).inc()
        if (before.version, before.version_known) != (after.version, after.version_known):
            self.emit("weights", version=after.version, known=after.version_known, kv=after.kv)
        was = {hold.owner: hold for hold in before.holds}
        now = {hold.owner: hold for hold in after.holds}
        for owner, hold in now.items():
            if owner not in was:
                self.metrics.placed.labels(hold.mode).inc()
            if was.get(owner) != hold:
                ends = None if hold.deadline_s is None else hold.deadline_s - self._clock.monotonic_s()
                self.emit("hold", owner=owner, mode=hold.mode, ends_in_seconds=ends and round(ends, 3))
        for owner in sorted(was.keys() - now.keys()):
            how = self._how(was[owner], before, ask.break_hold_of if ask else None)
            self.metrics.ended.labels(how).inc()
            self.emit("hold_ended", owner=owner, how=how)

    def _began(self, fleet: FleetState) -> None:
        """What a life of the coordinator begins with was decided in earlier ones: nothing of it is news."""
        holds = ", ".join(hold.owner for hold in fleet.holds)
        self.emit(
            "began",
            phase=fleet.phase,
            epoch=fleet.epoch,
            state=fleet.state,
            version=fleet.version,
            holds=holds,
        )

    def _how(self, hold: Hold, before: FleetState, broken: str | None) -> str:
        if before.state is State.STOPPED:
            return "stopped"  # a START begins without holds
        if hold.owner == broken:
            return "broken"
        over = hold.deadline_s is not None and hold.deadline_s <= self._clock.monotonic_s()
        return "expired" if over else "released"

    def member(self, record: MemberRecord) -> None:
        before, word = self._words.get(record.name, NEW), str(record.word)
        if before != word:
            self.metrics.moved.labels(before, word).inc()
        if record.name not in self._words and len(self._words) >= 2 * MEMBERS_MAX:
            del self._words[next(iter(self._words))]
        self._words[record.name] = word
        self.emit(
            "member",
            member=record.name,
            incarnation=record.incarnation,
            state=record.word,
            version=record.version,
            **({"failed": record.failed} if record.failed else {}),
        )

    def _accepted(self, ask: say.Command, epoch: Epoch) -> None:
        self.metrics.accepted.labels(ask.command).inc()
        self._begun[ask.owner, ask.command_id] = self._clock.monotonic_s()
        more = {"broken": ask.break_hold_of} if ask.break_hold_of else {}
        self.emit("command", owner=ask.owner, command=ask.command, id=ask.command_id, epoch=epoch, **more)

    def finished(self, record: CommandRecord) -> None:
        self.metrics.finished.labels(record.command, ENDS[0] if record.ok else ENDS[1]).inc()
        begun_s = self._begun.pop(record.key, None)
        if begun_s is not None:
            self.metrics.duration.labels(record.command).observe(self._clock.monotonic_s() - begun_s)
        self.emit(
            "command_done",
            owner=record.owner,
            command=record.command,
            id=record.command_id,
            ok=record.ok,
            message=record.message,
        )

    def refused(self, ask: say.Command, why: CommandRefused, target: State) -> None:
        self.metrics.refused.labels(ask.command, target).inc()
        self.emit("refused", owner=ask.owner, command=ask.command, id=ask.command_id, why=str(why))

    def invalid(self, ask: say.Command, why: Exception) -> None:
        """`ask.command` may be any word: it is no label."""
        self.metrics.invalid.inc()
        self.emit("invalid", owner=ask.owner, why=str(why))

    def stale(self, member: str, incarnation: int) -> None:
        self.metrics.stale.inc()
        self.emit("stale_life", member=member, incarnation=incarnation)

    # --- what others ask ------------------------------------------------------------------------------------------

    def render(self, fleet: FleetState, records: list[MemberRecord]) -> say.MetricsText:
        self.metrics.show(fleet, {record.name: str(record.word) for record in records})
        return say.MetricsText(self.metrics.render())

    async def answer(self, asked: say.GetEvents) -> say.Events:
        """Waits as long as it was asked to, within bounds."""
        log = self.events
        same = asked.ring in ("", log.ring)
        after = max(0, asked.after) if same else 0
        gap = "" if same else "the ring that was followed is lost; this is another one"
        if same and after > log.last:
            gap, after = f"number {after} was never told by this coordinator: its last ones were lost", 0
        if not gap:
            await log.wait(after, min(max(0.0, asked.wait_seconds), EVENTS_WAIT_SECONDS_MAX))
        missed = log.missed(after)
        if missed and not gap and asked.ring:
            gap = f"{missed} events are too old to be kept"
        events = [worded(event) for event in log.since(after)[:EVENTS_PER_CALL_MAX]]
        return say.Events(log.ring, events, log.last, missed, gap)


def worded(event: Event) -> say.Happened:
    """An event as it is told: its fields are short words and numbers."""
    return say.Happened(
        event.number, event.wall_ns, event.name, {name: _word(v) for name, v in event.fields.items()}
    )


def _word(value: Any) -> str | int | float | bool | None:
    if isinstance(value, str):
        return str(value)[:EVENT_FIELD_CHARS_MAX]
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else str(value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, int) for part in value):
        return str(Epoch(*value))  # an event of an earlier life, read from its file
    if isinstance(value, Epoch):
        return str(value)
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text[:EVENT_FIELD_CHARS_MAX]
