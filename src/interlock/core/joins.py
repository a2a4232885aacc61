"""Joins: many ranks write (or load) their shard of some blocks; one answer comes out, once, whatever order they speak in.

What can go wrong. In alibaba/tair-kvcache the scheduler said *start* on one socket and each rank *finished* on its own;
a *finished* that overtook its *start* met `assert save_id in running_save` and killed the thread that served every later
save and load (#208). The repair kept early reports, without a bound: a repeat that came after completion was kept as an
early report for ever. It joined by *counting* ranks, so rank 5 of 2 completed a join; a list of the wrong length killed
the thread; of several ranks that failed blocks of a load only the last to arrive was believed, so the engine decoded from
garbage; and a rank that died was waited for without end.

Why it cannot here.
* A join is named by (session, attempt), never by a block key: a report can only meet the join it was made for.
* A report before its `Open` makes the join EARLY and is merged when the `Open` comes. EARLY joins end by themselves
  (EARLY_REPORT_SECONDS_MAX), and core/join_book bounds their number.
* The join ends when the *shards* reported good tile each block exactly once, not when so many messages came. The shards
  tile by construction (`Open` is refused otherwise), so a block is good exactly if every rank that writes reported it
  good: AND. In a load every rank fills its own memory: a block failed if it failed on any rank, the union.
* The first report of a rank counts. A repeat changes nothing; one that differs is named (`Contradicted`), and changes
  nothing either.
* A rank outside the group and an outcome of the wrong length are refused naming both; the join goes on unharmed.
* It ends once: `Completed`, or `Failed` naming the ranks that are missing, by a lost rank, an abort or the deadline. What
  comes later meets a tombstone, which is forgotten in its turn (TOMBSTONE_SECONDS_MAX).

What a join does not say: that memory is free. A load's blocks may be touched until every rank reported, and a write's
slots until every process that got them promised (core/sessions).

Time enters as `Tick`: the first tick that an EARLY or finished join meets starts its clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import msgspec

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.join_state import (
    Abort,
    Checksums,
    Completed,
    Contradicted,
    Effect,
    Event,
    Failed,
    Forget,
    Join,
    JoinName,
    Kind,
    Open,
    Outcome,
    Phase,
    RankLost,
    Refused,
    Report,
    Tick,
)
from interlock.core.layouts import Shard, groups_within, tiles
from interlock.core.limits import (
    BLOCKS_PER_CALL_MAX,
    EARLY_REPORT_SECONDS_MAX,
    RANKS_MAX,
    TOMBSTONE_SECONDS_MAX,
)
from interlock.core.packed_sums import SUM_BYTES

__all__ = [
    "TABLE",
    "Abort",
    "Checksums",
    "Completed",
    "Contradicted",
    "Effect",
    "Event",
    "Failed",
    "Forget",
    "Join",
    "JoinName",
    "Kind",
    "Open",
    "Outcome",
    "Phase",
    "RankLost",
    "Refused",
    "Report",
    "State",
    "Tick",
    "transition",
]

State = Join
_NOTHING: tuple[Effect, ...] = ()


def _needed(opened: Open) -> list[int]:
    """The ranks without whose report nothing is known: the writers of a save, all ranks of a load."""
    return [rank for rank, shard in enumerate(opened.shards) if opened.kind is Kind.LOAD or shard.area > 0]


def _missing(join: Join, opened: Open) -> tuple[int, ...]:
    reported = {report.rank for report in join.reports}
    return tuple(rank for rank in _needed(opened) if rank not in reported)


@lru_cache(maxsize=64)
def _tile(shards: tuple[Shard, ...], layers: int, heads: int) -> bool:
    """`tiles`, remembered: every join of an engine has the same shards."""
    return tiles(shards, layers=layers, heads=heads)


@lru_cache(maxsize=64)
def _cuts(shards: tuple[Shard, ...], cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Where layer groups begin: where the opener says, and where a writer's layers do, which sums up no others."""
    return tuple(sorted({*cuts, *(shard.layer_start for shard in shards if shard.area)} - {0}))


def _groups_of(shard: Shard, cuts: tuple[int, ...], layers: int) -> range:
    return groups_within(layers, cuts, shard.layer_start, shard.layer_stop) if shard.area else range(0)


