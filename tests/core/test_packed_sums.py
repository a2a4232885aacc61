"""Packed checksums: what comes back is what went in, and what is no list of them is a miss, not a crash."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.packed_sums import SUM_BYTES, pack_sums, unpack_sums


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_sums_come_back_as_they_were_packed(sums: list[int]) -> None:
    packed = pack_sums(sums)
    assert unpack_sums(packed) == tuple(sums)
    assert len(packed) == SUM_BYTES * len(sums)


def test_the_bytes_are_little_endian_on_every_machine() -> None:
    assert pack_sums([1, 1 << 56]) == bytes([1, *[0] * 7, *[0] * 7, 1])


@pytest.mark.parametrize("size", [1, 7, 9])
def test_bytes_that_do_not_divide_into_sums_are_none_so_their_block_fails_its_check(size: int) -> None:
    assert unpack_sums(bytes(size)) == ()


@pytest.mark.parametrize("wrong", [-1, 1 << 64])
def test_what_is_no_64_bit_number_is_not_packed(wrong: int) -> None:
    with pytest.raises(struct.error):
        pack_sums([wrong])
