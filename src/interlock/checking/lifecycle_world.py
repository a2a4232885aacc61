"""What is explored of the fleet's life: engines, a coordinator that restarts with and without its state, crossing commands.

The actors: members that walk (`core/lifecycle`), one of which may join late; a coordinator (`core/commands`, `core/recovery`) with a
record of each member (`core/roster`); clients whose commands come at any moment, in any order, and are refused where the table
says so. A member may die, freeze and thaw, fail a step; the coordinator may lose its memory, and its state too.

Targets are messages in a set, each member's own: in any order, repeatedly, late, or never, also those of a coordinator's earlier
life. A member's report is its state at any moment: one that comes late tells what it would have told in time, and the record takes
it as such, for its epoch only grows. A dead member's last words come late, to the coordinator's life that knew it. A freeze is
that nothing happens to a member while everything else does, which is in every walk; the budget counts what follows from it: that
a living member is suspected, or not heard before a deadline.

Where there is a front, it believes the highest epoch that it was told, and tells a coordinator of it at any moment. `clock_back`:
the life after the loss begins with a term below all that were. A deposed coordinator is started again, with what it wrote down.

Assumed of time, and of nothing else: while a coordinator without state recovers, a member that is alive and not frozen is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

from interlock.checking.explorer import Broken, World
from interlock.checking.lifecycle_seats import ALIVE, DEAD, NOBODY, Fleet, Seats
from interlock.checking.parts import Machine, Mail
from interlock.core import commands, lifecycle, recovery, roster
from interlock.core.commands import CommandRefused
from interlock.core.fleet_state import (
    Commanded,
    Excused,
    FleetState,
    Heard,
    Phase,
    Remembered,
    Settled,
    TellMembers,
    Tick,
)
from interlock.core.identity import Epoch
from interlock.core.lifecycle import MemberState, StepFailed, StepFinished, TargetHeard, TryAgain
from interlock.core.roster import Gone, MemberRecord, Reported, Sight, Silent
from interlock.core.targets import FINISHED, STRICTNESS, Command, State, Target

NEVER = 1e9
FIRST = "v1"
"""The weights that everybody begins with. No command of any world names them."""
MOVING = (State.RUNNING, State.UNPAUSING)
Transition = Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]
Restarts = Literal["none", "with state", "without state"]


class Lifecycle(World[Fleet]):
    """`engines` members that run, `joiners` that start, and clients that ask for `asks` once each."""

    protocol = "lifecycle"

    def __init__(
        self,
        *asks: Commanded,
        engines: int = 2,
        joiners: int = 0,
        deaths: int = 0,
        freezes: int = 0,
        failures: int = 0,
        restarts: Restarts = "none",
        front: bool = False,
        clock_back: bool = False,
        before: Sequence[Commanded] = (),
        member_transition: Transition = lifecycle.transition,
        fleet_transition: Transition = commands.transition,
    ) -> None:
        self.asks = asks
        self.size = engines + joiners
        self.owners = tuple(sorted({ask.owner for ask in (*before, *asks)}))
        self.with_state = restarts == "with state"
        self.front, self.term_after = front, 0 if clock_back else 2
        crossing = " x ".join(words(ask) for ask in asks) or "no command"
        self.name = f"{engines} engines, {joiners} joiners, {crossing}{' from PAUSED' if before else ''}"
        if front:
            self.name += f", a front{', the clock steps back' if clock_back else ''}"
        self.budget = {
            "deaths": deaths, "freezes": freezes, "failing steps": failures, "coordinator restarts": restarts,
        }  # fmt: skip
        self.reaches = deaths == freezes == failures == 0 and restarts == "none"
        self.fleets: Machine[Any, Any, Any] = Machine(fleet_transition)
        self.members: Machine[Any, Any, Any] = Machine(member_transition)
        self.records: Machine[Any, Any, Any] = Machine(roster.transition)
        self.mail: Mail[Target] = Mail()
        self.judged: dict[tuple[int, tuple[int, ...]], tuple[bool, bool]] = {}
        self.seats = Seats(self.fleets, self.members, self.records, self.mail, fails=failures > 0)
        self.idle: set[tuple[int, ...]] = set()
        """Reports that change nothing."""
        self.start = self._begin(before, engines, (deaths, freezes, failures, int(restarts != "none")))

    def _begin(self, before: Sequence[Commanded], engines: int, budget: tuple[int, int, int, int]) -> Fleet:
        """A fleet at rest: the engines stand where the commands in `before` brought them."""
        state, _ = recovery.restarted(None, term=1, version=FIRST, deadline_s=0.0)
        state, _ = commands.transition(state, Tick(NEVER))
        for ask in before:
            state, _ = commands.transition(state, ask)
        core, _ = lifecycle.transition(MemberState(), StepFinished(1, FIRST))
        core, effects = lifecycle.transition(core, TargetHeard(state.target))
        while any(isinstance(effect, lifecycle.Begin) for effect in effects):
            core, effects = lifecycle.transition(core, StepFinished(core.attempt, FIRST))
        # Attempts only tell one step from another; all begin alike.
        report = _report_of(core)
        joiners = self.size - engines
        return Fleet(
            self.fleets.number(state),
            (self.records.number(roster.register("", report)),) * engines + (NOBODY,) * joiners,
            (self.members.number(core),) * engines + (self.members.number(MemberState()),) * joiners,
            (0,) * self.size,
            (ALIVE,) * self.size,
            ("",) * self.size,
            0,
            0,
            *budget,
        )

    def initial(self) -> Iterable[Fleet]:
        return [self.start]

    # --- what may happen -----------------------------------------------------------------------------------------

    def steps(self, state: Fleet) -> Iterable[tuple[Any, Fleet | Broken]]:
        fleet: FleetState = self.fleets[state.fleet]
        for who in range(self.size):
            if state.life[who] == ALIVE:
                yield from self._walks(state, who)
            yield from self._fares(state, who)
            yield from self._is_seen(state, who)
        if fleet.phase is Phase.LEADING:
            for number, ask in enumerate(self.asks):
                if not state.asked >> number & 1:
                    asked = self._ask(state, number, ask)
                    if asked is not None:
                        yield ("asks", number), asked
            if self._judge(state)[1]:
                yield ("judges",), self._decide(state, Settled(fleet.epoch, True))
            if any(hold.deadline_s is not None for hold in fleet.holds):
                yield ("hold ends",), self._command(state, Tick(NEVER))
        elif fleet.phase is Phase.RECOVERING:
            unheard = self._unheard(state, fleet)
            if unheard <= state.freezes_left:
                left = but(state, freezes_left=state.freezes_left - unheard)
                yield ("recovers",), self._decide(left, Tick(NEVER))
        if state.restarts_left and fleet.phase is Phase.LEADING:
            left = but(state, restarts_left=state.restarts_left - 1)
            yield ("restarts",), self._restart(left, fleet if self.with_state else None)
        if self.front:
            yield from self._front_speaks(state, fleet)

    def _front_speaks(self, state: Fleet, fleet: FleetState) -> Iterable[tuple[Any, Fleet]]:
        known = next(iter(self.mail.read(state.front)), None)
        if fleet.phase is Phase.LEADING and (known is None or known.epoch < fleet.epoch):
            yield ("front hears",), but(state, front=self.mail.bit(fleet.target))
        if known is not None:
            yield ("front tells",), self._promise(self._decide(state, Remembered(known)))
        if fleet.phase is Phase.DEPOSED:
            yield ("starts again",), self._restart(state, fleet)

    def _walks(self, state: Fleet, who: int) -> Iterable[tuple[Any, Fleet]]:
        core: MemberState = self.members[state.members[who]]
        for target in self.mail.read(state.mail[who]):
            yield ("hears", who, target), self._tell_member(state, who, TargetHeard(target))
        if core.waits:
            yield ("tries again", who), self._tell_member(state, who, TryAgain(core.attempt))
        if core.state in FINISHED:
            version = core.version
            if core.state in (State.STARTING, State.UPDATING):
                version = state.loading[who] or FIRST
            yield ("finishes", who), self._tell_member(state, who, StepFinished(core.attempt, version))
            if state.failures_left and core.state is not State.STARTING:
                left = but(state, failures_left=state.failures_left - 1)
                for unchanged, may_pass in ((False, False), (True, False), (True, True)):
                    failed = StepFailed(core.attempt, "it broke", unchanged, may_pass)
                    yield ("fails", who, unchanged, may_pass), self._tell_member(left, who, failed)

    def _tell_member(self, state: Fleet, who: int, event: Any) -> Fleet:
        number, effects = self.members.step(state.members[who], event)
        loading, life = state.loading, state.life
        for effect in effects:
            if isinstance(effect, lifecycle.Begin):
                loading = put(loading, who, effect.version if effect.step == "UPDATE" else "")
            elif isinstance(effect, lifecycle.Leave):
                life = put(life, who, DEAD)
        return but(state, members=put(state.members, who, number), loading=loading, life=life)

    def _fares(self, state: Fleet, who: int) -> Iterable[tuple[Any, Fleet]]:
        if state.life[who] != DEAD and state.deaths_left:
            yield (
                ("dies", who),
                but(state, life=put(state.life, who, DEAD), deaths_left=state.deaths_left - 1),
            )

    def _is_seen(self, state: Fleet, who: int) -> Iterable[tuple[Any, Fleet | Broken]]:
        """What the coordinator hears, misses and sees of a member."""
        record = state.records[who]
        fleet: FleetState = self.fleets[state.fleet]
        if state.life[who] != DEAD or record != NOBODY:
            # What a report does depends on this alone, and it often says what is known.
            name = who if fleet.awaited else NOBODY
            core = state.members[who]
            key = (state.fleet, core, record, state.mail[who], state.life[who], name, int(state.updated))
            if key not in self.idle:
                told = self._report(state, who)
                same = told.fleet == state.fleet and told.promised == state.promised
                if same and self.seats.seat(told, who, fleet) == self.seats.seat(state, who, fleet):
                    self.idle.add(key)
                yield ("reports", who), self._goes_back(told, who) or told
        if record == NOBODY:
            if state.life[who] == DEAD and str(who) in fleet.awaited:
                yield ("is excused", who), self._decide(state, Excused(str(who), 1))
            return
        sight = self.records[record].sight
        if sight is Sight.HEARD and (state.life[who] == DEAD or state.freezes_left):
            left = state.freezes_left - (state.life[who] == ALIVE)
            yield ("is silent", who), self._note(but(state, freezes_left=left), who, Silent(1))
        if state.life[who] == DEAD and sight is not Sight.LOST:
            yield ("is gone", who), self._note(self._decide(state, Excused(str(who), 1)), who, Gone(1))

    def _note(self, state: Fleet, who: int, event: Any) -> Fleet:
        record, _ = self.records.step(state.records[who], event)
        return self._promise(but(state, records=put(state.records, who, record)))

    def _report(self, state: Fleet, who: int) -> Fleet:
        core: MemberState = self.members[state.members[who]]
        report = _report_of(core)
        if state.records[who] == NOBODY:
            first = self.records.number(roster.register("", report))
            state = but(state, records=put(state.records, who, first))
        else:
            state = self._note(state, who, report)
        if self.records[state.records[who]].sight is Sight.LOST:
            return state
        state = self._decide(state, Heard(str(who), 1, core.state, core.heard, core.version))
        return self._promise(self._tell_all(state, (who,)))

    def _goes_back(self, state: Fleet, who: int) -> Broken | None:
        """Whether the coordinator, just told of weights that the fleet stood with, goes on with the first ones."""
        known = self.members[state.members[who]].heard
        fleet: FleetState = self.fleets[state.fleet]
        if not state.updated or known is None or fleet.phase is not Phase.LEADING:
            return None
        if known.version == FIRST or fleet.version != FIRST:
            return None
        if self.records[state.records[who]].sight is Sight.LOST:
            return None
        told = f"member {who} tells of weights {known.version}, with which the fleet stood"
        return Broken(f"{told}, and its coordinator wants {FIRST}, which nobody asked for again")

    def _decide(self, state: Fleet, event: Any) -> Fleet:
        number, effects = self.fleets.step(state.fleet, event)
        if number == state.fleet:
            return state
        before, after = self.fleets[state.fleet], self.fleets[number]
        state = but(state, fleet=number)
        if before.phase is Phase.RECOVERING is not after.phase and after.basis == Epoch():
            # Nobody who could speak remembered any target: the pause is forgotten, outside of what can be promised.
            state = but(state, promised=0)
        if any(isinstance(effect, TellMembers) for effect in effects):
            state = self._tell_all(state, range(self.size))
        return state

    def _tell_all(self, state: Fleet, whom: Iterable[int]) -> Fleet:
        """Send the target to those whose record does not repeat its epoch."""
        fleet: FleetState = self.fleets[state.fleet]
        if fleet.phase is not Phase.LEADING:
            return state
        mail = list(state.mail)
        for who in whom:
            if state.records[who] != NOBODY and roster.needs_telling(
                self.records[state.records[who]], fleet.epoch
            ):
                mail[who] |= self.mail.bit(fleet.target)
        return but(state, mail=tuple(mail))

    # --- commands, and what clients are told ---------------------------------------------------------------------

    def _ask(self, state: Fleet, number: int, ask: Commanded) -> Fleet | None:
        try:
            return self._command(but(state, asked=state.asked | 1 << number), ask)
        except CommandRefused:
            return None

    def _command(self, state: Fleet, event: Any) -> Fleet:
        """By its owner's word, or at its deadline, a hold may end; then its promise ends too."""
        before = self._holders(state)
        after = self._decide(state, event)
        return self._promise(but(after, promised=after.promised & ~(before & ~self._holders(after))))

    def _holders(self, state: Fleet) -> int:
        holds = self.fleets[state.fleet].holds
        return sum(1 << self.owners.index(hold.owner) for hold in holds)

    def _judge(self, state: Fleet) -> tuple[bool, bool]:
        """Whether the coordinator takes the fleet to be done, and to stand, at the target."""
        fleet: FleetState = self.fleets[state.fleet]
        if fleet.phase is not Phase.LEADING:
            return False, False
        key = (state.fleet, tuple(sorted(state.records)))
        known = self.judged.get(key)
        if known is None:
            records = [self.records[number] for number in state.records if number != NOBODY]
            found = roster.condition(records, fleet.epoch, fleet.state, unseen=fleet.awaited)
            known = self.judged[key] = (found.done, found.ok)
        return known

    def _promise(self, state: Fleet) -> Fleet:
        """Clients are told at once that their pause or update stands: the earlier they rely on it, the more must hold."""
        fleet: FleetState = self.fleets[state.fleet]
        if fleet.state not in (State.PAUSED, State.SUSPENDED) or not self._judge(state)[1]:
            return state
        updated = state.updated or fleet.version != FIRST
        return but(state, promised=state.promised | self._holders(state), updated=updated)

    # --- a coordinator's next life -------------------------------------------------------------------------------

    def _restart(self, state: Fleet, kept: FleetState | None) -> Fleet:
        """It forgets what was in memory: records. Without state it knows only which names its launcher started."""
        expected = frozenset(map(str, range(self.size)))
        again, _ = recovery.restarted(
            kept, term=self.term_after, version=FIRST, expected=expected, deadline_s=1.0
        )
        records = [NOBODY] * self.size
        if kept is not None:
            unheard = self.records.number(MemberRecord("", 1, State.STARTING, sight=Sight.SUSPECT))
            for who, number in enumerate(state.records):
                if number != NOBODY and self.records[number].sight is not Sight.LOST:
                    records[who] = unheard
        return but(state, fleet=self.fleets.number(again), records=tuple(records))

    def _unheard(self, state: Fleet, fleet: FleetState) -> int:
        """Living members that remember a target and have not told this life of the coordinator."""
        return sum(
            state.life[int(name)] == ALIVE and self.members[state.members[int(name)]].heard is not None
            for name in fleet.awaited
        )

    # --- what must hold ------------------------------------------------------------------------------------------

    def wrong(self, state: Fleet) -> str | None:
        fleet: FleetState = self.fleets[state.fleet]
        stands = self._judge(state)[1]
        for who in range(self.size):
            core: MemberState = self.members[state.members[who]]
            alive = state.life[who] != DEAD
            record = state.records[who]
            if record != NOBODY and self.records[record].sight is Sight.LOST and alive:
                return f"member {who} is LOST and alive"
            if not alive:
                continue
            if state.promised and core.state in MOVING:
                return (
                    f"a pause that its owner was promised is not released, and member {who} is {core.state}"
                )
            at = lifecycle.admission(core, core.epoch)
            if (
                at is lifecycle.Admission.ADMIT
                and core.heard is not None
                and core.version != core.heard.version
            ):
                return (
                    f"member {who} takes work with weights {core.version}, and was told {core.heard.version}"
                )
            if stands and (fault := self._astray(core, fleet, registered=record != NOBODY)):
                return f"the fleet is said to be {fleet.state}, and member {who} {fault}"
        return None

    def _astray(self, core: MemberState, fleet: FleetState, *, registered: bool) -> str | None:
        """How this living member is not where the fleet is said to be."""
        paused = fleet.state in (State.PAUSED, State.SUSPENDED)
        if not registered:
            return f"is {core.state}" if core.state in MOVING and fleet.state is not State.RUNNING else None
        if core.state is not fleet.state:
            return f"is {core.state}"
        if core.epoch != fleet.epoch or core.version != fleet.version:
            return f"is at epoch {core.epoch}, weights {core.version}"
        if paused and (core.mode is None or STRICTNESS[core.mode] < STRICTNESS[fleet.mode]):
            return f"paused by {core.mode}, not {fleet.mode}"
        return None

    def good(self, state: Fleet) -> bool:
        """The fleet is where it was told to be, every living member is known, and the weights are; or nobody is left."""
        fleet: FleetState = self.fleets[state.fleet]
        if any(known.epoch > fleet.epoch for known in self.mail.read(state.front)):
            return False  # the front would drop the coordinator's word
        if fleet.phase is Phase.LEADING and ALIVE not in state.life and not fleet.awaited:
            return all(
                number == NOBODY or self.records[number].sight is Sight.LOST for number in state.records
            )
        done, ok = self._judge(state)
        if not ok and not (done and self.budget["failing steps"] and fleet.state is not State.STOPPED):
            return False  # a failure is an end, but it keeps nobody from being stopped
        known = all(
            life == DEAD or number != NOBODY for life, number in zip(state.life, state.records, strict=True)
        )
        return known and (not ok or (fleet.version_known and fleet.stop_for is None))

    def canonical(self, state: Fleet) -> Fleet:
        return self.seats.canonical(state)

    # --- words ---------------------------------------------------------------------------------------------------

    def tell(self, state: Fleet, action: tuple[Any, ...], after: Fleet | Broken) -> str:
        what = action[0]
        end = ""
        if isinstance(after, Fleet) and after.fleet != state.fleet:
            fleet: FleetState = self.fleets[after.fleet]
            end = f": the fleet's target is {fleet.state} at {fleet.epoch}"
        if what == "asks":
            return f"a client asks: {words(self.asks[action[1]])}{end}"
        if what in ("front hears", "front tells", "starts again"):
            now: FleetState = self.fleets[state.fleet]
            said = {
                "front hears": f"the front is told {now.state} at {now.epoch}",
                "front tells": "the front says what it was told last",
                "starts again": "the deposed coordinator is started again",
            }
            return said[what] + end
        if what == "restarts":
            return f"the coordinator restarts {'with' if self.with_state else 'without'} its state{end}"
        if what in ("judges", "hold ends", "recovers"):
            said = {
                "judges": "the coordinator says that the fleet stands",
                "hold ends": "a hold reaches its deadline",
                "recovers": "the coordinator has listened long enough",
            }
            return said[what] + end
        who = action[1]
        core = self.members[state.members[who]].state
        if what == "hears":
            end = f" {action[2].state} at {action[2].epoch}"
        elif what == "finishes":
            end = f" {core}"
        return f"member {who} {what}{end}"


def _report_of(core: MemberState) -> Reported:
    return Reported(1, core.state, core.epoch, core.standing, core.version, core.failed)


def but(state: Fleet, **changes: Any) -> Fleet:
    return msgspec.structs.replace(state, **changes)


def put(row: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*row[:at], value, *row[at + 1 :])


def words(ask: Commanded) -> str:
    more = ask.version or (f"hold of {ask.break_hold_of}" if ask.break_hold_of else "")
    if ask.command is Command.PAUSE:
        more = ask.mode
    if ask.composite:
        more = "after a pause"
    return f"{ask.command}{f'({more})' if more else ''} by {ask.owner}"