@lru_cache(maxsize=64)
def _places(shards: tuple[Shard, ...], cuts: tuple[int, ...], layers: int, heads: int) -> tuple[int, ...]:
    """Where, among all ranks' checksums one after another, that of each (layer group, head) stands."""
    where = {}
    at = 0
    for shard in shards:
        for group in _groups_of(shard, cuts, layers):
            for head in range(shard.head_start, shard.head_stop):
                where[group, head] = at
                at += 1
    return tuple(where[group, head] for group in range(len(cuts) + 1) for head in range(heads))


def _fault_in_open(event: Open) -> str | None:
    if not 0 < event.blocks <= BLOCKS_PER_CALL_MAX:
        return f"it names {event.blocks} blocks, where 1 to {BLOCKS_PER_CALL_MAX} are possible"
    if not 0 < len(event.shards) <= RANKS_MAX:
        return f"it names {len(event.shards)} ranks, where 1 to {RANKS_MAX} are possible"
    if event.kind is Kind.SAVE and not _tile(event.shards, event.layers, event.heads):
        return (
            f"the ranks' shards {[tuple(msgspec.structs.astuple(s)) for s in event.shards]} do not cover "
            f"{event.layers} layers × {event.heads} heads exactly once"
        )
    if any(not 0 < cut < event.layers for cut in event.cuts):
        return f"its layer groups begin at {event.cuts}, and it has {event.layers} layers"
    return None


def _fault_in_report(opened: Open, event: Report) -> str | None:
    """Why this report cannot belong to this join; None when it can."""
    if not 0 <= event.rank < len(opened.shards):
        return f"it speaks for rank {event.rank}, and the group has ranks 0 to {len(opened.shards) - 1}"
    shard = opened.shards[event.rank]
    expected = opened.blocks if opened.kind is Kind.LOAD or shard.area > 0 else 0
    if len(event.good) != expected:
        return (
            f"rank {event.rank} tells the outcome of {len(event.good)} blocks, and it has {expected} of them"
        )
    if event.checksums and len(event.checksums) != expected:
        return f"rank {event.rank} sends checksums of {len(event.checksums)} blocks, and it has {expected} of them"
    if not event.checksums:
        return None
    cuts = _cuts(opened.shards, opened.cuts)
    groups = len(_groups_of(shard, cuts, opened.layers)) if opened.kind is Kind.SAVE else 1
    size = SUM_BYTES * groups * (shard.head_stop - shard.head_start)
    for block, checksums in enumerate(event.checksums):
        if event.good[block] and len(checksums) != size:
            return (
                f"rank {event.rank} sends {len(checksums) / SUM_BYTES:g} checksums for block {block}, and it has "
                f"{shard.head_stop - shard.head_start} heads of it"
                + (f" in {groups} layer groups" if groups > 1 else "")
            )
    return None


# --- transitions -------------------------------------------------------------------------------------------------


def _open(join: Join, event: Open) -> tuple[Join, tuple[Effect, ...]]:
    fault = _fault_in_open(event)
    if fault is not None:
        _refuse(join, event, f": {fault}")
    refused = tuple(
        Refused(join.name, report.rank, reason)
        for report in join.reports
        if (reason := _fault_in_report(event, report)) is not None
    )
    faulty = {effect.rank for effect in refused}
    reports = tuple(report for report in join.reports if report.rank not in faulty)
    opened = Join(join.name, Phase.OPEN, event, reports)
    missing = _missing(opened, event)
    opened = Join(join.name, Phase.OPEN, event, reports, (), len(missing))
    if not missing:
        state, effects = _complete(opened, event)
        return state, refused + effects
    lost = [rank for rank in join.lost if rank in missing]
    if lost:
        state, effects = _fail(opened, f"rank {lost[0]} was lost before it reported", missing)
        return state, refused + effects
    return opened, refused


def _open_again(join: Join, event: Open) -> tuple[Join, tuple[Effect, ...]]:
    """Repeated word for word it changes nothing, also after the end. An abort may overtake its open: the opener is told."""
    if join.opened is None:
        fault = _fault_in_open(event)
        if fault is not None:
            _refuse(join, event, f": {fault}")
        told = Failed(join.name, "it was aborted before it was opened", _missing(join, event))
        return msgspec.structs.replace(join, opened=event), (told,)
    if event != join.opened:
        _refuse(
            join, event, " with other blocks, shards or deadline than before; a new try takes a new attempt"
        )
    return join, _NOTHING


