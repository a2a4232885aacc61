"""What is explored of core/sessions: engines that write the same keys into a slab too small for all of them.

The actors: a node with a slab of a few slots, an index, the write sessions and their joins; writers, each a scheduler and its
ranks, that ask for sessions one after another without waiting. A rank that was given slots copies whenever it likes: it begins
(from then on its part of the slots is torn), ends, and reports; between any two of these it may be frozen for any time, past
the deadline too, for nothing makes it go on. Reports and proofs of exit come late, repeatedly and in any order. The index may
evict, so that slots are used again. A restarted node forgets everything and has a new slab; ranks still write to the old one.

A *reader* is not an actor: at every moment every published slot must hold exactly its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec

from interlock.checking.diagrams import Diagram, from_table
from interlock.checking.explorer import Broken, World
from interlock.checking.parts import Machine, Mail, count_of
from interlock.core import joins, sessions
from interlock.core.errors import RemoteProtocolError
from interlock.core.joins import JoinName
from interlock.core.layouts import Shard
from interlock.core.sessions import Phase, Session, SlabName

NEVER = 1e9
NONE = -1
GRANTED, COPYING, SILENT = 1, 2, 3
"""Of a rank in a session: it may begin, it is in the middle, it will not touch the slots again. 0: not concerned."""
TORN = -1
Transition = Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]


class State(msgspec.Struct, frozen=True, array_like=True):
    """Sessions are numbered; `cores` and `joins` hold numbers of machines, NONE when the node knows no such session."""

    cores: tuple[int, ...]
    joins: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    """For each session the state of the writer's ranks in it."""
    slabs: tuple[int, ...]
    """For each session the slab in which its ranks write."""
    content: tuple[tuple[int, ...], ...]
    """For each slot what each rank's part of it holds: a key's number, TORN, or NONE."""
    index: tuple[int, ...]
    """For each key the slot it is published in, or NONE."""
    under_way: tuple[int, ...]
    """For each key the session that is writing it, or NONE."""
    free: int
    sent: int
    dead: int
    """Processes that are gone, as bits: rank r of writer w is w * (ranks + 1) + r, its scheduler comes last."""
    left: tuple[int, ...]
    """What is left of the budget, in the order of `FAULTS`."""
    slab: int


FAULTS = ("crashes", "deadlines", "bad copies", "aborts", "evictions", "node restarts")
CRASH, DEADLINE, BAD, ABORT, EVICT, RESTART = range(len(FAULTS))


