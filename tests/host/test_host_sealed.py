"""A state file of which a single bit differs is refused, whichever bit it is."""

from __future__ import annotations

import json

import pytest

from interlock.host.sealed import seal, unseal

BODY = b'{"name":"engine-0","incarnation":1790000000000000001}'


def test_what_was_sealed_is_read_back_and_is_still_json() -> None:
    sealed = seal(BODY)
    assert unseal(sealed) == BODY
    assert json.loads(sealed)["incarnation"] == 1790000000000000001


def test_no_flipped_bit_and_no_torn_end_passes() -> None:
    sealed = seal(BODY)
    for at in range(len(sealed)):
        for bit in range(8):
            flipped = bytearray(sealed)
            flipped[at] ^= 1 << bit
            with pytest.raises(ValueError, match="checksum"):
                unseal(bytes(flipped))
        with pytest.raises(ValueError, match="checksum"):
            unseal(sealed[:at])


@pytest.mark.parametrize("body", [b"{}", b"[1]", b""])
def test_only_objects_with_a_field_are_sealed(body: bytes) -> None:
    with pytest.raises(ValueError, match="JSON object"):
        seal(body)
