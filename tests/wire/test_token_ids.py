"""Token ids travel packed, and what is no list of ids is refused by whoever reads it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.sampling import Sampling
from interlock.engines.base import RequestRejected, Work
from interlock.wire.token_ids import pack_ids, unpack_ids


@given(st.lists(st.integers(0, 2**32)))
def test_ids_come_out_as_they_went_in(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(ids)) == ids


@pytest.mark.parametrize(
    "packed",
    [b"", b"\x93\x01\x02", b"\x01", pack_ids([1]) + b"\x00", msgspec.msgpack.encode(["a"])],
    ids=repr,
)
def test_what_is_no_list_of_ids_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="packed token ids"):
        unpack_ids(packed)
    work = Work(key="k", packed_prompt=packed, sampling=Sampling(max_tokens=1), cache_salt="")
    with pytest.raises(RequestRejected, match="cannot be read"):
        _ = work.prompt
