"""Where a look-up's blocks stand, in the columns they travel in: thousands of them are a few copies, and one is made when asked for.

As a list of objects an answer of a thousand blocks cost the scheduler 80 µs to decode and the node 100 to build, of a
look-up that takes 700; the ranks need them one by one and later.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import Annotated, overload

import msgspec

from interlock.core.limits import CHECKSUMS_PER_BLOCK_MAX, LAYER_GROUPS_MAX
from interlock.core.packed_sums import SUM_BYTES, unpack_sums

SLOT_BYTES = 8
Sums = Annotated[bytes, msgspec.Meta(max_length=SUM_BYTES * CHECKSUMS_PER_BLOCK_MAX)]
Cuts = Annotated[tuple[int, ...], msgspec.Meta(max_length=LAYER_GROUPS_MAX)]


class Location(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a published block stands: its slot, and, packed, the checksum of every (layer group, head) of the canonical layout."""

    slot: int
    sums: Sums
    cuts: Cuts = ()
    """Layers at which its layer groups after the first begin: its writers' pipeline, not the reader's."""

    @property
    def checksums(self) -> tuple[int, ...]:
        """One unsigned 64-bit number for each (layer group, head), groups outermost."""
        return unpack_sums(self.sums)


class Stretch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """So many blocks in a row whose checksums have the same shape."""

    blocks: Annotated[int, msgspec.Meta(ge=1)]
    sums_bytes: Annotated[int, msgspec.Meta(ge=0, le=SUM_BYTES * CHECKSUMS_PER_BLOCK_MAX)]
    """Of each of them."""
    cuts: Cuts = ()


class Locations(Sequence[Location]):
    """Some locations in columns; equal to any sequence of the same ones. A slice shares the columns."""

    __slots__ = ("_ends", "_slots", "_start", "_starts", "_stop", "_stretches", "_sums")

    def __init__(self, slots: bytes, sums: bytes, stretches: Sequence[Stretch]) -> None:
        """`slots`: unsigned 64-bit integers, little-endian. Raises `ValueError` when the columns are not of one length."""
        self._slots, self._sums, self._stretches = slots, sums, stretches
        self._ends = list(accumulate(stretch.blocks for stretch in stretches))
        self._starts = [0, *accumulate(stretch.blocks * stretch.sums_bytes for stretch in stretches)]
        self._start, self._stop = 0, self._ends[-1] if self._ends else 0
        if len(slots) != SLOT_BYTES * self._stop or len(sums) != self._starts[-1]:
            raise ValueError(
                f"{len(slots)} bytes of slots and {len(sums)} of checksums are not those of {self._stop} blocks"
            )

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> Location: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Location]: ...
    def __getitem__(self, index: int | slice) -> Location | Sequence[Location]:
        if isinstance(index, slice):
            chosen = range(self._start, self._stop)[index]
            if chosen.step != 1:
                return [self._at(place) for place in chosen]
            part = Locations.__new__(Locations)
            part._slots, part._sums, part._stretches = self._slots, self._sums, self._stretches
            part._ends, part._starts = self._ends, self._starts
            part._start, part._stop = chosen.start, max(chosen.start, chosen.stop)
            return part
        return self._at(range(self._start, self._stop)[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Locations of {len(self)} blocks"

    def _at(self, place: int) -> Location:
        number = bisect_right(self._ends, place)
        stretch = self._stretches[number]
        before = self._ends[number - 1] if number else 0
        at = self._starts[number] + (place - before) * stretch.sums_bytes
        slot = int.from_bytes(self._slots[SLOT_BYTES * place : SLOT_BYTES * (place + 1)], "little")
        return Location(slot, self._sums[at : at + stretch.sums_bytes], stretch.cuts)


def as_list(columns: object) -> list[Location]:
    """For encoders (`enc_hook`): what travels on from a look-up's answer goes as a list, which anything decodes."""
    if not isinstance(columns, Locations):
        raise NotImplementedError(f"a {type(columns).__name__} is nothing that is sent")
    return list(columns)


def _same(one: object, other: object) -> bool:
    return one == other


def pack_slots(slots: Iterable[int]) -> bytes:
    """Raises `OverflowError` for a number that is no unsigned 64-bit integer."""
    return array("Q", slots).tobytes()


def stretches_of(sums: Sequence[bytes], cuts: Sequence[Cuts]) -> list[Stretch]:
    """The stretches of blocks with these checksums and cuts. Runs along both."""
    if not sums:
        return []
    if cuts.count(cuts[0]) == len(cuts) and len(set(map(len, sums))) == 1:
        return [Stretch(len(sums), len(sums[0]), cuts[0])]
    shapes = zip(map(len, sums), cuts, strict=True)
    return [Stretch(len(list(same)), *shape) for shape, same in groupby(shapes)]
