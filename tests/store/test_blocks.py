"""What the node decides, without sockets: eviction, layouts, and books that balance whatever is said in whatever order."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from interlock.core.layouts import KVLayout, shard_of_rank
from interlock.core.sessions import SlabName
from interlock.store.blocks import BlockStore
from interlock.store.refusal import Refusal
from interlock.store.roster import EngineLife, LifeName, Member, Roster
from interlock.wire.store_messages import Attach, Grant, Report, StartWrite

PAGE = 4096
LAYOUT = KVLayout(layers=2, heads=4, block_tokens=4, content=32, dtype="float32")
SLAB = SlabName(3, 5)


class Engine:
    """An engine whose ranks are numbers: it speaks to a `BlockStore` directly."""

    def __init__(
        self,
        store: BlockStore,
        roster: Roster,
        name: str,
        ranks: int = 1,
        layout: KVLayout = LAYOUT,
        incarnation: int = 1,
    ) -> None:
        self.store = store
        number = store.layout(layout)
        self.members: list[Member] = []
        for rank in (None, *range(ranks)):
            shard = (
                None if rank is None else shard_of_rank(rank, ranks, layers=layout.layers, heads=layout.heads)
            )
            pid = hash((name, incarnation, rank))
            member = roster.attach(Attach(name, incarnation, rank, ranks, layout, shard), pid, number)
            member.connections = 1
            self.members.append(member)
        life = roster.get(LifeName(name, incarnation))
        assert life is not None
        self.life: EngineLife = life

    def start(
        self, session: str, keys: list[bytes], parents: list[bytes], now_s: float = 0.0, attempt: int = 1
    ) -> list[Grant]:
        return self.store.start_write(self.life, StartWrite(session, attempt, keys, parents), now_s)

    def report(self, session: str, rank: int, good: list[bool], attempt: int = 1) -> None:
        member = self.members[rank + 1]
        heads = member.shard.head_stop - member.shard.head_start
        sums = [bytes([7]) * (8 * heads) if ok else b"" for ok in good]
        self.store.report(
            member, Report(session, attempt, rank, SLAB.node_incarnation, SLAB.slab, good, sums)
        )

    def save(self, session: str, keys: list[bytes], parents: list[bytes]) -> list[Grant]:
        grants = self.start(session, keys, parents)
        for rank in range(len(self.members) - 1):
            self.report(session, rank, [True] * len(grants))
        return grants


def chain(count: int, letter: bytes = b"a") -> tuple[list[bytes], list[bytes]]:
    keys = [letter * 28 + number.to_bytes(4, "big") for number in range(count)]
    return keys, [b"", *keys[:-1]]


@pytest.fixture
def store() -> BlockStore:
    return BlockStore(SLAB, 16 * PAGE)


@pytest.fixture
def roster() -> Roster:
    return Roster()


# --- eviction ----------------------------------------------------------------------------------------------------


def test_a_full_store_evicts_the_oldest_leaves_and_spares_their_parents(
    store: BlockStore, roster: Roster
) -> None:
    engine = Engine(store, roster, "e")
    old, old_parents = chain(8, b"a")
    new, new_parents = chain(8, b"b")
    engine.save("a", old, old_parents)
    engine.save("b", new, new_parents)
    more, parents = chain(3, b"c")
    engine.save("c", more, parents)
    assert len(store.match(old)) == 5
    assert len(store.match(new)) == 8
    assert len(store.match(more)) == 3
    assert store.counters["evictions"] == 3
    store.check_integrity()


def test_a_look_up_makes_a_prefix_young(store: BlockStore, roster: Roster) -> None:
    engine = Engine(store, roster, "e")
    engine.save("a", *chain(8, b"a"))
    engine.save("b", *chain(8, b"b"))
    store.match(chain(8, b"a")[0])
    engine.save("c", *chain(4, b"c"))
    assert len(store.match(chain(8, b"a")[0])) == 8
    assert len(store.match(chain(8, b"b")[0])) == 4


def test_the_parent_of_what_is_being_written_is_not_evicted_to_make_room_for_it(
    store: BlockStore, roster: Roster
) -> None:
    engine = Engine(store, roster, "e")
    keys, parents = chain(20)
    engine.save("a", keys[:16], parents[:16])
    with pytest.raises(Refusal, match="no slot"):
        engine.start("b", keys[16:], parents[16:])
    assert len(store.match(keys)) == 16
    store.check_integrity()
    other, their_parents = chain(4, b"b")
    engine.save("c", other, their_parents)
    assert len(store.match(keys)) == 12
    store.check_integrity()


def test_a_start_is_granted_as_far_as_there_is_room(store: BlockStore, roster: Roster) -> None:
    engine = Engine(store, roster, "e")
    keys, parents = chain(40)
    grants = engine.start("a", keys, parents)
    assert [grant.index for grant in grants] == list(range(16))
    engine.report("a", 0, [True] * 16)
    assert len(store.match(keys)) == 16
    store.check_integrity()


def test_filling_and_evicting_ten_times_over_keeps_every_table_at_its_size(
    store: BlockStore, roster: Roster
) -> None:
    engine = Engine(store, roster, "e", ranks=2)
    for turn in range(40):
        keys, parents = chain(4, bytes([turn + 1]))
        engine.save(f"s{turn}", keys, parents)
        assert len(store.match(keys)) == 4
        store.check_integrity()
    assert len(store) == 16
    assert store.counters["evictions"] == 40 * 4 - 16
    assert store.writes.sessions_live == store.writes.joins_open == 0
    assert len(store.shelf._at) == sum(map(len, store.shelf.orders)) == 16
    assert not store.writes._writing
    assert not store.writes._by_life
    assert not store.writes._lives
    assert all(len(order._holds) <= 16 for order in store.shelf.orders)


def test_a_block_whose_parent_was_withdrawn_is_reached_again_when_that_is_back(
    store: BlockStore, roster: Roster
) -> None:
    engine = Engine(store, roster, "e")
    keys, parents = chain(3)
    grants = engine.save("a", keys, parents)
    assert store.withdraw([keys[1]], [grants[1].slot]) == 1
    assert len(store.match(keys)) == 1
    again = engine.save("b", keys, parents)
    assert [grant.index for grant in again] == [1]
    assert len(store.match(keys)) == 3
    store.check_integrity()


# --- layouts -----------------------------------------------------------------------------------------------------


def test_a_second_layout_takes_an_extent_from_the_first_and_both_live_on(roster: Roster) -> None:
    store = BlockStore(SLAB, 64 * PAGE)
    double = msgspec.structs.replace(LAYOUT, layers=4)
    one, two = Engine(store, roster, "one"), Engine(store, roster, "two", layout=double)
    one.save("a", *chain(64, b"a"))
    assert store.slots.extents_of(one.life.layout_number) == 16
    grants = two.save("b", *chain(4, b"b"))
    store.check_integrity()
    assert len(grants) == 2
    assert store.slots.extents_of(one.life.layout_number) == 15
    assert len(store.match(chain(4, b"b")[0])) == 2
    assert len(store) == 62


def test_an_extent_with_a_slot_in_use_is_not_taken(roster: Roster) -> None:
    store = BlockStore(SLAB, 16 * PAGE)
    one, two = (
        Engine(store, roster, "one"),
        Engine(store, roster, "two", layout=msgspec.structs.replace(LAYOUT, heads=2)),
    )
    one.start("a", *chain(16, b"a"))
    with pytest.raises(Refusal, match="no slot"):
        two.start("b", *chain(1, b"b"))
    one.report("a", 0, [True] * 16)
    assert len(two.start("b", *chain(1, b"b"))) == 1
    store.check_integrity()


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (StartWrite("s", 1, [b"k" * 32], []), "do not match"),
        (StartWrite("s", 1, [b"k" * 32], [b"short"]), "32 bytes"),
        (StartWrite("", 1, [b"k" * 32], [b""]), "name"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(
    store: BlockStore, roster: Roster, message: StartWrite, word: str
) -> None:
    engine = Engine(store, roster, "e")
    with pytest.raises(Refusal, match=word):
        store.start_write(engine.life, message, 0.0)
    store.check_integrity()


def test_an_engine_cannot_open_sessions_without_bound(roster: Roster) -> None:
    store = BlockStore(SLAB, 1024 * PAGE)
    engine = Engine(store, roster, "e")
    keys, parents = chain(300)
    for number in range(256):
        engine.start(f"s{number}", [keys[number]], [parents[number]])
    with pytest.raises(Refusal, match="256 write sessions") as refusal:
        engine.start("s256", [keys[256]], [parents[256]])
    assert refusal.value.code == "too_many_sessions"
    engine.report("s0", 0, [True])
    assert engine.start("s256", [keys[256]], [parents[256]])


# --- everything in any order -------------------------------------------------------------------------------------


class Anything(RuleBasedStateMachine):
    """Two engines, one of two ranks; starts, reports true and false, aborts, deaths, time: the books always balance.

    The world keeps its own account of who was given which slot and has neither promised nor died: no such slot may be
    given out again, and no block may be published that not every rank reported good.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = BlockStore(SLAB, 16 * PAGE, join_s=10.0)
        self.roster = Roster()
        self.lives = self.sessions = 0
        self.now_s = 0.0
        self.engines = [self.engine("a", 1), self.engine("b", 2), self.engine("shared", 2)]
        self.given: dict[tuple[str, int], set[int]] = {}
        """(process, session number) -> slots that this process may still touch."""
        self.reports: dict[tuple[int, int], list[bool]] = {}
        self.grants: list[tuple[Engine, str, int, list[bytes], list[Grant]]] = []

    def engine(self, name: str, ranks: int) -> Engine:
        """The two ranks of "shared" hold the same head, which the first writes: the second merely could."""
        self.lives += 1
        layout = msgspec.structs.replace(LAYOUT, heads=1) if name == "shared" else LAYOUT
        return Engine(self.store, self.roster, name, ranks, layout, incarnation=self.lives)

    @rule(
        which=st.integers(0, 2),
        letter=st.integers(0, 5),
        count=st.integers(1, 7),
        abort_first=st.integers(0, 9).map(lambda n: n == 9),
    )
    def start(self, which: int, letter: int, count: int, abort_first: bool) -> None:
        engine = self.engines[which]
        keys, parents = chain(count, bytes([letter + 10 * (which == 2)]))
        self.sessions += 1
        session = f"s{self.sessions}"
        if abort_first:
            self.store.abort(engine.life, session, 1, never_given=True)
        try:
            grants = engine.start(session, keys, parents, self.now_s)
        except Refusal as refusal:
            assert refusal.code in ("store_full", "quarantine_full", "session_ended")  # noqa: PT017
            assert abort_first == (refusal.code == "session_ended")  # noqa: PT017
            return
        assert not abort_first or not grants
        touched = set().union(*self.given.values()) if self.given else set()
        assert not touched & {grant.slot for grant in grants}, (
            "a slot that somebody may still write was given out"
        )
        if not grants:
            return
        number = len(self.grants)
        self.grants.append((engine, session, number, keys, grants))
        for member in engine.members[1:]:
            self.given[member.process, number] = {grant.slot for grant in grants}

    def pick(self, data: Any) -> tuple[Engine, str, int, list[bytes], list[Grant]]:
        """Mostly a recent session: the old ones are over, and only their repeats are of interest."""
        recent = data.draw(st.integers(0, 9)) > 0
        return data.draw(st.sampled_from(self.grants[-4:] if recent else self.grants))

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def report(self, data: Any) -> None:
        engine, session, number, _, grants = self.pick(data)
        rank = data.draw(st.integers(0, len(engine.members) - 2))
        if engine.life.ended:
            return
        good = data.draw(st.lists(st.booleans(), min_size=len(grants), max_size=len(grants)))
        expected = len(grants) if engine.members[rank + 1].shard.area else 0
        good = good[:expected]
        if data.draw(st.integers(0, 9)) == 0:
            good = [*good, True]
        try:
            engine.report(session, rank, good)
        except Refusal:
            assert len(good) != expected
        self.given.pop((engine.members[rank + 1].process, number), None)
        if (
            len(good) == expected or not expected
        ):  # of a rank that writes nothing the promise is all that counts
            self.reports.setdefault((number, rank), good[:expected])

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), never_given=st.booleans())
    def abort(self, data: Any, never_given: bool) -> None:
        engine, session, number, _, _ = self.pick(data)
        told = any(key[0] == number for key in self.reports)
        self.store.abort(engine.life, session, 1, never_given=never_given and not told)
        if never_given and not told:
            for member in engine.members:
                self.given.pop((member.process, number), None)

    @rule(which=st.integers(0, 2))
    def die(self, which: int) -> None:
        """All processes of an engine, in some order; then a new life of it."""
        engine = self.engines[which]
        engine.life.ended = True
        for member in engine.members:
            for gone in self.roster.exited(member.pid):
                self.store.process_gone(gone)
                if gone.rank is None:
                    self.store.writer_gone(gone.life)
            for key in [key for key in self.given if key[0] == member.process]:
                del self.given[key]
        self.engines[which] = self.engine(engine.life.name.engine, engine.life.ranks)

    @rule(letter=st.integers(0, 5), count=st.integers(1, 9))
    def match(self, letter: int, count: int) -> None:
        keys, _ = chain(count, bytes([letter]))
        assert [block.key for block in self.store.match(keys)] == keys[: len(self.store.match(keys))]

    @invariant()
    def readers_see_only_what_every_rank_saved_and_nobody_touches(self) -> None:
        touched = set().union(*self.given.values()) if self.given else set()
        for block in self.store.shelf:
            assert block.slot not in touched, "a reader is shown a slot that somebody may still write"
            assert self.was_saved(block.key, block.slot), (
                "a block was published that not every rank reported good"
            )

    def was_saved(self, key: bytes, slot: int) -> bool:
        for engine, _, number, keys, grants in self.grants:
            for position, grant in enumerate(grants):
                if keys[grant.index] == key and grant.slot == slot:
                    said = [self.reports.get((number, rank)) for rank in range(len(engine.members) - 1)]
                    if all(good is not None and (not good or good[position]) for good in said):
                        return True
        return False

    @rule(seconds=st.sampled_from([1.0, 11.0, 500.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.store.tick(self.now_s)

    @rule(letter=st.integers(0, 5), index=st.integers(0, 6), slot=st.integers(0, 31))
    def forget(self, letter: int, index: int, slot: int) -> None:
        if slot < 16:
            self.store.withdraw([chain(7, bytes([letter]))[0][index]], [slot])
        elif slot == 31:
            cursor: int | None = 0
            while cursor is not None:
                _, cursor = self.store.sweep(cursor, lambda _: True)

    @invariant()
    def the_books_balance(self) -> None:
        self.store.check_integrity()

    def teardown(self) -> None:
        """When everybody is gone and time has passed, nothing is held."""
        for which in range(3):
            self.die(which)
        self.store.check_integrity()
        slots = self.store.slots.count
        assert {
            str(state): n for state, n in slots.items() if n and str(state) not in ("free", "published")
        } == {}


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
