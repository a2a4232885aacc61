"""What is explored of core/joins: a scheduler that tries twice, ranks that report when they like, one of which may be lost.

The actors: the node that owns the joins; a scheduler that announces attempt 1 and, when that failed or was aborted by it,
attempt 2; three ranks that each write two blocks in each attempt, well or badly, and report. Reports, opens and proofs of
exit are messages in a set: they come in any order, repeatedly, late, or never, a report also after its join was forgotten. An
open is not delivered once its join was forgotten: names are used once, and the node opens its joins itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import msgspec

from interlock.checking.diagrams import Diagram, from_table
from interlock.checking.explorer import Broken, World
from interlock.checking.parts import Machine, Mail, count_of
from interlock.core import joins
from interlock.core.errors import ProtocolError
from interlock.core.joins import Completed, Failed, Join, JoinName, Kind, Outcome, Phase
from interlock.core.layouts import EMPTY_SHARD, Shard

BLOCKS = 2
NEVER = 1e9
"""Later than every deadline and expiry of these worlds."""


class State(msgspec.Struct, frozen=True, array_like=True):
    """Of the whole world. `cores[a]`: the join of attempt a as a number of the machine, NOT_HELD when the node holds none."""

    cores: tuple[int, ...]
    sent: int
    announced: int
    """Attempts announced so far."""
    ends: tuple[Outcome | Literal["failed"] | None, ...]
    """What the scheduler was told of each attempt."""
    alive: int
    """Ranks not lost, as bits."""
    losses_left: int
    aborts_left: int
    timers_left: int


NOT_HELD = -1
Transition = Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]


class Joins(World[State]):
    """Saves or loads of two blocks by `ranks` ranks, in at most `attempts` attempts."""

    protocol = "joins"

    def __init__(
        self,
        *,
        ranks: int,
        attempts: int,
        losses: int = 0,
        aborts: int = 0,
        timers: int = 0,
        kind: Kind = Kind.SAVE,
        writers: int | None = None,
        may_become: tuple[Outcome, ...] = ((True, True), (True, False)),
        transition: Transition = joins.transition,
        symmetric: bool = True,
    ) -> None:
        self.symmetric = symmetric
        self.may_become = may_become
        writers = ranks if writers is None else writers
        self.shards = tuple(Shard(0, 1, r, r + 1) if r < writers else EMPTY_SHARD for r in range(ranks))
        self.kind = kind
        some_write = f", {writers} of which write" if writers < ranks else ""
        self.name = f"{kind} by {count_of(ranks, 'rank')}{some_write}, {count_of(attempts, 'attempt')}"
        self.budget = {"lost ranks": losses, "aborts": aborts, "firing timers": timers}
        self.reaches = losses == aborts == timers == 0
        self.names = tuple(JoinName("s", number + 1) for number in range(attempts))
        self.opens = tuple(
            joins.Open(name, BLOCKS, self.shards, 1, writers, 10.0, kind) for name in self.names
        )
        self.outcomes = tuple(self._outcomes_of(rank) for rank in range(ranks))
        self.roles = tuple(int(shard == EMPTY_SHARD) for shard in self.shards)
        self._lives = [tuple(bits >> rank & 1 for rank in range(ranks)) for bits in range(1 << ranks)]
        self._nothing_known = (0,) * ranks
        self._known: dict[int, tuple[int, ...]] = {}
        self._said: dict[int, tuple[tuple[Any, ...], ...]] = {}
        self._renamed: dict[tuple[int, tuple[int, ...]], int] = {}
        self._renamed_sent: dict[tuple[int, tuple[int, ...]], int] = {}
        self.machine: Machine[Any, Any, Any] = Machine(transition)
        self.mail: Mail[tuple[Any, ...]] = Mail()
        self.fresh = tuple(self.machine.number(Join(name)) for name in self.names)
        self.start = State(
            (NOT_HELD,) * attempts, 0, 0, (None,) * attempts, (1 << ranks) - 1, losses, aborts, timers
        )

    def _outcomes_of(self, rank: int) -> tuple[Outcome, ...]:
        if self.shards[rank] == EMPTY_SHARD and self.kind is Kind.SAVE:
            return ((),)
        return self.may_become

    def initial(self) -> Iterable[State]:
        return [self.start]

    # --- what may happen -----------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        yield from self._scheduler(state)
        yield from self._ranks(state)
        for message in self.mail.read(state.sent):
            yield from self._deliver(state, message)
        yield from self._time(state)

    def _scheduler(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        number = state.announced
        if number == 0 or (number < len(self.names) and state.ends[number - 1] == "failed"):
            yield (
                ("announce", number),
                msgspec.structs.replace(
                    state, announced=number + 1, sent=state.sent | self.mail.bit(("open", number))
                ),
            )
        if state.aborts_left and number and state.ends[number - 1] is None:
            left = msgspec.structs.replace(state, aborts_left=state.aborts_left - 1)
            yield ("abort", number - 1), self._tell(left, number - 1, joins.Abort(self.names[number - 1]))

    def _ranks(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        for rank, outcomes in enumerate(self.outcomes):
            if not state.alive >> rank & 1:
                continue
            for number in range(state.announced):
                bits = [self.mail.bit(("report", number, rank, outcome)) for outcome in outcomes]
                if state.sent & sum(bits):
                    continue
                for outcome, bit in zip(outcomes, bits, strict=True):
                    yield (
                        ("write", number, rank, outcome),
                        msgspec.structs.replace(state, sent=state.sent | bit),
                    )
            if state.losses_left:
                yield (
                    ("die", rank),
                    msgspec.structs.replace(
                        state,
                        alive=state.alive & ~(1 << rank),
                        losses_left=state.losses_left - 1,
                        sent=state.sent | self.mail.bit(("lost", rank)),
                    ),
                )

    def _deliver(self, state: State, message: tuple[Any, ...]) -> Iterable[tuple[Any, State | Broken]]:
        what, number = message[0], message[1]
        if what == "open":
            core = state.cores[number]
            # A name whose tombstone is gone is not opened again.
            if state.ends[number] is None or (core != NOT_HELD and self.machine[core].opened is not None):
                yield message, self._tell(state, number, self.opens[number])
        elif what == "report":
            report = joins.Report(self.names[number], message[2], message[3])
            yield message, self._tell(state, number, report)
        else:
            for attempt in range(state.announced):
                if state.cores[attempt] != NOT_HELD:
                    lost = joins.RankLost(self.names[attempt], number)
                    yield ("lost", number, attempt), self._tell(state, attempt, lost)

    def _time(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        """A deadline passes, or what is only remembered is forgotten. Waiting to forget costs no timer of the budget."""
        for number, core in enumerate(state.cores):
            if core == NOT_HELD:
                continue
            if self.machine[core].phase is Phase.OPEN:
                if state.timers_left:
                    left = msgspec.structs.replace(state, timers_left=state.timers_left - 1)
                    yield ("deadline", number), self._tell(left, number, joins.Tick(NEVER))
            elif state.timers_left or self.budget["firing timers"]:
                waited, _ = self.machine.step(core, joins.Tick(0.0))
                kept = msgspec.structs.replace(state, cores=_with(state.cores, number, waited))
                yield ("forget", number), self._tell(kept, number, joins.Tick(NEVER))

    def _tell(self, state: State, number: int, event: joins.Event) -> State | Broken:
        """The node hears `event` about attempt `number`."""
        core = state.cores[number]
        try:
            core, effects = self.machine.step(self.fresh[number] if core == NOT_HELD else core, event)
        except (AssertionError, ProtocolError) as error:
            return Broken(f"the node raised {type(error).__name__}: {error}")
        ends = state.ends
        for effect in effects:
            if isinstance(effect, Completed | Failed):
                if ends[number] is not None:
                    return Broken(f"attempt {number + 1} ended twice")
                end: Outcome | Literal["failed"] = effect.good if isinstance(effect, Completed) else "failed"
                ends = _with(ends, number, end)
            elif isinstance(effect, joins.Forget):
                core = NOT_HELD
        return msgspec.structs.replace(state, cores=_with(state.cores, number, core), ends=ends)

    # --- what is alike -------------------------------------------------------------------------------------------

    def canonical(self, state: State) -> State:
        """Ranks of one role are interchangeable: they are sorted by what they did and what the node knows of it."""
        if not self.symmetric:
            return state
        known = [self._known_of(core) for core in state.cores]
        marks = list(
            zip(self.roles, self._lives[state.alive], self._said_in(state.sent), *known, strict=True)
        )
        if all(one <= two for one, two in pairwise(marks)):
            return state
        order = tuple(sorted(range(len(marks)), key=marks.__getitem__))
        return State(
            tuple(self._renamed_core(core, order) for core in state.cores),
            self._renamed_mail(state.sent, order),
            state.announced,
            state.ends,
            sum((state.alive >> old & 1) << new for new, old in enumerate(order)),
            state.losses_left,
            state.aborts_left,
            state.timers_left,
        )

    def _known_of(self, core: int) -> tuple[int, ...]:
        """For each rank, what a join knows of it: its report, its loss."""
        if core == NOT_HELD:
            return self._nothing_known
        known = self._known.get(core)
        if known is None:
            join: Join = self.machine[core]
            reported = {report.rank for report in join.reports}
            known = tuple((rank in reported) + 2 * (rank in join.lost) for rank in range(len(self.shards)))
            self._known[core] = known
        return known

    def _said_in(self, sent: int) -> tuple[tuple[Any, ...], ...]:
        """For each rank, the messages that speak of it."""
        said = self._said.get(sent)
        if said is None:
            rows: list[list[Any]] = [[] for _ in self.shards]
            for message in self.mail.read(sent):
                if message[0] == "report":
                    rows[message[2]].append((0, message[1], message[3]))
                elif message[0] == "lost":
                    rows[message[1]].append((1,))
            said = self._said[sent] = tuple(tuple(sorted(row)) for row in rows)
        return said

    def _renamed_core(self, core: int, order: tuple[int, ...]) -> int:
        if core == NOT_HELD:
            return core
        key = (core, order)
        renamed = self._renamed.get(key)
        if renamed is None:
            join: Join = self.machine[core]
            reports = (
                msgspec.structs.replace(report, rank=order.index(report.rank)) for report in join.reports
            )
            renamed = self._renamed[key] = self.machine.number(
                msgspec.structs.replace(
                    join,
                    reports=tuple(sorted(reports, key=lambda report: report.rank)),
                    lost=tuple(sorted(order.index(rank) for rank in join.lost)),
                )
            )
        return renamed

    def _renamed_mail(self, sent: int, order: tuple[int, ...]) -> int:
        key = (sent, order)
        renamed = self._renamed_sent.get(key)
        if renamed is None:
            renamed = 0
            for message in self.mail.read(sent):
                if message[0] == "report":
                    message = (*message[:2], order.index(message[2]), message[3])
                elif message[0] == "lost":
                    message = ("lost", order.index(message[1]))
                renamed |= self.mail.bit(message)
            self._renamed_sent[key] = renamed
        return renamed

    # --- what must hold ------------------------------------------------------------------------------------------

    def wrong(self, state: State) -> str | None:
        for number, end in enumerate(state.ends):
            if end is None or end == "failed":
                continue
            true = self._truth(state, number)
            if end != true:
                return f"attempt {number + 1} ended with blocks {_words(end)}, and the ranks made them {_words(true)}"
        return None

    def _truth(self, state: State, number: int) -> Outcome:
        """What the ranks did to the blocks: good where each that had to do with them did well."""
        good = [True] * BLOCKS
        for rank, outcomes in enumerate(self.outcomes):
            said = next(
                (o for o in outcomes if state.sent & self.mail.bit(("report", number, rank, o))), None
            )
            if said is None and outcomes != ((),):
                return (False,) * BLOCKS
            for block, well in enumerate(said or ()):
                good[block] &= well
        return tuple(good)

    def good(self, state: State) -> bool:
        """The scheduler knows how its last attempt ended, and the node waits for nothing."""
        ended = state.announced > 0 and state.ends[state.announced - 1] is not None
        return ended and all(
            core == NOT_HELD or self.machine[core].phase in (Phase.COMPLETED, Phase.FAILED)
            for core in state.cores
        )

    def tell(self, state: State, action: tuple[Any, ...], after: State | Broken) -> str:
        what, number = action[0], action[1]
        words: dict[str, Callable[[], str]] = {
            "announce": lambda: f"the scheduler announces attempt {number + 1}",
            "abort": lambda: f"the scheduler aborts attempt {number + 1}",
            "write": lambda: (
                f"rank {action[2]} writes attempt {number + 1}: blocks {_words(action[3])}; it reports"
            ),
            "die": lambda: f"rank {number} dies",
            "open": lambda: f"the node opens the join of attempt {number + 1}",
            "report": lambda: f"the report of rank {action[2]} on attempt {number + 1} arrives",
            "lost": lambda: f"the node learns for attempt {action[2] + 1} that rank {number} is gone",
            "deadline": lambda: f"the deadline of attempt {number + 1} passes",
            "forget": lambda: f"the node forgets attempt {number + 1}",
        }
        said = words[what]()
        if isinstance(after, State) and after.ends != state.ends:
            told = next(new for old, new in zip(state.ends, after.ends, strict=True) if old != new)
            said += ": it FAILED" if told == "failed" else f": it COMPLETED with blocks {_words(told)}"
        return said


def _with(row: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*row[:at], value, *row[at + 1 :])


def _words(outcome: Any) -> str:
    return " and ".join("good" if well else "bad" for well in outcome) or "none of its own"


ANY_BLOCK_BAD = ((True, True), (True, False), (False, True))


def worlds(budget: Literal["small", "full"]) -> Sequence[World[Any]]:
    """Full: three ranks, two attempts, one rank lost, one abort, one deadline; saves, loads, and heads held twice."""
    fault_free = [
        Joins(ranks=3, attempts=1, may_become=ANY_BLOCK_BAD),
        Joins(ranks=3, attempts=1, may_become=ANY_BLOCK_BAD, kind=Kind.LOAD),
        Joins(ranks=3, attempts=1, may_become=ANY_BLOCK_BAD, writers=2),
    ]
    if budget == "small":
        return [*fault_free, Joins(ranks=2, attempts=2, losses=1, aborts=1, timers=1)]
    return [
        *fault_free,
        Joins(ranks=2, attempts=2, losses=1, aborts=1, timers=2, may_become=ANY_BLOCK_BAD),
        Joins(ranks=3, attempts=2, losses=1, aborts=1, timers=1),
        Joins(ranks=3, attempts=2, losses=1, timers=1, kind=Kind.LOAD),
        Joins(ranks=3, attempts=2, losses=1, timers=1, writers=2),
    ]


def diagrams() -> dict[str, Diagram]:
    return {
        "joins": Diagram(
            "One join (core/joins)",
            tuple(Phase),
            from_table(joins.TABLE),
            initial=Phase.EARLY,
            final=(Phase.COMPLETED, Phase.FAILED),
        )
    }
