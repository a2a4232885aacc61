"""Who is attached to the node: engines in their lives, their ranks and schedulers, and the processes behind them.

What can go wrong. A connection ends and its process lives on with the slab mapped; a process ends and its name comes back
in a new life; two processes claim one rank. So everything here hangs on *processes*, never on connections: a member is
forgotten when the exit of its process is proven, not when its connection ends, and a rank belongs to the process that
attached as it until then. A newer life of an engine ends the older one for writing (evidence, DESIGN §4.2), but the older
one's processes stay known until they are gone, for they may still hold slots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from interlock.core.layouts import KVLayout, Shard, shard_of_rank, tiles
from interlock.core.limits import NAME_CHARS_MAX, PEERS_KNOWN_MAX, RANKS_MAX
from interlock.store.refusal import Refusal
from interlock.wire.store_messages import Attach


class LifeName(msgspec.Struct, frozen=True, array_like=True):
    """One life of one engine."""

    engine: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.engine}@{self.incarnation}"


class Member(msgspec.Struct, eq=False):
    """A rank (or, with `rank` None, the scheduler) of one life of an engine, in one process."""

    life: LifeName
    rank: int | None
    pid: int
    process: str
    """A name that no other member ever has: what core/sessions knows a holder by."""
    shard: Shard
    writes: bool
    leads: bool = False
    """This one rank is its engine's scheduler, too."""
    connections: int = 0

    @property
    def schedules(self) -> bool:
        """Whether it begins and ends its engine's write sessions."""
        return self.rank is None or self.leads


class EngineLife(msgspec.Struct, eq=False):
    """One life of an engine: its ranks, and whether it is over."""

    name: LifeName
    ranks: int
    layout: KVLayout
    layout_number: int
    members: dict[int | None, Member]
    ended: bool = False
    """A newer life was seen or its scheduler is gone: it starts no more writes."""

    def writers(self) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
        """Shards and processes by rank. Raises `Refusal` while the group is not complete."""
        members = [self.members.get(rank) for rank in range(self.ranks)]
        missing = [
            str(rank) for rank, member in enumerate(members) if member is None or not member.connections
        ]
        if missing:
            raise Refusal(
                "ranks_missing",
                f"engine {self.name} has {self.ranks} ranks, and not attached here are: {', '.join(missing)}",
                retryable=True,
            )
        present = [member for member in members if member is not None]
        if not all(member.writes for member in present):
            raise Refusal(
                "read_only", f"engine {self.name} attached a rank as reader only, so it saves nothing"
            )
        return tuple(m.shard for m in present), tuple(m.process for m in present)


