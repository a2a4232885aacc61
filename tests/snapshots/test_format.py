"""The file: whatever is wrong with its bytes is an error that names it, and never a wrong tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.host.trees import page_memory
from interlock.snapshots import format as file_format
from interlock.snapshots.format import SnapshotDamaged, lay_out, read, seal
from interlock.snapshots.tensors import Staging, describe, to_numpy

VALUES = {"a": np.arange(300, dtype=np.float64), "b": np.array(3, np.int16), "c": np.zeros((0, 4), np.uint8)}


def made() -> memoryview:
    layout = lay_out(
        {name: describe(value) for name, value in VALUES.items()}, {"deep": [1, None]}, {"k": "v"}
    )
    into = page_memory(layout.total_bytes)[: layout.total_bytes]
    staging = Staging()
    for entry in layout.entries:
        if entry.name in VALUES:
            staging.copy(VALUES[entry.name], into[layout.header_bytes :][entry.start : entry.stop])
    seal(layout, into)
    return into


def test_a_file_is_whole_pages_and_comes_back() -> None:
    data = made()
    assert len(data) % 4096 == 0
    found = read("f", data)
    assert found.structure == {"deep": [1, None]}
    assert found.labels == {"k": "v"}
    arrays = to_numpy(found.tensors)
    assert all(np.array_equal(arrays[n], VALUES[n]) and arrays[n].shape == VALUES[n].shape for n in VALUES)


def test_every_byte_counts() -> None:
    """Each flipped byte is refused: in the header, in a tensor, in the padding."""
    good = bytes(made())
    for at in [*range(0, 1400, 3), *range(4090, len(good), 41)]:
        bad = bytearray(good)
        bad[at] ^= 0x10
        refused, found = "", {}
        try:
            found = to_numpy(read("f", memoryview(bad)).tensors)
        except SnapshotDamaged as error:
            refused = str(error)
        # Blanks of the header may be other blanks.
        is_blank = bad[at] in b"\t\n\r 0" and bool(found)
        assert "snapshot f" in refused or (
            is_blank and all(np.array_equal(found[n], VALUES[n]) for n in VALUES)
        )


def test_a_newer_version_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_format, "VERSION", 7)
    newer = made()
    monkeypatch.undo()
    with pytest.raises(SnapshotDamaged, match="version 7, this program reads up to 1"):
        read("f", newer)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_bytes_from_outside_do_more_than_be_refused(data: bytes, length: int) -> None:
    for each in (data, length.to_bytes(8, "little") + data, bytes(made())[: len(data)]):
        with pytest.raises(SnapshotDamaged):
            read("f", memoryview(bytearray(each)))


def test_a_dtype_that_the_format_has_not_is_refused() -> None:
    with pytest.raises(TypeError, match="complex128"):
        describe(np.zeros(1, np.complex128))
    with pytest.raises(ValueError, match="cannot be kept"):
        lay_out({"interlock.pad": ("U8", (1,))})
