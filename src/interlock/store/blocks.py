"""What a node decides about blocks: the shelf, joins and write sessions put together. No I/O, no clock of its own.

The rules stand in core: one join (core/joins), one session (core/sessions); where blocks stand in store/shelf. Here each event goes to those it concerns, in this order: the
session hears a promise before the join judges its contents, for a rank that reports nonsense has still promised. Effects
become changes of the tables at once, so that after each call the books balance (`check_integrity`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from interlock.core import joins, sessions
from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.join_book import JoinBook
from interlock.core.joins import JoinName
from interlock.core.layouts import KVLayout
from interlock.core.limits import (
    BLOCKS_LISTED_MAX,
    FROZEN_WRITER_SECONDS,
    JOIN_SECONDS_MAX,
    NAME_CHARS_MAX,
    QUARANTINE_SHARE_MAX,
    TENANT_CHARS_MAX,
    TENANTS_WITH_QUOTA_MAX,
    WRITE_SESSIONS_PER_ENGINE_MAX,
)
from interlock.core.packed_sums import pack_sums
from interlock.core.prefixes import KEY_BYTES, Block
from interlock.core.session_book import SessionBook
from interlock.core.sessions import SlabName
from interlock.store.refusal import Refusal
from interlock.store.roster import EngineLife, LifeName, Member
from interlock.store.shelf import Shelf
from interlock.store.slots import FREE, QUARANTINED, WRITING, SlotTable
from interlock.wire.store_messages import Grant, Report, StartWrite

SESSION_CHARS_MAX = 2 * NAME_CHARS_MAX


class BlockStore:
    """The blocks of one slab in one life of a node."""

    def __init__(
        self,
        slab: SlabName,
        slab_bytes: int,
        *,
        join_s: float = JOIN_SECONDS_MAX,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        """`quotas`: bytes by tenant, "*" for every other that has a name. Raises `ValueError` for impossible ones."""
        self.slab = slab
        self.slab_bytes = slab_bytes
        self.counters: Counter[str] = Counter()
        self.shelf = Shelf(slab_bytes, self.counters, quotas=quotas)
        self.on_keys_settled: Callable[[], None] = lambda: None
        """Called, at once and briefly, after keys ceased to be under way."""
        self._join_s = join_s
        self._joins = JoinBook()
        self._sessions = SessionBook()
        self._by_life: dict[LifeName, set[JoinName]] = {}
        self._lives: dict[JoinName, LifeName] = {}
        self._writing: dict[bytes, tuple[bytes, int, str]] = {}
        """Parent, layout and tenant of each key under way."""
        self._quarantined_since_s: dict[JoinName, float] = {}
        self._promoting: dict[bytes, tuple[bytes, int, int, str]] = {}
        """Parent, layout, slot and tenant of each key that is being brought from a lower tier."""
        self.on_publish: Callable[[Block], None] = _ignore
        """Told of each block that a write session published."""

    @property
    def slots(self) -> SlotTable:
        return self.shelf.slots

    def __len__(self) -> int:
        return len(self.shelf)

    def layout(self, layout: KVLayout) -> int:
        """The number of that layout here. Raises `Refusal` when the slab cannot hold its blocks."""
        return self.shelf.layout(layout)

    # --- readers -------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> list[Block]:
        """The published blocks of the first keys; they are used now."""
        found = self.shelf.match(keys)
        self.counters["hits"] += len(found)
        self.counters["misses"] += len(keys) - len(found)
        return found

    def withdraw(self, keys: Sequence[bytes], slots: Sequence[int]) -> int:
        """Forgets those of `keys` that still stand at their slot; how many. Raises `Refusal` for lists of unequal length."""
        if len(keys) != len(slots):
            raise Refusal("bad_withdraw", f"{len(keys)} keys and {len(slots)} slots do not go together")
        gone = sum(map(self.shelf.withdraw, keys, slots))
        self.counters["withdrawn"] += gone
        return gone

    def sweep(self, cursor: int, wanted: Callable[[Block], bool]) -> tuple[int, int | None]:
        """Forgets published blocks that are `wanted`, in one slice of the slab from `cursor` on: (how many, where to go on).

        A sweep from 0 to None forgets every such block that was published before it began.
        """
        blocks, following = self.shelf.page(cursor, BLOCKS_LISTED_MAX)
        gone = [block for block in blocks if wanted(block)]
        for block in gone:
            self.shelf.withdraw(block.key, block.slot)
        self.counters["swept"] += len(gone)
        return len(gone), following

    def end_writes_of(self, tenant: str) -> None:
        """Nothing that is under way for that tenant is published any more: he is being deleted."""
        names = {
            session.name
            for session in self._sessions
            if any(key in self._writing and self._writing[key][2] == tenant for key in session.keys)
        }
        for name in sorted(names, key=str):
            self._obey_join(name, self._joins.handle(joins.Abort(name)))
            self._tell(name, sessions.Abort())

    # --- pins ----------------------------------------------------------------------------------------------------

    def pin(self, owner: Member, name: str, keys: Sequence[bytes], now_s: float, seconds: float) -> int:
        """Keeps the longest prefix of `keys` that is here from being evicted; how many blocks. Raises `Refusal`."""
        if not 0 < len(name) <= NAME_CHARS_MAX:
            raise Refusal("bad_pin", f"a pin's name has 1 to {NAME_CHARS_MAX} characters")
        found = self.shelf.match(keys)
        self.shelf.pins.add(owner.process, name, found, now_s, seconds)
        return len(found)

    def unpin(self, owner: Member, name: str) -> int:
        """Takes a pin back; how many blocks it held."""
        return self.shelf.pins.remove(owner.process, name)

    # --- writers -------------------------------------------------------------------------------------------------

    def start_write(self, life: EngineLife, message: StartWrite, now_s: float) -> list[Grant]:
        """Slots for the keys that are missing, in the order asked, as many as there is room for. Raises `Refusal`."""
        name = self._name(life.name, message.session, message.attempt)
        known = self._sessions.get(name)
        if known is not None and known.phase is sessions.Phase.WRITING:
            return self._granted(known, message)
        join = self._joins.get(name)
        if known is not None or (join is not None and join.phase is not joins.Phase.EARLY):
            raise Refusal("session_ended", f"session {name} is over; a new try takes a new attempt")
        self._check_start(life, message)
        shards, processes = life.writers()
        wanted = self._sessions.missing(message.keys, self._is_here)
        if not wanted:
            return []
        self._check_tenant(message.tenant)
        grants = self._take_slots(life.layout_number, message, wanted)
        granted = tuple(message.keys[grant.index] for grant in grants)
        deadline_s = now_s + self._join_s
        self._sessions.add(
            sessions.start(
                name,
                slab=self.slab,
                keys=granted,
                slots=tuple(grant.slot for grant in grants),
                given=processes,
                deadline_s=deadline_s,
            )
        )
        self._by_life.setdefault(life.name, set()).add(name)
        self._lives[name] = life.name
        opened = joins.Open(
            name,
            len(grants),
            shards,
            life.layout.layers,
            life.layout.heads,
            deadline_s=deadline_s,
            cuts=life.layout.cuts,
        )
        early = join.reports if join is not None else ()
        self._obey_join(name, self._joins.handle(opened))
        for report in early:  # a report that overtook this start is a promise, too
            if report.rank < len(processes):
                self._tell(name, sessions.ProcessReported(processes[report.rank], self.slab))
        self.counters["granted"] += len(grants)
        return grants

    def report(self, member: Member, message: Report) -> None:
        """What a rank says became of its part. Raises `Refusal` when it cannot be meant for this slab and session."""
        if message.rank != member.rank:
            raise Refusal("wrong_rank", f"{member.process} reports as rank {message.rank}")
        slab = SlabName(message.node_incarnation, message.slab)
        if slab != self.slab:
            self.counters["refused_stale_slab"] += 1
            raise Refusal(
                "stale_slab", f"a report for {slab} is refused: this is {self.slab}", hint="attach again"
            )
        name = self._name(member.life, message.session, message.attempt)
        join = self._joins.get(name)
        if join is not None and join.report_of(message.rank) is not None:
            self.counters["joins_duplicate_reports"] += 1
        if join is not None and join.phase in (joins.Phase.COMPLETED, joins.Phase.FAILED):
            self.counters["joins_late_reports"] += 1
        try:
            if self._sessions.get(name) is not None:
                self._tell(name, sessions.ProcessReported(member.process, slab))
            self._obey_join(name, self._joins.handle(self._as_join_report(name, message)))
        except RemoteProtocolError as error:
            self.counters["refused_reports"] += 1
            raise Refusal("bad_report", str(error), retryable=error.retryable) from error

    def abort(self, life: EngineLife, session: str, attempt: int, *, never_given: bool) -> None:
        """Ends a session, also one whose start is still on its way: a tombstone meets it."""
        name = self._name(life.name, session, attempt)
        known = self._sessions.get(name)
        self._obey_join(name, self._joins.handle(joins.Abort(name)))
        if known is None:
            return
        self._tell(name, sessions.Abort())
        if never_given:
            # Nobody but the scheduler could have told the ranks of these slots, and it promises that it did not.
            for process in known.given:
                self._tell(name, sessions.ProcessReported(process, self.slab))

    def writer_gone(self, life: LifeName) -> None:
        """The scheduler of that life is proven gone, or the life is over: nothing it began is published any more."""
        for name in sorted(self._by_life.get(life, ()), key=str):
            self._tell(name, sessions.WriterGone())
            self._obey_join(name, self._joins.handle(joins.Abort(name)))

    def process_gone(self, member: Member) -> None:
        """The exit of a rank's process is proven: it touches no slot any more, and what it did not report failed."""
        self.shelf.pins.owner_gone(member.process)
        for name in sorted(self._by_life.get(member.life, ()), key=str):
            self._tell(name, sessions.ProcessGone(member.process))
            if member.rank is not None:
                self._obey_join(name, self._joins.handle(joins.RankLost(name, member.rank)))

    def tick(self, now_s: float) -> None:
        """Deadlines of joins and sessions; the memory of finished ones fades."""
        effects = self._joins.tick(now_s)
        for effect in effects:
            if isinstance(effect, joins.Failed):
                self.counters["joins_timed_out"] += 1
                self._obey_join(effect.join, (effect,))
        for session in self._sessions:
            self._tell(session.name, sessions.Tick(now_s))
        self.shelf.pins.tick(now_s)
        since = self._quarantined_since_s
        self._quarantined_since_s = {
            session.name: since.get(session.name, now_s)
            for session in self._sessions
            if session.phase is sessions.Phase.QUARANTINED
        }

    def count_under_way(self, keys: Sequence[bytes]) -> int:
        """How many of `keys` another is writing just now."""
        return sum(map(self.under_way, keys))

    @property
    def quarantine_over_share(self) -> bool:
        """Whether so much memory waits for silent processes that nothing is granted any more."""
        return self.slots.bytes[QUARANTINED] > QUARANTINE_SHARE_MAX * self.slab_bytes

    def frozen_writers(self, now_s: float) -> dict[str, int]:
        """Processes to be ended, and how many slots each keeps: empty while the quarantine is below its share.

        A process is frozen when a session that gave it slots ended `FROZEN_WRITER_SECONDS` ago and it has neither
        reported nor exited since. Ending it is the only way to its slots: nobody else can promise in its place.
        """
        if not self.quarantine_over_share:
            return {}
        frozen: Counter[str] = Counter()
        for session in self._sessions:
            since_s = self._quarantined_since_s.get(session.name)
            if since_s is not None and now_s - since_s >= FROZEN_WRITER_SECONDS:
                frozen.update(dict.fromkeys(session.holders, len(session.slots)))
        return dict(frozen)

    # --- promotions: the node itself as a writer -----------------------------------------------------------------

    def begin_promotion(
        self, layout: int, keys: Sequence[bytes], parents: Sequence[bytes], tenant: str = ""
    ) -> list[int]:
        """A slot for each of the first keys, as far as there is room, written by nobody but the caller.

        They count for `tenant`, who stored them; none when a write of his would be refused. Every slot is given back by
        `end_promotion`. Keys that are here or under way are the caller's defect.
        """
        assert not any(self.under_way(key) or key in self.shelf for key in keys)
        try:
            self._check_tenant(tenant)
        except Refusal:
            return []
        slots = self.shelf.take_slots(layout, parents, tenant)
        for key, parent, slot in zip(keys, parents, slots, strict=False):
            self._promoting[key] = (parent, layout, slot, tenant)
        return slots

    def end_promotion(self, key: bytes, checksums: Sequence[int] | None) -> None:
        """The block stands in its slot, verified; None: it does not, the slot is free again."""
        parent, layout, slot, tenant = self._promoting.pop(key)
        if checksums is None:
            self.shelf.free(slot)
            self.shelf.release(layout, parent, tenant)
        else:
            self.shelf.publish([Block(key, parent, layout, slot, pack_sums(checksums), tenant)])
            self.counters["promoted"] += 1

    def under_way(self, key: bytes) -> bool:
        """Whether somebody is writing that block."""
        return key in self._writing or key in self._promoting

    # --- inside --------------------------------------------------------------------------------------------------

    def _is_here(self, key: bytes) -> bool:
        return key in self.shelf or key in self._promoting

    def _name(self, life: LifeName, session: str, attempt: int) -> JoinName:
        if not session or len(session) > SESSION_CHARS_MAX:
            raise Refusal("bad_session", f"a session's name has 1 to {SESSION_CHARS_MAX} characters")
        return JoinName(f"{life}/{session}", attempt)

    def _check_start(self, life: EngineLife, message: StartWrite) -> None:
        if len(message.parents) != len(message.keys):
            raise Refusal(
                "bad_start", f"{len(message.keys)} keys and {len(message.parents)} parents do not match"
            )
        if any(parent and len(parent) != KEY_BYTES for parent in message.parents):
            raise Refusal("bad_start", f"a parent is a key of {KEY_BYTES} bytes, or empty")
        if life.ended:
            raise Refusal(
                "life_ended", f"engine {life.name} is over: its scheduler is gone or a newer life is known"
            )
        if len(self._by_life.get(life.name, ())) >= WRITE_SESSIONS_PER_ENGINE_MAX:
            raise Refusal(
                "too_many_sessions",
                f"engine {life.name} has {WRITE_SESSIONS_PER_ENGINE_MAX} write sessions that are not over",
                retryable=True,
            )
        if self.quarantine_over_share:
            holders = ", ".join(sorted(self._sessions.quarantine_holders()))
            raise Refusal(
                "quarantine_full",
                f"{self.slots.bytes[QUARANTINED]} of {self.slab_bytes} bytes wait for processes that were given them and neither "
                f"reported nor ended: {holders}",
                retryable=True,
                hint="end those processes",
            )

    def _check_tenant(self, tenant: str) -> None:
        if len(tenant) > TENANT_CHARS_MAX:
            raise Refusal("bad_start", f"a tenant's name has at most {TENANT_CHARS_MAX} characters")
        if self.shelf.orders.quota(tenant) == 0:
            raise Refusal("tenant_not_stored", f"nothing of tenant {tenant!r} is stored here: its quota is 0")
        if not self.shelf.orders.admits(tenant):
            raise Refusal(
                "too_many_tenants",
                f"{TENANTS_WITH_QUOTA_MAX} tenants with a quota have blocks here already",
                retryable=True,
            )

    def _granted(self, session: sessions.Session, message: StartWrite) -> list[Grant]:
        """The answer once more, to the same question."""
        where = {key: index for index, key in reversed(list(enumerate(message.keys)))}
        if not all(key in where for key in session.keys):
            raise Refusal("bad_start", f"session {session.name} was started with other keys")
        pairs = zip(session.keys, session.slots, strict=True)
        return [Grant(where[key], slot) for key, slot in pairs]

    def _take_slots(self, layout: int, message: StartWrite, wanted: Sequence[int]) -> list[Grant]:
        slots = self.shelf.take_slots(layout, [message.parents[index] for index in wanted], message.tenant)
        if not slots:
            self.counters["refused_full"] += 1
            raise Refusal(
                "store_full",
                "no slot is free and none can be freed: all are being written, in quarantine, or needed",
                retryable=True,
            )
        grants = [Grant(index, slot) for index, slot in zip(wanted, slots, strict=False)]
        for grant in grants:
            self._writing[message.keys[grant.index]] = (message.parents[grant.index], layout, message.tenant)
        return grants

    def _as_join_report(self, name: JoinName, message: Report) -> joins.Report:
        if len(message.checksums) != len(message.good):
            raise RemoteProtocolError(
                f"rank {message.rank} reports {len(message.good)} blocks and checksums of {len(message.checksums)}"
            )
        return joins.Report(name, message.rank, tuple(message.good), tuple(message.checksums))

    def _obey_join(self, name: JoinName, effects: Sequence[joins.Effect]) -> None:
        for effect in effects:
            match effect:
                case joins.Completed():
                    self.counters["joins_completed"] += 1
                    self._tell(name, sessions.JoinCompleted(effect.good, effect.checksums))
                case joins.Failed():
                    self.counters["joins_failed"] += 1
                    if self._sessions.get(name) is not None:
                        self._tell(name, sessions.JoinFailed())
                case joins.Contradicted() | joins.Refused():
                    self.counters["refused_reports"] += 1
                case joins.Forget():
                    pass

    def _tell(self, name: JoinName, event: sessions.Event) -> None:
        before = self._sessions.get(name)
        assert before is not None
        try:
            effects = self._sessions.handle(name, event)
        except LocalProtocolError:
            self.counters["internal_errors"] += 1
            raise
        after = self._sessions.get(name)
        if (
            after is not None
            and after.phase is sessions.Phase.QUARANTINED
            and before.phase is not after.phase
        ):
            for slot in after.slots:
                self.slots.move(slot, QUARANTINED)
        self._obey_session(effects)
        if after is None or after.phase in (sessions.Phase.PUBLISHED, sessions.Phase.FREED):
            life = self._lives.pop(name, None)
            if life is not None:
                self._by_life[life].discard(name)
                if not self._by_life[life]:
                    del self._by_life[life]

    def _obey_session(self, effects: Sequence[sessions.Effect]) -> None:
        """What is published is published first and together: its holds on parents go from the writer to the block."""
        blocks: dict[bytes, Block] = {}
        for effect in effects:
            if isinstance(effect, sessions.Publish):
                key = effect.key
                parent, layout, tenant = self._writing[key]
                assert key not in self.shelf, "a key under way was published by somebody else"
                blocks[key] = Block(key, parent, layout, effect.slot, effect.checksums, tenant)
        published = list(blocks.values())
        if published:
            self.shelf.publish(published)
            self.counters["published"] += len(published)
        for effect in effects:
            if isinstance(effect, sessions.ReleaseKey):
                parent, layout, tenant = self._writing.pop(effect.key)
                if effect.key not in blocks:
                    self.shelf.release(layout, parent, tenant)
            elif isinstance(effect, sessions.FreeSlot):
                self.shelf.free(effect.slot)
        for block in published:
            self.on_publish(block)
        if effects:
            self.on_keys_settled()

    # --- what is seen from outside -------------------------------------------------------------------------------

    @property
    def joins_open(self) -> int:
        return self._joins.open_count

    @property
    def sessions_live(self) -> int:
        return len(self._sessions)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance. For tests and idle moments: it looks at everything."""
        self.shelf.check_integrity()
        self._joins.check_integrity()
        self._sessions.check_integrity()
        taken = [*self._sessions.held_slots, *(slot for _, _, slot, _ in self._promoting.values())]
        assert len(taken) == len(set(taken)) == self.slots.count[QUARANTINED] + self.slots.count[WRITING]
        assert all(self.slots.state(slot) is not FREE for slot in taken)
        assert set(self._lives) == {name for names in self._by_life.values() for name in names}


def _ignore(block: Block) -> None:
    pass