class Roster:
    """All engine lives that have a process here."""

    def __init__(self) -> None:
        self._lives: dict[LifeName, EngineLife] = {}
        self._newest: OrderedDict[str, int] = OrderedDict()
        self._members: dict[int, list[Member]] = {}
        self._serial = 0

    def __iter__(self) -> Iterator[EngineLife]:
        return iter(self._lives.values())

    def get(self, name: LifeName) -> EngineLife | None:
        return self._lives.get(name)

    def members_of(self, pid: int) -> list[Member]:
        return list(self._members.get(pid, ()))

    def pid_of(self, process: str) -> int | None:
        """The pid behind a member's `process` name, while it is not proven gone."""
        return next(
            (m.pid for members in self._members.values() for m in members if m.process == process), None
        )

    def older_lives(self, name: LifeName) -> list[EngineLife]:
        """Lives of that engine before this one, not ended yet."""
        return [
            life
            for life in self._lives.values()
            if life.name.engine == name.engine and life.name.incarnation < name.incarnation and not life.ended
        ]

    def attach(self, message: Attach, pid: int, layout_number: int) -> Member:
        """The member that process `pid` now is. Repeating it after a lost connection gives the same one.

        Raises `Refusal` for a stale life, another layout, an impossible shard or a rank that another process has.
        """
        shard = self._shard(message)
        name = LifeName(message.engine, message.engine_incarnation)
        newest = self._newest.get(message.engine, 0)
        if name.incarnation < newest:
            raise Refusal(
                "stale_incarnation",
                f"engine {name} is refused: a newer life of it, {newest}, is known here",
                hint="this process belongs to a life that is over and should stop",
            )
        life = self._lives.get(name)
        if life is not None:
            self._check_same(life, message)
            known = life.members.get(message.rank)
            if known is not None and known.pid != pid:
                raise Refusal(
                    "rank_taken",
                    f"{self._who(message)} is process {known.pid} already, and that one is not proven gone",
                    retryable=True,
                )
            if known is not None:
                if (known.shard, known.writes, known.leads) != (shard, message.writes, message.leads):
                    raise Refusal("shard_changed", f"{self._who(message)} attached before with another shard")
                return known
        else:
            life = EngineLife(name, message.ranks, message.layout, layout_number, {})
        self._check_tiling(life, message, shard)
        self._serial += 1
        process = f"{self._who(message)} (process {pid}, #{self._serial})"
        member = Member(name, message.rank, pid, process, shard, message.writes, message.leads)
        self._lives[name] = life
        self._newest[message.engine] = name.incarnation
        self._newest.move_to_end(message.engine)
        if len(self._newest) > PEERS_KNOWN_MAX:
            self._newest.popitem(last=False)
        life.members[message.rank] = member
        self._members.setdefault(pid, []).append(member)
        return member

    def exited(self, pid: int) -> list[Member]:
        """The members whose process is proven gone; they are forgotten here."""
        members = self._members.pop(pid, [])
        for member in members:
            life = self._lives[member.life]
            del life.members[member.rank]
            if member.schedules:
                life.ended = True
            if not life.members:
                del self._lives[member.life]
        return members

    def _shard(self, message: Attach) -> Shard:
        if not message.engine or len(message.engine) > NAME_CHARS_MAX or message.engine_incarnation <= 0:
            raise Refusal(
                "bad_attach", f"an engine has a name of 1 to {NAME_CHARS_MAX} characters and an incarnation"
            )
        if not 0 < message.ranks <= RANKS_MAX or not 0 <= (message.rank or 0) < message.ranks:
            raise Refusal("bad_attach", f"rank {message.rank} of {message.ranks} is impossible")
        if message.leads and (message.rank, message.ranks) != (0, 1):
            raise Refusal("bad_attach", "only the one rank of an engine of one can be its scheduler, too")
        layout = message.layout
        if message.rank is None:
            return Shard(0, 0, 0, 0)
        try:
            shard = message.shard or shard_of_rank(
                message.rank, message.ranks, layers=layout.layers, heads=layout.heads
            )
        except ValueError as error:
            raise Refusal("bad_attach", str(error)) from error
        edges = (0, *layout.cuts, layout.layers)
        if shard.area and not (shard.layer_start in edges and shard.layer_stop in edges):
            raise Refusal(
                "bad_attach",
                f"{self._who(message)} holds layers {shard.layer_start} to {shard.layer_stop} of {layout.layers}, and its "
                f"layout's layer groups begin at {edges[:-1]}: it can sum up no part of a group",
                hint="every rank of an engine attaches with the pipeline's stages as the layout's cuts",
            )
        if shard.area and not 0 <= shard.head_start < shard.head_stop <= layout.heads:
            raise Refusal(
                "bad_attach", f"{self._who(message)} names heads beyond the {layout.heads} of its layout"
            )
        return shard

    def _check_same(self, life: EngineLife, message: Attach) -> None:
        if (life.ranks, life.layout) != (message.ranks, message.layout):
            raise Refusal(
                "layout_mismatch",
                f"{self._who(message)} says {message.ranks} ranks and {message.layout}, where others of that life "
                f"said {life.ranks} ranks and {life.layout}",
            )

    def _check_tiling(self, life: EngineLife, message: Attach, shard: Shard) -> None:
        """Shards that can never tile are refused when the last rank comes, not at every write."""
        shards = [m.shard for rank, m in life.members.items() if rank is not None and m.writes]
        if message.rank is None or not message.writes or len(shards) + 1 < life.ranks:
            return
        layout = life.layout
        if not tiles([*shards, shard], layers=layout.layers, heads=layout.heads):
            raise Refusal(
                "bad_attach",
                f"the shards of engine {life.name} do not cover each of {layout.heads} heads exactly once",
                hint="replicated heads are written by the lowest rank that holds them; others attach an empty shard",
            )

    def _who(self, message: Attach) -> str:
        what = "scheduler" if message.rank is None else f"rank {message.rank}"
        return f"{what} of {message.engine}@{message.engine_incarnation}"
