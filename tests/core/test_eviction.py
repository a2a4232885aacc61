"""The least recently used block that nothing holds leaves first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.eviction import LeafLRU


def key(number: int) -> bytes:
    return bytes([number]) * 32


class SlowModel:
    """The order as a sentence: of those that nothing holds, the one with the smallest use."""

    def __init__(self) -> None:
        self.use: dict[bytes, float] = {}
        self.holds: list[bytes] = []
        self.now = 0.0

    def oldest(self) -> bytes | None:
        free = [k for k in self.use if k not in self.holds]
        return min(free, key=lambda k: self.use[k], default=None)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "touch", "hold", "release", "evict"]),
        st.lists(st.integers(0, 7), min_size=1, max_size=6, unique=True),
    ),
    max_size=120,
)


@given(STEPS)
@settings(max_examples=300)
def test_the_order_is_that_of_a_slow_model(steps: list[tuple[str, list[int]]]) -> None:
    lru, model = LeafLRU(), SlowModel()
    for verb, numbers in steps:
        keys = list(map(key, numbers))
        first = keys[0]
        model.now += 100
        if verb == "add" and first not in model.use:
            lru.add(first)
            model.use[first] = model.now
        elif verb == "remove" and first in model.use:
            lru.remove(first)
            del model.use[first]
        elif verb == "touch":
            lru.touch(keys)
            model.use.update({k: model.now - i for i, k in enumerate(keys) if k in model.use})
        elif verb == "hold":
            lru.hold(first)
            model.holds.append(first)
        elif verb == "release" and first in model.holds:
            lru.release(first)
            model.holds.remove(first)
        elif verb == "evict" and (victim := model.oldest()) is not None:
            assert lru.oldest() == victim
            lru.remove(victim)
            del model.use[victim]
        assert lru.oldest() == model.oldest()
        assert len(lru) == len(model.use)
        assert all(lru.holds(k) == model.holds.count(k) for k in keys)
        lru.check_integrity()


def test_a_chain_leaves_from_its_end() -> None:
    lru = LeafLRU()
    chain = [key(n) for n in range(5)]
    for parent, child in zip([None, *chain], chain, strict=False):
        lru.add(child)
        if parent:
            lru.hold(parent)
    left = []
    while (victim := lru.oldest()) is not None:
        lru.remove(victim)
        left.append(victim)
        position = chain.index(victim)
        if position:
            lru.release(chain[position - 1])
    assert left == chain[::-1]


def test_a_block_whose_child_is_under_way_stays_though_it_is_the_oldest() -> None:
    lru = LeafLRU()
    lru.add(key(1))
    lru.add(key(2))
    lru.hold(key(1))
    assert lru.oldest() == key(2)
    lru.release(key(1))
    assert lru.oldest() == key(1)


def test_what_is_there_twice_or_not_there_is_refused() -> None:
    lru = LeafLRU()
    lru.add(key(1))
    with pytest.raises(KeyError):
        lru.add(key(1))
    with pytest.raises(KeyError):
        lru.remove(key(2))
    with pytest.raises(KeyError):
        lru.release(key(1))


def test_a_hot_prefix_touched_for_ever_keeps_the_heap_bounded() -> None:
    lru = LeafLRU()
    keys = [number.to_bytes(32, "big") for number in range(100)]
    for each in keys:
        lru.add(each)
    for _ in range(1000):
        lru.touch(keys)
        lru.check_integrity()
    assert lru.oldest() == keys[-1]


def test_what_is_present_and_what_holds_it_can_be_asked() -> None:
    order = LeafLRU()
    order.add(key(1))
    order.hold(key(2))
    assert key(1) in order
    assert key(2) not in order
    assert (order.holds(key(1)), order.holds(key(2))) == (0, 1)
