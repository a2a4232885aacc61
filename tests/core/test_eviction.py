"""Of the blocks that nothing holds one of little use leaves first, as a slow model of the rule says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core import eviction
from interlock.core.eviction import LeafARC, UseClock


def key(number: int) -> bytes:
    return bytes([number]) * 32


class SlowModel:
    """ARC over leaves as sentences, over plain lists that are searched and sorted every time."""

    GHOSTS_MIN = 2

    def __init__(self) -> None:
        self.use: dict[bytes, float] = {}
        self.once: list[bytes] = []
        self.holds: list[bytes] = []
        self.ghosts: tuple[list[bytes], list[bytes]] = ([], [])
        self.share = 0.5
        self.now = 0

    def add(self, k: bytes) -> None:
        side = 0 if k in self.ghosts[0] else 1 if k in self.ghosts[1] else None
        if side is None:
            self.once.append(k)
        else:
            ratio = len(self.ghosts[1 - side]) / len(self.ghosts[side])
            step = max(1.0, ratio) / (len(self.use) + 1)
            self.share = min(1.0, max(0.0, self.share + (step if side == 0 else -step)))
            self.ghosts[side].remove(k)
        self.now += 1
        self.use[k] = self.now

    def touch(self, k: bytes) -> None:
        self.now += 1
        self.use[k] = self.now
        if k in self.once:
            self.once.remove(k)

    def remove(self, k: bytes) -> tuple[float, bool]:
        again = k not in self.once
        if not again:
            self.once.remove(k)
        return self.use.pop(k), again

    def inherit(self, k: bytes, use: float, again: bool) -> None:
        if k in self.use:
            self.use[k] = max(self.use[k], use)
            if again and k in self.once:
                self.once.remove(k)

    def evict(self, k: bytes) -> tuple[float, bool]:
        self.ghosts[0 if k in self.once else 1].append(k)
        left = self.remove(k)
        while len(self.ghosts[0]) + len(self.ghosts[1]) > len(self.use) + self.GHOSTS_MIN:
            self.ghosts[0 if len(self.ghosts[0]) >= len(self.ghosts[1]) else 1].pop(0)
        return left

    def victim(self, coming: int) -> bytes | None:
        free = sorted((k for k in self.use if k not in self.holds), key=lambda k: self.use[k])
        once = next((k for k in free if k in self.once), None)
        again = next((k for k in free if k not in self.once), None)
        if once is None or again is None:
            return once or again
        enough = len(self.once) + coming >= self.share * (len(self.use) + coming)
        return once if enough else again


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "touch", "hold", "release", "evict", "evict"]),
        st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True),
        st.integers(0, 3),
    ),
    max_size=160,
)


@given(STEPS)
@settings(max_examples=400, deadline=None)
def test_the_order_is_that_of_a_slow_model(steps: list[tuple[str, list[int], int]]) -> None:
    arc, model = LeafARC(), SlowModel()
    before, eviction._STALE_ENTRIES_MIN = eviction._STALE_ENTRIES_MIN, SlowModel.GHOSTS_MIN
    last: tuple[int, tuple[float, bool]] = (0, (0.0, False))
    try:
        for verb, numbers, coming in steps:
            keys = list(map(key, numbers))
            first = keys[0]
            if verb == "add" and first not in model.use:
                arc.add(first)
                model.add(first)
            elif verb == "remove" and first in model.use:
                last = arc.remove(first), model.remove(first)
            elif verb == "touch" and first in model.use:
                arc.touch(first)
                model.touch(first)
            elif verb == "hold":
                arc.hold(first)
                model.holds.append(first)
            elif verb == "release" and first in model.holds:
                use, (when, again) = last
                arc.release(first, use)
                model.inherit(first, when, again)
                model.holds.remove(first)
            elif verb == "evict" and (victim := model.victim(coming)) is not None:
                assert arc.victim(coming) == victim
                assert arc.age(victim) == model.now - model.use[victim]
                last = arc.evict(victim), model.evict(victim)
            assert arc.victim() == model.victim(0)
            assert arc.once_share == pytest.approx(model.share)
            assert len(arc) == len(model.use)
            assert arc.idle == (not model.use and not model.holds)
            assert all(arc.holds(k) == model.holds.count(k) for k in keys)
            arc.check_integrity()
    finally:
        eviction._STALE_ENTRIES_MIN = before


def test_a_chain_leaves_from_its_end() -> None:
    arc = LeafARC()
    chain = [key(n) for n in range(5)]
    for parent, child in zip([None, *chain], chain, strict=False):
        arc.add(child)
        if parent:
            arc.hold(parent)
    left = []
    while (victim := arc.victim()) is not None:
        arc.evict(victim)
        left.append(victim)
        position = chain.index(victim)
        if position:
            arc.release(chain[position - 1])
    assert left == chain[::-1]


def test_a_block_whose_child_is_under_way_stays_though_it_is_the_oldest() -> None:
    arc = LeafARC()
    arc.add(key(1))
    arc.add(key(2))
    arc.hold(key(1))
    assert arc.victim() == key(2)
    arc.release(key(1))
    assert arc.victim() == key(1)


def test_documents_read_once_do_not_push_out_what_is_used_again() -> None:
    arc = LeafARC()
    hot = [number.to_bytes(32, "big") for number in range(10)]
    for each in hot:
        arc.add(each)
        arc.touch(each)
    for number in range(1000, 3000):
        if len(arc) >= 40:
            victim = arc.victim()
            assert victim is not None
            arc.evict(victim)
        arc.add(number.to_bytes(32, "big"))
    assert all(each in arc for each in hot)


def test_what_comes_back_soon_after_it_was_evicted_moves_the_share_towards_its_side() -> None:
    arc = LeafARC()
    for number in range(4):
        arc.add(key(number))
    arc.touch(key(3))
    arc.evict(key(0))
    arc.add(key(0))
    assert arc.once_share == pytest.approx(0.5 + 1 / 4)
    arc.evict(key(3))
    arc.add(key(3))
    assert arc.once_share == pytest.approx(0.5)


def test_a_block_that_left_by_itself_leaves_no_ghost() -> None:
    arc = LeafARC()
    arc.add(key(1))
    arc.remove(key(1))
    arc.add(key(1))
    assert arc.once_share == 0.5


def test_two_orders_with_one_clock_can_tell_whose_victim_is_older() -> None:
    clock = UseClock()
    one, two = LeafARC(clock), LeafARC(clock)
    one.add(key(1))
    two.add(key(2))
    assert one.age(key(1)) > two.age(key(2))
    one.touch(key(1))
    assert one.age(key(1)) < two.age(key(2))


def test_what_is_there_twice_or_not_there_is_refused() -> None:
    arc = LeafARC()
    arc.add(key(1))
    with pytest.raises(KeyError):
        arc.add(key(1))
    for verb in (arc.remove, arc.evict, arc.age, arc.touch):
        with pytest.raises(KeyError):
            verb(key(2))
    with pytest.raises(KeyError):
        arc.release(key(1))


def test_a_hot_prefix_touched_for_ever_keeps_the_heaps_bounded() -> None:
    arc = LeafARC()
    keys = [number.to_bytes(32, "big") for number in range(100)]
    for each in keys:
        arc.add(each)
    for parent in keys[:-1]:
        arc.hold(parent)
    for _ in range(1000):
        arc.touch(keys[-1])
        arc.check_integrity()
    assert arc.victim() == keys[-1]


def test_a_sweep_of_one_side_takes_nothing_of_the_other_in() -> None:
    arc = LeafARC()
    for number in range(2):
        arc.add(key(number))
    for _ in range(3 * eviction._STALE_ENTRIES_MIN):
        arc.touch(key(1))
        arc.check_integrity()
    assert arc.victim() == key(0)


def test_an_order_is_sound_at_either_end_of_its_share_and_says_when_it_is_not() -> None:
    arc = LeafARC()
    arc.add(key(1))
    for share in (0.0, 1.0):
        arc.once_share = share
        arc.check_integrity()
    for wrong in (-0.1, 1.1):
        arc.once_share = wrong
        with pytest.raises(AssertionError):
            arc.check_integrity()
    arc.once_share = 0.5
    arc._holds[key(1)] = 0
    with pytest.raises(AssertionError):
        arc.check_integrity()


def test_as_many_evicted_keys_are_remembered_as_there_are_blocks_and_a_few_and_of_the_side_that_has_more() -> (
    None
):
    arc, few = LeafARC(), eviction._STALE_ENTRIES_MIN
    for number in range(3 * few):
        arc.add(key(number))
        if number % 2:
            arc.touch(key(number))
    for number in range(2 * few):
        arc.evict(key(number))
        once, again = map(len, arc._ghosts)
        assert once + again == min(number + 1, len(arc) + few)
        assert abs(once - again) <= 1
    assert len(arc) + few == once + again == 2 * few


def test_using_a_child_was_using_its_parents_also_when_the_child_is_gone() -> None:
    arc = LeafARC()
    chain = [key(n) for n in range(3)]
    for each in chain:
        arc.add(each)
    for parent in chain[:-1]:
        arc.hold(parent)
    arc.add(key(9))
    arc.touch(key(9))
    arc.touch(chain[-1])
    arc.release(chain[1], arc.evict(chain[2]))
    assert arc.victim() == key(9)
    arc.release(chain[0], arc.remove(chain[1]))
    assert arc.victim() == key(9)
    assert arc.age(chain[0]) < arc.age(key(9))


def test_a_block_whose_child_was_used_again_is_again_itself_when_the_child_is_gone() -> None:
    arc = LeafARC()
    arc.add(key(1))
    arc.hold(key(1))
    arc.add(key(2))
    arc.touch(key(2))
    arc.hold(key(1))
    arc.add(key(3))  # another child, used later and once
    arc.release(key(1), arc.remove(key(3)))
    arc.release(key(1), arc.remove(key(2)))
    arc.add(key(4))
    assert arc.victim() == key(4), "what was used once leaves first, though it came later"


def test_what_is_present_and_what_holds_it_can_be_asked() -> None:
    arc = LeafARC()
    arc.add(key(1))
    arc.hold(key(2))
    assert key(1) in arc
    assert key(2) not in arc
    assert (arc.holds(key(1)), arc.holds(key(2))) == (0, 1)
