"""Write sessions over one slab: slots are given for what is missing, and what its ranks reported whole is published.

The rules stand in core: one join (core/joins), one session (core/sessions). Here each event goes to those it concerns, in this order: the
session hears a promise before the join judges its contents, for a rank that reports nonsense has still promised. Effects
become changes of the tables at once, so that after each call the books balance (`check_integrity`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from interlock.core import joins, sessions
from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.join_book import JoinBook
from interlock.core.joins import JoinName
from interlock.core.limits import (
    NAME_CHARS_MAX,
    WRITE_SESSIONS_PER_ENGINE_MAX,
)
from interlock.core.prefixes import KEY_BYTES, Block
from interlock.core.session_book import SessionBook
from interlock.core.sessions import SlabName
from interlock.store.quarantine import Quarantine
from interlock.store.refusal import Refusal
from interlock.store.roster import EngineLife, LifeName, Member
from interlock.store.shelf import Shelf
from interlock.store.slots import FREE, QUARANTINED
from interlock.wire.store_messages import Grant, Report, StartWrite

SESSION_CHARS_MAX = 2 * NAME_CHARS_MAX


class Writes:
    """The write sessions of one slab and their joins.

    `is_here`: whether nobody needs to write that block. `on_publish` is told of each block that a session published,
    `on_keys_settled` is called after keys ceased to be under way; both at once and briefly.
    """

    def __init__(
        self,
        slab: SlabName,
        slab_bytes: int,
        shelf: Shelf,
        counters: Counter[str],
        *,
        join_s: float,
        is_here: Callable[[bytes], bool],
        on_publish: Callable[[Block], None],
        on_keys_settled: Callable[[], None],
    ) -> None:
        self._slab, self._slab_bytes, self._shelf, self._counters = slab, slab_bytes, shelf, counters
        self._join_s = join_s
        self._is_here, self._on_publish, self._on_keys_settled = is_here, on_publish, on_keys_settled
        self._joins = JoinBook()
        self._sessions = SessionBook()
        self._by_life: dict[LifeName, set[JoinName]] = {}
        self._lives: dict[JoinName, LifeName] = {}
        self._writing: dict[bytes, tuple[bytes, int, str]] = {}
        """Parent, layout and tenant of each key under way."""
        self.quarantine = Quarantine(self._sessions, shelf.slots, slab_bytes)

    @property
    def joins_open(self) -> int:
        """Joins that wait for reports."""
        return self._joins.open_count

    @property
    def sessions_live(self) -> int:
        """Sessions that hold slots."""
        return len(self._sessions)

    @property
    def held_slots(self) -> list[int]:
        """Slots that sessions hold, being written or in quarantine."""
        return list(self._sessions.held_slots)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance."""
        self._joins.check_integrity()
        self._sessions.check_integrity()
        assert all(self._shelf.slots.state(slot) is not FREE for slot in self._sessions.held_slots)
        assert set(self._lives) == {name for names in self._by_life.values() for name in names}

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
        self._shelf.orders.check(message.tenant)
        grants = self._take_slots(life.layout_number, message, wanted)
        granted = tuple(message.keys[grant.index] for grant in grants)
        deadline_s = now_s + self._join_s
        self._sessions.add(
            sessions.start(
                name,
                slab=self._slab,
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
                self._tell(name, sessions.ProcessReported(processes[report.rank], self._slab))
        self._counters["granted"] += len(grants)
        return grants

    def report(self, member: Member, message: Report) -> None:
        """What a rank says became of its part. Raises `Refusal` when it cannot be meant for this slab and session."""
        if message.rank != member.rank:
            raise Refusal("wrong_rank", f"{member.process} reports as rank {message.rank}")
        slab = SlabName(message.node_incarnation, message.slab)
        if slab != self._slab:
            self._counters["refused_stale_slab"] += 1
            raise Refusal(
                "stale_slab", f"a report for {slab} is refused: this is {self._slab}", hint="attach again"
            )
        name = self._name(member.life, message.session, message.attempt)
        join = self._joins.get(name)
        if join is not None and join.report_of(message.rank) is not None:
            self._counters["joins_duplicate_reports"] += 1
        if join is not None and join.phase in (joins.Phase.COMPLETED, joins.Phase.FAILED):
            self._counters["joins_late_reports"] += 1
        try:
            if self._sessions.get(name) is not None:
                self._tell(name, sessions.ProcessReported(member.process, slab))
            self._obey_join(name, self._joins.handle(self._as_join_report(name, message)))
        except RemoteProtocolError as error:
            self._counters["refused_reports"] += 1
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
                self._tell(name, sessions.ProcessReported(process, self._slab))

    def writer_gone(self, life: LifeName) -> None:
        """The scheduler of that life is proven gone, or the life is over: nothing it began is published any more."""
        for name in sorted(self._by_life.get(life, ()), key=str):
            self._tell(name, sessions.WriterGone())
            self._obey_join(name, self._joins.handle(joins.Abort(name)))

    def process_gone(self, member: Member) -> None:
        """The exit of a rank's process is proven: it touches no slot any more, and what it did not report failed."""
        for name in sorted(self._by_life.get(member.life, ()), key=str):
            self._tell(name, sessions.ProcessGone(member.process))
            if member.rank is not None:
                self._obey_join(name, self._joins.handle(joins.RankLost(name, member.rank)))

    def tick(self, now_s: float) -> None:
        """Deadlines of joins and sessions; the memory of finished ones fades."""
        effects = self._joins.tick(now_s)
        for effect in effects:
            if isinstance(effect, joins.Failed):
                self._counters["joins_timed_out"] += 1
                self._obey_join(effect.join, (effect,))
        for session in self._sessions:
            self._tell(session.name, sessions.Tick(now_s))
        self.quarantine.tick(now_s)

    def end_concerned(self, wanted: Callable[[bytes, str], bool]) -> None:
        """Nothing that is under way and `wanted`, by key and tenant, is published any more: it is being removed."""
        keys = {key for key, (_, _, tenant) in self._writing.items() if wanted(key, tenant)}
        names = (
            {session.name for session in self._sessions if not keys.isdisjoint(session.keys)}
            if keys
            else set()
        )
        for name in sorted(names, key=str):
            self._obey_join(name, self._joins.handle(joins.Abort(name)))
            self._tell(name, sessions.Abort())

    def under_way(self, key: bytes) -> bool:
        """Whether a session is writing that block."""
        return key in self._writing

    # --- inside --------------------------------------------------------------------------------------------------

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
        self.quarantine.check()

    def _granted(self, session: sessions.Session, message: StartWrite) -> list[Grant]:
        """The answer once more, to the same question."""
        where = {key: index for index, key in reversed(list(enumerate(message.keys)))}
        if not all(key in where for key in session.keys):
            raise Refusal("bad_start", f"session {session.name} was started with other keys")
        pairs = zip(session.keys, session.slots, strict=True)
        return [Grant(where[key], slot) for key, slot in pairs]

    def _take_slots(self, layout: int, message: StartWrite, wanted: Sequence[int]) -> list[Grant]:
        slots = self._shelf.take_slots(layout, [message.parents[index] for index in wanted], message.tenant)
        if not slots:
            self._counters["refused_full"] += 1
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
                    self._counters["joins_completed"] += 1
                    self._tell(name, sessions.JoinCompleted(effect.good, effect.checksums))
                case joins.Failed():
                    self._counters["joins_failed"] += 1
                    if self._sessions.get(name) is not None:
                        self._tell(name, sessions.JoinFailed())
                case joins.Contradicted() | joins.Refused():
                    self._counters["refused_reports"] += 1
                case joins.Forget():
                    pass

    def _tell(self, name: JoinName, event: sessions.Event) -> None:
        before = self._sessions.get(name)
        assert before is not None
        try:
            effects = self._sessions.handle(name, event)
        except LocalProtocolError:
            self._counters["internal_errors"] += 1
            raise
        after = self._sessions.get(name)
        if (
            after is not None
            and after.phase is sessions.Phase.QUARANTINED
            and before.phase is not after.phase
        ):
            for slot in after.slots:
                self._shelf.slots.move(slot, QUARANTINED)
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
                assert key not in self._shelf, "a key under way was published by somebody else"
                blocks[key] = Block(key, parent, layout, effect.slot, effect.checksums, tenant)
        published = list(blocks.values())
        if published:
            self._shelf.publish(published)
            self._counters["published"] += len(published)
        for effect in effects:
            if isinstance(effect, sessions.ReleaseKey):
                parent, layout, tenant = self._writing.pop(effect.key)
                if effect.key not in blocks:
                    self._shelf.release(layout, parent, tenant)
            elif isinstance(effect, sessions.FreeSlot):
                self._shelf.free(effect.slot)
        for block in published:
            self._on_publish(block)
        if effects:
            self._on_keys_settled()
