"""The mapped index: what was put in is found, what is torn is as if it were not there, and size costs nothing at start."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.store.packs.index import RECORD, RECORD_BYTES, PackIndex, _check, key_words


def keys_of(count: int, seed: int = 0) -> list[bytes]:
    data = random.Random(seed).randbytes(32 * count)
    return [data[i * 32 : i * 32 + 32] for i in range(count)]


def index_of(records: int) -> tuple[PackIndex, bytearray]:
    memory = bytearray(records * RECORD_BYTES)
    return PackIndex(memoryview(memory)), memory


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove", "find"]), st.integers(0, 30), st.integers(1, 5)),
        max_size=60,
    )
)
def test_it_agrees_with_a_dictionary(steps: list[tuple[str, int, int]]) -> None:
    # First words that collide, so that probes run into each other.
    keys = [bytes([i % 4, *([0] * 7), i, *([1] * 23)]) for i in range(31)]
    index, _ = index_of(64)
    model: dict[bytes, tuple[int, int]] = {}
    for what, number, pack in steps:
        key = keys[number]
        if what == "add":
            index.add([key], pack, [number], 0)
            model[key] = (pack, number)
        elif what == "remove":
            index.remove_keys([key], pack)
            if model.get(key, (0, 0))[0] == pack:
                del model[key]
        rows, packs = index.find(keys)
        for i, each in enumerate(keys):
            assert packs[i] == model.get(each, (0, 0))[0]
            if each in model:
                assert index.ordinals_of(rows[i : i + 1]) == [model[each][1]]
    index.check_integrity()


def test_a_prefix_ends_at_the_first_key_that_is_missing() -> None:
    index, _ = index_of(1024)
    keys = keys_of(300)
    index.add(keys, 1, list(range(300)), 0)
    assert len(index.prefix(keys)) == 300
    assert len(index.prefix([*keys[:100], keys_of(1, 9)[0], *keys[100:]])) == 100
    assert len(index.prefix(keys_of(2, 9))) == 0
    assert len(index.prefix([])) == 0


@pytest.mark.parametrize("at", [0, 31, 32, 36, 48, 55])
def test_a_torn_record_is_as_if_it_were_not_there_and_can_be_put_again(at: int) -> None:
    index, memory = index_of(64)
    keys = keys_of(5)
    index.add(keys, 3, [0, 1, 2, 3, 4], 0)
    rows, _ = index.find(keys)
    memory[int(rows[2]) * RECORD_BYTES + at] ^= 0x10
    rows, packs = index.find(keys)
    assert list(rows >= 0) == [True, True, False, True, True]
    assert packs[2] == 0
    index.add([keys[2]], 4, [7], 0)
    rows, packs = index.find(keys)
    assert list(packs) == [3, 3, 4, 3, 3]


def test_when_a_block_was_used_is_no_part_of_its_check() -> None:
    index, _ = index_of(64)
    keys = keys_of(3)
    index.add(keys, 1, [0, 1, 2], 5)
    rows, _ = index.find(keys)
    index.touch(rows[:2], 9)
    assert list(index.used_of(index.find(keys)[0])) == [9, 9, 5]


def test_a_rebuilt_table_has_what_the_old_one_had_but_garbage_and_dead_packs() -> None:
    index, memory = index_of(256)
    keys = keys_of(60)
    index.add(keys[:40], 1, list(range(40)), 0)
    index.add(keys[40:], 2, list(range(20)), 0)
    memory[-RECORD_BYTES:] = b"\x5a" * RECORD_BYTES
    larger, _ = index_of(512)
    larger.fill(index.snapshot(np.array([1], dtype="<u4")))
    larger.check_integrity()
    assert larger.count() == 40
    _, packs = larger.find(keys)
    assert list(packs) == [1] * 40 + [0] * 20


def _million(path: Path, packs: Any) -> list[bytes]:
    """A directory whose index has 10⁶ records, twenty of which are blocks of a real pack."""
    count = 1_000_000
    keys = keys_of(count)
    records = np.zeros(count, dtype=RECORD)
    records["key"] = key_words(keys)
    records["pack"] = 1_000
    records["ordinal"] = np.arange(count)
    records["check"] = _check(records["key"], records["pack"], records["ordinal"])
    index, memory = index_of(1 << 21)
    index.fill(records)
    real, _ = index_of(256)
    real_keys = packs.chain(20)
    real.add(real_keys, 1, list(range(20)), 1)
    for record in real.snapshot():
        index.add([record["key"].tobytes()], 1, [int(record["ordinal"])], 1)
    (path / "index").write_bytes(memory)
    return keys


async def test_a_restart_hits_within_a_second_at_a_million_blocks(tmp_path: Path, packs: Any) -> None:
    keys = packs.chain(20)
    async with packs.TierLife(tmp_path / "kv", 1) as life:
        await life.save(keys)
    _million(tmp_path / "kv", packs)
    begun_s = time.monotonic()
    async with packs.TierLife(tmp_path / "kv", 2, disk_bytes=1 << 30) as life:
        assert await life.load(keys) == 20
        first_hit_s = time.monotonic() - begun_s
        assert life.tier.state.books.index.records == 1 << 21
        await life.scanned()  # which drops the million that name a pack that is gone
        assert life.tier.state.counters["stale"] == 1_000_000
    assert first_hit_s < 1.0
