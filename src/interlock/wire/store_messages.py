"""What store clients and a store node say to each other. One question, one answer; a `Fault` is always a possible answer.

Keys are 32-byte block keys (`core/prefixes`). Slots are numbers in the slab of one node incarnation. Checksums are
unsigned 64-bit integers, one per KV head of the shard they came from, in head order.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from interlock.core.layouts import KVLayout, Shard
from interlock.core.limits import BLOCKS_PER_CALL_MAX, HEADS_MAX

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Keys = Annotated[list[Key], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]
Checksums = Annotated[list[int], msgspec.Meta(max_length=HEADS_MAX)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


# --- from clients ------------------------------------------------------------------------------------------------


class Attach(Message, frozen=True):
    """I am rank `rank` of `ranks` of `engine` in that engine's life, or its scheduler (`rank` None); I use this layout.

    Answered by `Attached`; to a rank the slab's descriptor travels with the answer (read-write), to a scheduler none.
    The node holds proof of exit of the sending process from here on; without it a rank is refused.
    """

    engine: str
    engine_incarnation: int
    rank: int | None
    ranks: int
    layout: KVLayout
    shard: Shard | None = None
    """The rectangle of each block that this rank holds and writes; empty where a lower rank holds the same heads."""
    writes: bool = True
    """False: this rank only reads. It gets a read-only descriptor and its engine is never granted a write."""


class Match(Message, frozen=True):
    """How long a prefix of `keys` can be read here, and where."""

    keys: Keys


class StartWrite(Message, frozen=True):
    """Begin a write session for those of `keys` that are missing. Repeating (session, attempt) repeats the answer.

    `parents[i]` is the key before `keys[i]` in its chain, or empty bytes for a first block.
    """

    session: str
    attempt: int
    keys: Keys
    parents: Annotated[list[bytes], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]


class Report(Message, frozen=True):
    """I will not touch the slots of this session again; this is what became of each granted block, in grant order.

    `checksums[i]` covers what this rank wrote of block i (empty where `good[i]` is false).
    """

    session: str
    attempt: int
    rank: int
    node_incarnation: int
    slab: int
    good: Annotated[list[bool], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]
    checksums: Annotated[list[Checksums], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]


class AbortWrite(Message, frozen=True):
    """End this session: nothing of it is published any more. Its slots stay taken until its ranks reported or are gone.

    `never_given` is the scheduler's promise that no rank was or will be told of the slots (it gave up waiting for the
    answer that named them): they are free at once.
    """

    session: str
    attempt: int
    never_given: bool = False


class Withdraw(Message, frozen=True):
    """Loads of these blocks failed their check at these slots: forget them, if they still stand there."""

    keys: Keys
    slots: Annotated[list[int], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]


class GetStats(Message, frozen=True):
    pass


class Clear(Message, frozen=True):
    """Administrator's verb: forget every published block that nobody is writing."""


# --- from the node -----------------------------------------------------------------------------------------------


class Attached(Message, frozen=True):
    slab: int
    slab_bytes: int
    slot_bytes: int
    slots: int


class Location(msgspec.Struct, frozen=True, array_like=True):
    """Where a published block stands: its slot, and the checksum of every head of the canonical layout."""

    slot: int
    checksums: Checksums


class Matched(Message, frozen=True):
    """The first `len(locations)` keys can be read. `slab` says of which slab the slots are."""

    slab: int
    locations: Annotated[list[Location], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """`index` into the asked keys, and the slot to write that block to."""

    index: int
    slot: int


class WriteStarted(Message, frozen=True):
    """What may be written. `grants` empty: all present or under way elsewhere, and no session was begun."""

    slab: int
    grants: Annotated[list[Grant], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]


class Done(Message, frozen=True):
    """Heard and done. `count` says how many things it concerned."""

    count: int = 0


class Stats(Message, frozen=True):
    """Counters and gauges of the node by metric name (docs/operations lists them)."""

    values: dict[str, float]


ClientMessage = Attach | Match | StartWrite | Report | AbortWrite | Withdraw | GetStats | Clear
NodeMessage = Attached | Matched | WriteStarted | Done | Stats
