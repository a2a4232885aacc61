"""A look-up's answer in columns is the list of its locations, and columns that do not go together are refused."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.packed_sums import pack_sums
from interlock.wire.locations import Location, Locations, Stretch, as_list, stretches_of
from interlock.wire.store_messages import Matched

SHAPES = st.sampled_from([(0, ()), (1, ()), (2, ()), (2, (3,)), (4, (1, 2))])
BLOCKS = st.lists(st.tuples(st.integers(0, (1 << 64) - 1), SHAPES, st.integers(0, 250)), max_size=40)


def located(blocks: list[Any]) -> list[Location]:
    return [Location(slot, bytes([fill]) * (8 * sums), cuts) for slot, (sums, cuts), fill in blocks]


def matched(wanted: list[Location]) -> Matched:
    sent = Matched.at(7, [w.slot for w in wanted], [w.sums for w in wanted], [w.cuts for w in wanted], 3)
    heard = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Matched)
    assert (heard.slab, heard.coming) == (7, 3)
    return heard


@given(BLOCKS, st.integers(-45, 45), st.integers(-45, 45))
def test_columns_that_travelled_are_the_list_they_were_made_of(
    blocks: list[Any], start: int, stop: int
) -> None:
    wanted = located(blocks)
    found = matched(wanted).locations
    assert list(found) == wanted
    assert found == wanted
    assert len(found) == len(wanted)
    assert [found[i] for i in range(-len(wanted), len(wanted))] == [*wanted, *wanted]
    assert list(found[start:stop]) == wanted[start:stop]
    assert list(found[start:stop][1:]) == wanted[start:stop][1:]
    assert list(found[::-2]) == wanted[::-2]
    assert (
        msgspec.msgpack.decode(msgspec.msgpack.encode(found, enc_hook=as_list), type=list[Location]) == wanted
    )


def test_a_place_beyond_the_columns_is_none() -> None:
    found = matched(located([(1, (1, ()), 1), (2, (1, ()), 2)])).locations
    for beyond in (2, -3):
        with pytest.raises(IndexError):
            found[beyond]
    with pytest.raises(IndexError):
        found[:1][1]


def test_other_locations_are_not_equal() -> None:
    found = matched(located([(1, (1, ()), 1)])).locations
    assert found != located([(2, (1, ()), 1)])
    assert found != located([(1, (1, ()), 1)] * 2)
    assert found != "x"


def test_checksums_come_out_as_they_were_packed() -> None:
    location = Location(1, pack_sums([5, 1 << 63]))
    assert location.checksums == (5, 1 << 63)


@pytest.mark.parametrize(
    ("slots", "sums", "stretches"),
    [
        (bytes(8), b"", []),
        (bytes(8), bytes(8), [Stretch(1, 16)]),
        (bytes(16), bytes(8), [Stretch(1, 8)]),
        (bytes(15), bytes(16), [Stretch(2, 8)]),
        (bytes(8), bytes(8), [Stretch(1, 8), Stretch(1, 0)]),
    ],
)
def test_columns_of_different_lengths_are_refused_by_the_decoder(
    slots: bytes, sums: bytes, stretches: list[Stretch]
) -> None:
    with pytest.raises(ValueError, match="are not those of"):
        Locations(slots, sums, stretches)
    words = {"type": "Matched", "slab": 7, "slots": slots, "sums": sums, "stretches": stretches}
    with pytest.raises(msgspec.ValidationError, match="are not those of"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(words), type=Matched)


def test_blocks_of_one_shape_are_one_stretch() -> None:
    assert stretches_of([bytes(16)] * 3, [()] * 3) == [Stretch(3, 16)]
    assert stretches_of([], []) == []


def test_an_encoder_is_told_what_is_none_of_its_business() -> None:
    with pytest.raises(NotImplementedError, match="set"):
        as_list(set())
