"""Write sessions: who may touch which slot of the slab, and when a slot may be given to somebody else.

What can go wrong. A session's slots were freed when the session ended: by its deadline, by *finish* with a failed mask, by
the death of the connection. But ranks are other processes: one that froze in the middle of its copy wakes up later and
overwrites whatever stands in the slot by then; every byte of it, when tried (hazards M1; LMCache, tair §2.8). A session that
lived only in the memory of a manager left its keys *being written* for ever, so that nobody could write them again (tair
#107, #184). A *finish* popped its session before its arguments were checked, and burnt it.

Why it cannot here.
* The unit of quarantine is (slot, process that got it). All slots of one session are given to the same processes, so one
  set says it all: `holders`. A process leaves the set when it reports (a report, good or bad, is a promise of no further
  touch, sent by the code that copied) or when its exit is proven. Nothing else empties the set: no end of the session, no
  deadline, no word of the scheduler.
* While the set is not empty no slot of the session is freed, and none is published either: readers never see a block that
  somebody may still write.
* A session ends once: by its join's completion, or without one, by the join's failure, an abort, the deadline or the exit
  of its writer (the scheduler that asked for it). However it ends, its keys are released at once, for others to write to
  other slots; only the memory waits.
* Each slot leaves by exactly one of `Publish` (it belongs to the index from then on) and `FreeSlot`; each key by exactly one
  `ReleaseKey`.
* A session names (node incarnation, slab). A report for another slab promises nothing about this one and is refused.

The join of a session has the same name (core/joins). Drivers tell a rank's report to the session first: it is a promise
even where the join finds its contents impossible. Keys that are under way in another session are left to it
(core/session_book).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NoReturn

import msgspec

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.joins import Checksums, JoinName, Outcome
from interlock.core.limits import BLOCKS_PER_CALL_MAX, RANKS_MAX

Process = str
"""One life of one process, by a name the driver never uses twice: "engine-0/rank-1@1763689000000000000"."""


class SlabName(msgspec.Struct, frozen=True, array_like=True):
    """Which memory slots are meant: a report for another life or slab is refused."""

    node_incarnation: int
    slab: int

    def __str__(self) -> str:
        return f"slab {self.slab} of node incarnation {self.node_incarnation}"


class Phase(StrEnum):
    """Where a write session stands. PUBLISHED and FREED are final."""

    WRITING = "WRITING"
    """Processes may be writing; the join is open."""
    SETTLING = "SETTLING"
    """The join completed; a process that was given the slots has not promised yet, so nothing is published."""
    QUARANTINED = "QUARANTINED"
    """Ended without publication; the slots wait for the last promise or proof."""
    PUBLISHED = "PUBLISHED"
    FREED = "FREED"


# --- events ------------------------------------------------------------------------------------------------------


class JoinCompleted(msgspec.Struct, frozen=True):
    """The session's join completed; as in `joins.Completed`."""

    good: Outcome
    checksums: Checksums = ()


class JoinFailed(msgspec.Struct, frozen=True):
    """The join ended without every shard: nothing of this session is published."""


class ProcessReported(msgspec.Struct, frozen=True):
    """This process promised not to touch the slots of this session again."""

    process: Process
    slab: SlabName


class ProcessGone(msgspec.Struct, frozen=True):
    """The exit of this process is proven. Of no concern to a session that did not give it slots."""

    process: Process


class WriterGone(msgspec.Struct, frozen=True):
    """The exit of the scheduler that asked for this session is proven."""


class Abort(msgspec.Struct, frozen=True):
    """The writer wants nothing published: its request was preempted, aborted, or loaded badly."""


class Tick(msgspec.Struct, frozen=True):
    """Time goes on. Monotonic clock, seconds."""

    now_s: float


Event = JoinCompleted | JoinFailed | ProcessReported | ProcessGone | WriterGone | Abort | Tick