def _keep(join: Join, event: Report) -> tuple[Join, tuple[Effect, ...]]:
    """A report before its open."""
    if not 0 <= event.rank < RANKS_MAX or len(event.good) > BLOCKS_PER_CALL_MAX:
        raise RemoteProtocolError(
            f"an early report to join {join.name} is refused: rank {event.rank} with {len(event.good)} blocks "
            f"lies outside the limits of {RANKS_MAX} ranks and {BLOCKS_PER_CALL_MAX} blocks",
            join=str(join.name),
            rank=event.rank,
        )
    known = join.report_of(event.rank)
    if known is not None:
        return join, _NOTHING if known == event else (Contradicted(join.name, event.rank),)
    return msgspec.structs.replace(join, reports=_merged(join.reports, event)), _NOTHING


def _report(join: Join, event: Report) -> tuple[Join, tuple[Effect, ...]]:
    opened = join.opened
    assert opened is not None
    reason = _fault_in_report(opened, event)
    if reason is not None:
        raise RemoteProtocolError(
            f"a report to join {join.name} is refused: {reason}", join=str(join.name), rank=event.rank
        )
    known = join.report_of(event.rank)
    if known is not None:
        return join, _NOTHING if known == event else (Contradicted(join.name, event.rank),)
    counts = opened.kind is Kind.LOAD or opened.shards[event.rank].area > 0
    missing = join.missing - counts
    joined = Join(join.name, Phase.OPEN, opened, _merged(join.reports, event), (), missing)
    return _complete(joined, opened) if missing == 0 else (joined, _NOTHING)


def _report_late(join: Join, event: Report) -> tuple[Join, tuple[Effect, ...]]:
    """Late reports are ordinary. One that contradicts what its rank said in time is worth a word."""
    known = join.report_of(event.rank)
    if known is None or known == event:
        return join, _NOTHING
    return join, (Contradicted(join.name, event.rank),)


def _lose_early(join: Join, event: RankLost) -> tuple[Join, tuple[Effect, ...]]:
    if event.rank in join.lost:
        return join, _NOTHING
    return msgspec.structs.replace(join, lost=tuple(sorted((*join.lost, event.rank)))), _NOTHING


def _lose(join: Join, event: RankLost) -> tuple[Join, tuple[Effect, ...]]:
    opened = join.opened
    assert opened is not None
    if not 0 <= event.rank < len(opened.shards):
        _refuse(join, event, f": the group has ranks 0 to {len(opened.shards) - 1}")
    missing = _missing(join, opened)
    if event.rank not in missing:
        return join, _NOTHING
    return _fail(join, f"rank {event.rank} was lost before it reported", missing)


def _abort_early(join: Join, _: Abort) -> tuple[Join, tuple[Effect, ...]]:
    return msgspec.structs.replace(join, phase=Phase.FAILED, lost=(), expires_s=None), _NOTHING


def _abort(join: Join, _: Abort) -> tuple[Join, tuple[Effect, ...]]:
    assert join.opened is not None
    return _fail(join, "it was aborted", _missing(join, join.opened))


def _nothing(join: Join, _: object) -> tuple[Join, tuple[Effect, ...]]:
    return join, _NOTHING


def _tick_open(join: Join, event: Tick) -> tuple[Join, tuple[Effect, ...]]:
    assert join.opened is not None
    if event.now_s < join.opened.deadline_s:
        return join, _NOTHING
    return _fail(join, "its deadline passed", _missing(join, join.opened))


def _tick_early(join: Join, event: Tick) -> tuple[Join, tuple[Effect, ...]]:
    return _age(join, event, EARLY_REPORT_SECONDS_MAX)


def _tick_finished(join: Join, event: Tick) -> tuple[Join, tuple[Effect, ...]]:
    return _age(join, event, TOMBSTONE_SECONDS_MAX)


def _age(join: Join, event: Tick, seconds: float) -> tuple[Join, tuple[Effect, ...]]:
    if join.expires_s is None:
        return msgspec.structs.replace(join, expires_s=event.now_s + seconds), _NOTHING
    return join, (Forget(join.name),) if event.now_s >= join.expires_s else _NOTHING


def _merged(reports: tuple[Report, ...], report: Report) -> tuple[Report, ...]:
    return tuple(sorted((*reports, report), key=lambda each: each.rank))


