"""What store nodes ask each other, beside what every client may ask: where blocks stand, and what was removed (store/removals)."""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.layouts import KVLayout
from interlock.core.removals import Removal
from interlock.store.removals import RemovalsTold, RemoveHere, TellRemovals
from interlock.wire.store_messages import BlockPage, Changes, Done, Key, ListBlocks, Tenant, WatchChanges


class LocateBlocks(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Where do these blocks stand in your slab?"""

    keys: list[Key]


class PeerBlock(msgspec.Struct, frozen=True, array_like=True):
    """Where one block stands in a peer's slab."""

    key: Key
    parent: bytes
    slot: int
    layout: int
    """Into `BlocksLocated.layouts`."""
    checksums: tuple[int, ...]
    tenant: Tenant = ""
    """Who stored it there; it counts for him here, too."""


class BlocksLocated(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Those of the asked blocks that are here. Slots are in the segment, which is the slab of this life."""

    slab: int
    segment: int
    slab_bytes: int
    layouts: list[KVLayout]
    blocks: list[PeerBlock]
    removals: list[Removal]
    """Those done here that concern any of these blocks."""


QUESTIONS: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    LocateBlocks | ListBlocks | WatchChanges | RemoveHere | TellRemovals
)
ANSWERS: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    BlocksLocated | BlockPage | Changes | Done | RemovalsTold
)
