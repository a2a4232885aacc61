"""A checksum accepts the bytes that were saved, for that key, head, slot, slab and life of the node, and no others."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.layouts import KVLayout
from interlock.store.checksums import Binding, HeadHasher, block_checksums, verify_block

LAYOUT = KVLayout(layers=2, heads=4, block_tokens=3, content=5, dtype="float32")
BINDING = Binding(b"k" * 32, 7, 11, 13)
DATA = bytes(range(256)) * 4
BLOCK = DATA[: LAYOUT.block_bytes]


@given(st.integers(0, 3), st.lists(st.integers(0, LAYOUT.head_bytes), max_size=5))
def test_a_head_hashed_in_pieces_equals_the_head_hashed_at_once(head: int, cuts: list[int]) -> None:
    data = BLOCK[head * LAYOUT.head_bytes : (head + 1) * LAYOUT.head_bytes]
    hasher = HeadHasher(BINDING, head)
    edges = [0, *sorted(cuts), len(data)]
    for start, stop in itertools.pairwise(edges):
        hasher.update(data[start:stop])
    assert hasher.value() == block_checksums(BINDING, LAYOUT, BLOCK)[head]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_heads_summed_by_any_number_of_ranks_verify_by_any_other(ranks: int) -> None:
    share = 4 // ranks
    size = LAYOUT.head_bytes
    sums = [
        value
        for rank in range(ranks)
        for value in block_checksums(
            BINDING,
            LAYOUT,
            BLOCK[rank * share * size : (rank + 1) * share * size],
            head_start=rank * share,
            head_stop=(rank + 1) * share,
        )
    ]
    assert verify_block(BINDING, LAYOUT, BLOCK, sums)
    for head in range(4):
        part = BLOCK[head * size : (head + 1) * size]
        assert verify_block(BINDING, LAYOUT, part, sums, head_start=head, head_stop=head + 1)


@given(st.integers(0, LAYOUT.block_bytes - 1), st.integers(1, 255))
def test_any_flipped_byte_is_noticed(position: int, flip: int) -> None:
    sums = block_checksums(BINDING, LAYOUT, BLOCK)
    broken = bytearray(BLOCK)
    broken[position] ^= flip
    assert not verify_block(BINDING, LAYOUT, broken, sums)


@pytest.mark.parametrize("change", [{"key": b"K" * 32}, {"slot": 8}, {"node_incarnation": 12}, {"slab": 14}])
def test_the_right_bytes_for_something_else_are_refused(change: dict[str, object]) -> None:
    sums = block_checksums(BINDING, LAYOUT, BLOCK)
    other = msgspec.structs.replace(BINDING, **change)
    assert not verify_block(other, LAYOUT, BLOCK, sums)
    assert not set(sums) & set(block_checksums(other, LAYOUT, BLOCK))


def test_equal_heads_have_different_checksums() -> None:
    sums = block_checksums(BINDING, LAYOUT, bytes(LAYOUT.block_bytes))
    assert len(set(sums)) == 4


def test_a_wrong_number_of_bytes_or_checksums_never_passes() -> None:
    sums = block_checksums(BINDING, LAYOUT, BLOCK)
    assert not verify_block(BINDING, LAYOUT, BLOCK, sums[:3])
    with pytest.raises(ValueError):
        block_checksums(BINDING, LAYOUT, BLOCK[:-1])


# --- layer groups --------------------------------------------------------------------------------------------------------

CUT = msgspec.structs.replace(LAYOUT, cuts=(1,))


def test_sums_of_layer_groups_stand_group_by_group_and_a_stage_makes_its_own() -> None:
    whole = block_checksums(BINDING, CUT, BLOCK)
    assert len(whole) == 2 * CUT.heads
    by_head = [BLOCK[head * CUT.head_bytes :][: CUT.head_bytes] for head in range(CUT.heads)]
    made = []
    for start, stop in ((0, 1), (1, CUT.layers)):
        part = b"".join(one[start * CUT.layer_bytes : stop * CUT.layer_bytes] for one in by_head)
        made += block_checksums(BINDING, CUT, part, layer_start=start, layer_stop=stop)
        assert verify_block(BINDING, CUT, part, whole, layer_start=start, layer_stop=stop)
    assert made == whole


def test_equal_bytes_in_two_layer_groups_have_other_sums() -> None:
    sums = block_checksums(BINDING, CUT, bytes(CUT.block_bytes))
    assert len(set(sums)) == len(sums)


def test_who_cuts_no_layers_verifies_what_others_cut_by_their_cuts() -> None:
    sums = block_checksums(BINDING, CUT, BLOCK)
    assert verify_block(BINDING, LAYOUT, BLOCK, sums, cuts=CUT.cuts)
    assert not verify_block(BINDING, LAYOUT, BLOCK, sums)
    broken = bytearray(BLOCK)
    broken[-1] ^= 1
    assert not verify_block(BINDING, LAYOUT, broken, sums, cuts=CUT.cuts)