def _complete(join: Join, opened: Open) -> tuple[Join, tuple[Effect, ...]]:
    telling = [report for report in join.reports if report.good]
    good = tuple(map(all, zip(*(report.good for report in telling), strict=True)))
    checksums: Checksums = ()
    if opened.kind is Kind.SAVE and all(report.checksums for report in telling):
        cuts = _cuts(opened.shards, opened.cuts)
        places = _places(opened.shards, cuts, opened.layers, opened.heads)
        rows = zip(*(report.checksums for report in telling), strict=True)
        if places == tuple(range(len(places))):  # one rank, or ranks that hold one part after the other
            checksums = tuple(b"".join(row) if well else b"" for well, row in zip(good, rows, strict=True))
        else:
            checksums = tuple(
                _in_order(b"".join(row), places) if well else b""
                for well, row in zip(good, rows, strict=True)
            )
    finished = Join(join.name, Phase.COMPLETED, opened, join.reports)
    return finished, (Completed(join.name, good, checksums),)


def _in_order(sums: bytes, places: tuple[int, ...]) -> bytes:
    return b"".join(sums[SUM_BYTES * place : SUM_BYTES * (place + 1)] for place in places)


def _fail(join: Join, reason: str, missing: tuple[int, ...]) -> tuple[Join, tuple[Effect, ...]]:
    finished = Join(join.name, Phase.FAILED, join.opened, join.reports)
    return finished, (Failed(join.name, reason, missing),)


def _refuse(join: Join, event: Event, why: str = "") -> NoReturn:
    raise LocalProtocolError(
        f"join {join.name} is {join.phase} and {type(event).__name__} is not possible{why}",
        join=str(join.name),
        state=str(join.phase),
        event=type(event).__name__,
    )


class Move(msgspec.Struct, frozen=True):
    """A row's right-hand side: what is done, and the phases it may lead to."""

    does: Callable[[Join, Any], tuple[Join, tuple[Effect, ...]]]
    to: tuple[Phase, ...]


EARLY, OPEN, COMPLETED, FAILED = Phase
# fmt: off
TABLE: dict[tuple[Phase, type], Move] = {
    (EARLY, Open):         Move(_open,          (OPEN, COMPLETED, FAILED)),
    (EARLY, Report):       Move(_keep,          (EARLY,)),
    (EARLY, RankLost):     Move(_lose_early,    (EARLY,)),
    (EARLY, Abort):        Move(_abort_early,   (FAILED,)),
    (EARLY, Tick):         Move(_tick_early,    (EARLY,)),
    (OPEN, Open):          Move(_open_again,    (OPEN,)),
    (OPEN, Report):        Move(_report,        (OPEN, COMPLETED)),
    (OPEN, RankLost):      Move(_lose,          (OPEN, FAILED)),
    (OPEN, Abort):         Move(_abort,         (FAILED,)),
    (OPEN, Tick):          Move(_tick_open,     (OPEN, FAILED)),
    (COMPLETED, Open):     Move(_open_again,    (COMPLETED,)),
    (COMPLETED, Report):   Move(_report_late,   (COMPLETED,)),
    (COMPLETED, RankLost): Move(_nothing,       (COMPLETED,)),
    (COMPLETED, Abort):    Move(_nothing,       (COMPLETED,)),
    (COMPLETED, Tick):     Move(_tick_finished, (COMPLETED,)),
    (FAILED, Open):        Move(_open_again,    (FAILED,)),
    (FAILED, Report):      Move(_report_late,   (FAILED,)),
    (FAILED, RankLost):    Move(_nothing,       (FAILED,)),
    (FAILED, Abort):       Move(_nothing,       (FAILED,)),
    (FAILED, Tick):        Move(_tick_finished, (FAILED,)),
}
# fmt: on


def transition(state: Join, event: Event) -> tuple[Join, tuple[Effect, ...]]:
    """The join after `event`, and what follows from it.

    Raises `LocalProtocolError` for what no table row allows or an `Open` that cannot be met, `RemoteProtocolError` for a
    report that cannot belong to this join; the state is unchanged then.
    """
    move = TABLE.get((state.phase, type(event)))
    if move is None:
        _refuse(state, event)
    if type(event) is not Tick and event.join != state.name:  # type: ignore[union-attr]
        _refuse(state, event, f": it is meant for join {event.join}")  # type: ignore[union-attr]
    return move.does(state, event)