# --- effects -----------------------------------------------------------------------------------------------------


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Enter the block into the index. The slot belongs to the index from now on."""

    key: bytes
    slot: int
    checksums: bytes = b""
    """Packed (core/packed_sums)."""


class FreeSlot(msgspec.Struct, frozen=True, gc=False):
    """Nobody can touch this slot any more: it may be given out."""

    slot: int


class ReleaseKey(msgspec.Struct, frozen=True, gc=False):
    """This session no longer stands in the way of writing this key."""

    key: bytes


Effect = Publish | FreeSlot | ReleaseKey


# --- state -------------------------------------------------------------------------------------------------------


class Session(msgspec.Struct, frozen=True):
    """One write session; made by `start`."""

    name: JoinName
    slab: SlabName
    keys: tuple[bytes, ...]
    slots: tuple[int, ...]
    given: tuple[Process, ...]
    """The processes that were given the slots: those that write a shard, and any that merely could."""
    deadline_s: float
    phase: Phase = Phase.WRITING
    holders: tuple[Process, ...] = ()
    """Those of `given` that have neither promised nor are proven gone."""
    outcome: JoinCompleted | None = None


State = Session
_NOTHING: tuple[Effect, ...] = ()


def start(
    name: JoinName,
    *,
    slab: SlabName,
    keys: tuple[bytes, ...],
    slots: tuple[int, ...],
    given: tuple[Process, ...],
    deadline_s: float,
) -> Session:
    """A session in which `given` write `keys[i]` to `slots[i]`. Raises `LocalProtocolError` when that makes no sense."""
    fault = None
    if len(keys) != len(slots) or not 0 < len(keys) <= BLOCKS_PER_CALL_MAX:
        fault = f"it names {len(keys)} keys and {len(slots)} slots"
    elif len(set(keys)) != len(keys) or len(set(slots)) != len(slots):
        fault = "it names a key or a slot twice"
    elif not 0 < len(given) <= RANKS_MAX or len(set(given)) != len(given):
        fault = f"it gives its slots to {len(given)} processes, or to one of them twice"
    if fault is not None:
        raise LocalProtocolError(f"session {name} is not started: {fault}", session=str(name))
    return Session(name, slab, keys, slots, given, deadline_s, Phase.WRITING, given)


# --- transitions -------------------------------------------------------------------------------------------------


def _completed(session: Session, event: JoinCompleted) -> tuple[Session, tuple[Effect, ...]]:
    blocks = len(session.keys)
    if len(event.good) != blocks or (event.checksums and len(event.checksums) != blocks):
        _refuse(session, event, f": it tells of {len(event.good)} blocks, and the session has {blocks}")
    settling = msgspec.structs.replace(session, phase=Phase.SETTLING, outcome=event)
    return (settling, _NOTHING) if session.holders else _publish(settling)


def _end(session: Session, _: object = None) -> tuple[Session, tuple[Effect, ...]]:
    """Ends the session without publication. The keys are free at once, the slots when nobody holds them."""
    keys = tuple(ReleaseKey(key) for key in session.keys)
    quarantined = msgspec.structs.replace(session, phase=Phase.QUARANTINED, outcome=None)
    if session.holders:
        return quarantined, keys
    freed, slots = _free(quarantined)
    return freed, keys + slots


def _end_when_due(session: Session, event: Tick) -> tuple[Session, tuple[Effect, ...]]:
    return _end(session) if event.now_s >= session.deadline_s else (session, _NOTHING)


def _promise(session: Session, event: ProcessReported) -> tuple[Session, tuple[Effect, ...]]:
    if event.process not in session.given:
        raise RemoteProtocolError(
            f"a report to session {session.name} is refused: its slots were never given to {event.process!r}",
            session=str(session.name),
            process=event.process,
        )
    if event.slab != session.slab:
        raise RemoteProtocolError(
            f"a report of {event.process!r} to session {session.name} is refused: it wrote to {event.slab}, and the "
            f"session's slots are in {session.slab}",
            session=str(session.name),
            process=event.process,
            hint="the node was restarted: attach again",
        )
    return _let_go(session, event.process)


def _gone(session: Session, event: ProcessGone) -> tuple[Session, tuple[Effect, ...]]:
    return _let_go(session, event.process)


def _let_go(session: Session, process: Process) -> tuple[Session, tuple[Effect, ...]]:
    if process not in session.holders:
        return session, _NOTHING
    holders = tuple(each for each in session.holders if each != process)
    left = msgspec.structs.replace(session, holders=holders)
    if holders or session.phase is Phase.WRITING:
        return left, _NOTHING
    return _publish(left) if session.phase is Phase.SETTLING else _free(left)


def _publish(session: Session) -> tuple[Session, tuple[Effect, ...]]:
    assert session.outcome is not None
    assert not session.holders
    effects: list[Effect] = []
    sums = session.outcome.checksums or (b"",) * len(session.keys)
    for key, slot, good, checksums in zip(
        session.keys, session.slots, session.outcome.good, sums, strict=True
    ):
        effects.append(Publish(key, slot, checksums) if good else FreeSlot(slot))
        effects.append(ReleaseKey(key))
    return msgspec.structs.replace(session, phase=Phase.PUBLISHED), tuple(effects)


def _free(session: Session) -> tuple[Session, tuple[Effect, ...]]:
    assert not session.holders
    return msgspec.structs.replace(session, phase=Phase.FREED), tuple(map(FreeSlot, session.slots))


def _nothing(session: Session, _: object) -> tuple[Session, tuple[Effect, ...]]:
    return session, _NOTHING


def _refuse(session: Session, event: Event, why: str = "") -> NoReturn:
    raise LocalProtocolError(
        f"session {session.name} is {session.phase} and {type(event).__name__} is not possible{why}",
        session=str(session.name),
        state=str(session.phase),
        event=type(event).__name__,
    )


class Move(msgspec.Struct, frozen=True):
    """A row's right-hand side: what is done, and the phases it may lead to."""

    does: Callable[[Session, Any], tuple[Session, tuple[Effect, ...]]]
    to: tuple[Phase, ...]