class Sessions(World[State]):
    """`asks[w]` lists what writer w asks for, session by session, each a tuple of keys."""

    protocol = "sessions"

    def __init__(
        self,
        *,
        asks: Sequence[Sequence[tuple[int, ...]]],
        ranks: int = 1,
        slots: int = 2,
        faults: tuple[int, ...] = (0,) * len(FAULTS),
        transition: Transition = sessions.transition,
    ) -> None:
        self.asks = [ask for writer in asks for ask in writer]
        self.writer_of = [writer for writer, row in enumerate(asks) for _ in row]
        self.ranks = ranks
        self.keys = 1 + max(key for ask in self.asks for key in ask)
        self.name = (
            f"{count_of(len(asks), 'writer')} of {count_of(ranks, 'rank')}, {count_of(len(self.asks), 'session')}, "
            f"{count_of(self.keys, 'key')}, {count_of(slots, 'slot')}"
        )
        self.budget = dict(zip(FAULTS, faults, strict=True))
        self.fault_free = self.reaches = not any(faults)
        self.machine: Machine[Any, Any, Any] = Machine(transition)
        self.join_machine: Machine[Any, Any, Any] = Machine(joins.transition)
        self.mail: Mail[tuple[Any, ...]] = Mail()
        self.shards = tuple(Shard(0, 1, r, r + 1) for r in range(ranks))
        nobody = sessions.start(
            JoinName("", 0), slab=SlabName(0, 0), keys=(b"",), slots=(NONE,), given=("",), deadline_s=0.0
        )
        self.over = self.machine.number(msgspec.structs.replace(nobody, phase=Phase.FREED, holders=()))
        self.unconcerned = (0,) * ranks
        self.unwritten = (NONE,) * ranks
        self._kept: dict[Any, int] = {}
        self._short: dict[Any, tuple[Any, ...]] = {}
        count = len(self.asks)
        self.start = State(
            cores=(NONE,) * count,
            joins=(NONE,) * count,
            ranks=((0,) * ranks,) * count,
            slabs=(0,) * count,
            content=((NONE,) * ranks,) * slots,
            index=(NONE,) * self.keys,
            under_way=(NONE,) * self.keys,
            free=(1 << slots) - 1,
            sent=0,
            dead=0,
            left=faults,
            slab=0,
        )

    def initial(self) -> Iterable[State]:
        return [self.start]

    def process(self, session: int, rank: int) -> int:
        """The number of a process; `rank` == self.ranks is the scheduler."""
        return self.writer_of[session] * (self.ranks + 1) + rank

    # --- what may happen -----------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        for number in range(len(self.asks)):
            yield from self._ask(state, number)
            yield from self._copy(state, number)
            yield from self._trouble(state, number)
        for message in self.mail.read(state.sent):
            yield from self._deliver(state, message)
        if state.left[CRASH]:
            yield from self._crash(state)
        if state.left[EVICT]:
            for key, slot in enumerate(state.index):
                if slot != NONE:
                    yield (
                        ("evict", key),
                        msgspec.structs.replace(
                            _spent(state, EVICT),
                            index=_with(state.index, key, NONE),
                            free=state.free | 1 << slot,
                        ),
                    )
        if state.left[RESTART]:
            yield ("restart",), self._restarted(state)

    def _ask(self, state: State, number: int) -> Iterable[tuple[Any, State | Broken]]:
        """The scheduler asks for a session: its writer's next, or again one that a restarted node has forgotten."""
        if state.dead >> self.process(number, self.ranks) & 1 or state.cores[number] != NONE:
            return
        if (
            number
            and self.writer_of[number - 1] == self.writer_of[number]
            and not self._asked(state, number - 1)
        ):
            return
        keys = [k for k in self.asks[number] if state.index[k] == NONE and state.under_way[k] == NONE]
        slots = [slot for slot in range(len(state.content)) if state.free >> slot & 1][: len(keys)]
        keys = keys[: len(slots)]
        ranks_alive = not any(state.dead >> self.process(number, rank) & 1 for rank in range(self.ranks))
        if not keys or not ranks_alive:
            return
        name = JoinName("s", number)
        core = sessions.start(
            name,
            slab=SlabName(state.slab, 0),
            keys=tuple(bytes([key]) for key in keys),
            slots=tuple(slots),
            given=tuple(str(self.process(number, rank)) for rank in range(self.ranks)),
            deadline_s=10.0,
        )
        opened = joins.Open(name, len(keys), self.shards, 1, self.ranks, 10.0)
        join, _ = joins.transition(joins.Join(name), opened)
        under_way = tuple(number if key in keys else other for key, other in enumerate(state.under_way))
        yield (
            ("ask", number, tuple(keys), tuple(slots)),
            msgspec.structs.replace(
                state,
                cores=_with(state.cores, number, self.machine.number(core)),
                joins=_with(state.joins, number, self.join_machine.number(join)),
                ranks=_with(state.ranks, number, (GRANTED,) * self.ranks),
                slabs=_with(state.slabs, number, state.slab),
                under_way=under_way,
                free=state.free & ~sum(1 << slot for slot in slots),
            ),
        )

    def _asked(self, state: State, number: int) -> bool:
        """Whether this ask is behind its writer: granted, or nothing of it was left to write."""
        return state.cores[number] != NONE or all(
            state.index[key] != NONE or state.under_way[key] != NONE for key in self.asks[number]
        )

    def _copy(self, state: State, number: int) -> Iterable[tuple[Any, State | Broken]]:
        for rank, doing in enumerate(state.ranks[number]):
            if doing not in (GRANTED, COPYING) or state.dead >> self.process(number, rank) & 1:
                continue
            if doing == GRANTED:
                yield ("begin", number, rank), self._wrote(state, number, rank, COPYING, TORN)
                continue
            for well in (True, False) if state.left[BAD] else (True,):
                after = self._wrote(state, number, rank, SILENT, None if well else TORN)
                report = self.mail.bit(("report", number, rank, well, state.slabs[number]))
                after = msgspec.structs.replace(after, sent=after.sent | report)
                yield ("copy", number, rank, well), after if well else _spent(after, BAD)

    def _wrote(self, state: State, number: int, rank: int, doing: int, byte: int | None) -> State:
        """The state in which `rank` wrote `byte` (None: the right ones) to its part of its session's slots."""
        content = state.content
        if state.slabs[number] == state.slab:  # Else it wrote to the slab of a node that is gone.
            core: Session = self.machine[state.cores[number]]
            for key, slot in zip(core.keys, core.slots, strict=True):
                part = _with(content[slot], rank, key[0] if byte is None else byte)
                content = _with(content, slot, part)
        row = _with(state.ranks[number], rank, doing)
        return msgspec.structs.replace(state, content=content, ranks=_with(state.ranks, number, row))

    def _trouble(self, state: State, number: int) -> Iterable[tuple[Any, State | Broken]]:
        """Deadlines and aborts, while they mean something."""
        if state.cores[number] == NONE:
            return
        if self.machine[state.cores[number]].phase not in (Phase.WRITING, Phase.SETTLING):
            return
        if state.left[DEADLINE]:
            yield (
                ("deadline", number),
                self._tell(_spent(state, DEADLINE), number, sessions.Tick(NEVER), joins.Tick(NEVER)),
            )
        if state.left[ABORT] and not state.dead >> self.process(number, self.ranks) & 1:
            abort = joins.Abort(JoinName("s", number))
            yield ("abort", number), self._tell(_spent(state, ABORT), number, sessions.Abort(), abort)

    def _deliver(self, state: State, message: tuple[Any, ...]) -> Iterable[tuple[Any, State | Broken]]:
        if message[0] == "report":
            _, number, rank, well, slab = message
            if state.cores[number] == NONE:
                return
            promise = sessions.ProcessReported(str(self.process(number, rank)), SlabName(slab, 0))
            good = (well,) * len(self.machine[state.cores[number]].keys)
            report = joins.Report(JoinName("s", number), rank, good)
            # Refused: it speaks of the slab of a node that is gone. The join hears nothing of it either.
            with suppress(RemoteProtocolError):
                yield message, self._tell(state, number, promise, report)
            return
        _, process = message
        for number in range(len(self.asks)):
            if state.cores[number] == NONE or process // (self.ranks + 1) != self.writer_of[number]:
                continue
            rank = process % (self.ranks + 1)
            name = JoinName("s", number)
            if rank == self.ranks:
                after = self._tell(state, number, sessions.WriterGone(), joins.Abort(name))
            else:
                gone = sessions.ProcessGone(str(process))
                after = self._tell(state, number, gone, joins.RankLost(name, rank))
            yield ("gone", process, number), after

    def _crash(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        processes = (max(self.writer_of) + 1) * (self.ranks + 1)
        for process in range(processes):
            if not state.dead >> process & 1:
                yield (
                    ("crash", process),
                    msgspec.structs.replace(
                        _spent(state, CRASH),
                        dead=state.dead | 1 << process,
                        sent=state.sent | self.mail.bit(("gone", process)),
                    ),
                )

    def _restarted(self, state: State) -> State:
        fresh = self.start
        return msgspec.structs.replace(
            _spent(state, RESTART),
            cores=fresh.cores,
            joins=fresh.joins,
            content=fresh.content,
            index=fresh.index,
            under_way=fresh.under_way,
            free=fresh.free,
            slab=state.slab + 1,
        )

    # --- the node ------------------------------------------------------------------------------------------------

    def _tell(self, state: State, number: int, event: sessions.Event, also: joins.Event) -> State | Broken:
        """The node hears one thing; session and join are told, in this order, and what follows is done."""
        if state.joins[number] == NONE:
            return state  # Not known to the node, or over and forgotten by `canonical`.
        core, effects = self.machine.step(state.cores[number], event)
        join, heard = self.join_machine.step(state.joins[number], also)
        for end in heard:
            if isinstance(end, joins.Completed):
                core, more = self.machine.step(core, sessions.JoinCompleted(end.good))
                effects += more
            elif isinstance(end, joins.Failed):
                core, more = self.machine.step(core, sessions.JoinFailed())
                effects += more
        after = msgspec.structs.replace(
            state, cores=_with(state.cores, number, core), joins=_with(state.joins, number, join)
        )
        for effect in effects:
            done = self._do(after, number, effect)
            if isinstance(done, Broken):
                return done
            after = done
        return after

    def _do(self, state: State, number: int, effect: sessions.Effect) -> State | Broken:
        if isinstance(effect, sessions.ReleaseKey):
            key = effect.key[0]
            if state.under_way[key] != number:
                return Broken(f"session {number} released key {key}, which it was not writing")
            return msgspec.structs.replace(state, under_way=_with(state.under_way, key, NONE))
        if state.free >> effect.slot & 1 or effect.slot in state.index:
            return Broken(f"session {number} gave slot {effect.slot} away twice")
        if isinstance(effect, sessions.FreeSlot):
            return msgspec.structs.replace(state, free=state.free | 1 << effect.slot)
        key = effect.key[0]
        if state.index[key] != NONE:
            return Broken(f"key {key} was published twice")
        return msgspec.structs.replace(state, index=_with(state.index, key, effect.slot))

    # --- what is alike -------------------------------------------------------------------------------------------

    def canonical(self, state: State) -> State:
        """Drops what nothing can come of any more: an ended session's story, its messages, the bytes in free slots."""
        told = [
            self._told_shortly(number, *session, state.dead)
            for number, session in enumerate(
                zip(state.cores, state.joins, state.ranks, state.slabs, strict=True)
            )
        ]
        cores, joins_, ranks, slabs, over, idle = zip(*told, strict=True)
        content = state.content
        if state.free:
            content = tuple(
                self.unwritten if state.free >> slot & 1 else parts for slot, parts in enumerate(content)
            )
        sent = state.sent and self._mail_that_matters(state.sent, over, idle, state.slab)
        return State(
            cores,
            joins_,
            ranks,
            slabs,
            content,
            state.index,
            state.under_way,
            state.free,
            sent,
            state.dead,
            state.left,
            state.slab,
        )

    def _told_shortly(
        self, number: int, core: int, join: int, row: tuple[int, ...], slab: int, dead: int
    ) -> tuple[Any, ...]:
        """(core, join, ranks, slab) of one session as far as they matter, whether it is over, whether nothing goes on."""
        key = (number, core, join, row, slab, dead)
        told = self._short.get(key)
        if told is None:
            over = self._is_over(number, core, row, dead)
            if over:
                told = (self.over, NONE, self.unconcerned, 0, True, True)
            elif core == NONE:
                told = (NONE, NONE, self.unconcerned, 0, False, True)
            else:
                told = (core, join, row, slab, False, False)
            self._short[key] = told
        return told

    def _is_over(self, number: int, core: int, row: tuple[int, ...], dead: int) -> bool:
        """Whether the session has ended and no rank of it will do anything more."""
        if core == NONE or self.machine[core].phase not in (Phase.PUBLISHED, Phase.FREED):
            return False
        first = self.process(number, 0)
        return all(doing in (0, SILENT) or dead >> (first + rank) & 1 for rank, doing in enumerate(row))

    def _mail_that_matters(self, sent: int, over: tuple[bool, ...], idle: tuple[bool, ...], slab: int) -> int:
        """Without reports to ended sessions or of old slabs, and the deaths that no running session is concerned by.

        A session that has not begun is not concerned: none is begun with a process that is gone.
        """
        key = (sent, over, idle, slab)
        kept = self._kept.get(key)
        if kept is None:
            busy = {writer for writer, out in zip(self.writer_of, idle, strict=True) if not out}
            kept = 0
            for message in self.mail.read(sent):
                if message[0] == "report":
                    matters = not over[message[1]] and message[4] == slab
                else:
                    matters = message[1] // (self.ranks + 1) in busy
                kept |= self.mail.bit(message) * matters
            self._kept[key] = kept
        return kept

    # --- what must hold ------------------------------------------------------------------------------------------

    def wrong(self, state: State) -> str | None:
        for key, slot in enumerate(state.index):
            if slot != NONE and any(part != key for part in state.content[slot]):
                return f"a reader of key {key} finds other bytes in slot {slot}"
        return None

    def good(self, state: State) -> bool:
        """Every slot is free or published, every session that began has ended; without faults all keys are published."""
        if any(owner != NONE for owner in state.under_way):
            return False
        if state.free.bit_count() + sum(slot != NONE for slot in state.index) != len(state.content):
            return False
        return not self.fault_free or NONE not in state.index

    def tell(self, state: State, action: tuple[Any, ...], after: State | Broken) -> str:
        what, *rest = action
        words: dict[str, Callable[[], str]] = {
            "ask": lambda: (
                f"writer {self.writer_of[rest[0]]} starts session {rest[0]}: keys {rest[1]} to slots {rest[2]}"
            ),
            "begin": lambda: f"rank {rest[1]} of session {rest[0]} begins to copy",
            "copy": lambda: (
                f"rank {rest[1]} of session {rest[0]} ends its copy {'well' if rest[2] else 'badly'} and reports"
            ),
            "deadline": lambda: f"the deadline of session {rest[0]} passes",
            "abort": lambda: f"the scheduler aborts session {rest[0]}",
            "report": lambda: f"the report of rank {rest[1]} on session {rest[0]} arrives",
            "gone": lambda: f"the node learns for session {rest[1]} that process {rest[0]} is gone",
            "crash": lambda: f"process {rest[0]} dies",
            "evict": lambda: f"the index evicts key {rest[0]}",
            "restart": lambda: "the node dies and comes back with a new slab",
        }
        said = words[what]()
        if isinstance(after, State):
            for key, (old, new) in enumerate(zip(state.index, after.index, strict=True)):
                if new not in (old, NONE):
                    said += f"; key {key} is published in slot {new}"
            if what != "evict" and after.free & ~state.free:
                said += f"; slots now free: {[s for s in range(len(state.content)) if after.free >> s & 1]}"
        return said


def _with(row: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*row[:at], value, *row[at + 1 :])


def _spent(state: State, fault: int) -> State:
    return msgspec.structs.replace(state, left=_with(state.left, fault, state.left[fault] - 1))


def worlds(budget: Literal["small", "full"]) -> Sequence[World[Any]]:
    """Full: two writers, two slots, one crash, one freeze past the deadline, and at most one of everything else."""
    fault_free = [
        Sessions(asks=[[(0,), (1,)], [(1,), (0,)]]),
        Sessions(asks=[[(0, 1)], [(1,)]], ranks=2),
    ]
    if budget == "small":
        return [*fault_free, Sessions(asks=[[(0,)], [(0,), (0,)]], slots=2, faults=(1, 1, 0, 0, 1, 0))]
    return [
        *fault_free,
        Sessions(asks=[[(0,), (1,)], [(1,), (0,)]], faults=(1, 1, 1, 1, 1, 0)),
        Sessions(asks=[[(0, 1)], [(1, 0)]], ranks=2, faults=(1, 1, 1, 1, 1, 0)),
        Sessions(asks=[[(0,), (1,)], [(1,), (0,)]], faults=(1, 1, 1, 0, 1, 1)),
        Sessions(asks=[[(0,)], [(0,)]], ranks=2, faults=(1, 1, 1, 1, 1, 1)),
    ]


def diagrams() -> dict[str, Diagram]:
    return {
        "sessions": Diagram(
            "One write session (core/sessions)",
            tuple(Phase),
            from_table(sessions.TABLE),
            initial=Phase.WRITING,
            final=(Phase.PUBLISHED, Phase.FREED),
        )
    }