WRITING, SETTLING, QUARANTINED, PUBLISHED, FREED = Phase
# fmt: off
TABLE: dict[tuple[Phase, type], Move] = {
    (WRITING, JoinCompleted):       Move(_completed,    (SETTLING, PUBLISHED)),
    (WRITING, JoinFailed):          Move(_end,          (QUARANTINED, FREED)),
    (WRITING, ProcessReported):     Move(_promise,      (WRITING,)),
    (WRITING, ProcessGone):         Move(_gone,         (WRITING,)),
    (WRITING, WriterGone):          Move(_end,          (QUARANTINED, FREED)),
    (WRITING, Abort):               Move(_end,          (QUARANTINED, FREED)),
    (WRITING, Tick):                Move(_end_when_due, (WRITING, QUARANTINED, FREED)),
    (SETTLING, ProcessReported):    Move(_promise,      (SETTLING, PUBLISHED)),
    (SETTLING, ProcessGone):        Move(_gone,         (SETTLING, PUBLISHED)),
    (SETTLING, WriterGone):         Move(_end,          (QUARANTINED,)),
    (SETTLING, Abort):              Move(_end,          (QUARANTINED,)),
    (SETTLING, Tick):               Move(_end_when_due, (SETTLING, QUARANTINED)),
    (QUARANTINED, JoinCompleted):   Move(_nothing,      (QUARANTINED,)),
    (QUARANTINED, JoinFailed):      Move(_nothing,      (QUARANTINED,)),
    (QUARANTINED, ProcessReported): Move(_promise,      (QUARANTINED, FREED)),
    (QUARANTINED, ProcessGone):     Move(_gone,         (QUARANTINED, FREED)),
    (QUARANTINED, WriterGone):      Move(_nothing,      (QUARANTINED,)),
    (QUARANTINED, Abort):           Move(_nothing,      (QUARANTINED,)),
    (QUARANTINED, Tick):            Move(_nothing,      (QUARANTINED,)),
    (PUBLISHED, ProcessReported):   Move(_promise,      (PUBLISHED,)),
    (PUBLISHED, ProcessGone):       Move(_gone,         (PUBLISHED,)),
    (PUBLISHED, WriterGone):        Move(_nothing,      (PUBLISHED,)),
    (PUBLISHED, Abort):             Move(_nothing,      (PUBLISHED,)),
    (PUBLISHED, Tick):              Move(_nothing,      (PUBLISHED,)),
    (FREED, JoinCompleted):         Move(_nothing,      (FREED,)),
    (FREED, JoinFailed):            Move(_nothing,      (FREED,)),
    (FREED, ProcessReported):       Move(_promise,      (FREED,)),
    (FREED, ProcessGone):           Move(_gone,         (FREED,)),
    (FREED, WriterGone):            Move(_nothing,      (FREED,)),
    (FREED, Abort):                 Move(_nothing,      (FREED,)),
    (FREED, Tick):                  Move(_nothing,      (FREED,)),
}
# fmt: on


def transition(state: Session, event: Event) -> tuple[Session, tuple[Effect, ...]]:
    """The session after `event`, and what follows from it.

    Raises `LocalProtocolError` for what no table row allows, `RemoteProtocolError` for a report of a process that was
    given nothing here or that wrote to another slab; the state is unchanged then.
    """
    move = TABLE.get((state.phase, type(event)))
    if move is None:
        _refuse(state, event)
    return move.does(state, event)
