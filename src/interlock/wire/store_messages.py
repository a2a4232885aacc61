"""What store clients and a store node say to each other. One question, one answer; a `Fault` is always a possible answer.

Keys are 32-byte block keys (`core/prefixes`). Slots are numbers in the slab of one node incarnation. Checksums are
unsigned 64-bit integers, one per (layer group, KV head) of the shard they came from, group by group (core/layouts); they
travel packed into bytes (core/packed_sums): a look-up's answer and a rank's report have thousands of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from interlock.core.layouts import KVLayout, Shard
from interlock.core.limits import (
    BLOCK_TOKENS_MAX,
    BLOCKS_LISTED_MAX,
    BLOCKS_PER_CALL_MAX,
    BLOCKS_VERIFIED_MAX,
    CHANGES_PER_CALL_MAX,
    JOIN_SECONDS_MAX,
    TENANT_CHARS_MAX,
    WATCH_SECONDS_MAX,
)
from interlock.wire.locations import (
    SLOT_BYTES,
    Cuts,
    Locations,
    Stretch,
    Sums,
    pack_slots,
    stretches_of,
)

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Keys = Annotated[list[Key], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]
Tokens = Annotated[bytes, msgspec.Meta(max_length=4 * BLOCK_TOKENS_MAX)]
Tenant = Annotated[str, msgspec.Meta(max_length=TENANT_CHARS_MAX)]
HexPrefix = Annotated[str, msgspec.Meta(max_length=64, pattern="^[0-9a-f]*$")]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What a store node and its clients say to each other."""


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
    leads: bool = False
    """True: I am the one rank of an engine of one and its scheduler as well (a program that puts and gets blocks)."""


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
    tenant: str = ""
    """Against whose quota the blocks count; the salt of their keys is the caller's own affair."""
    wait_s: Annotated[float, msgspec.Meta(ge=0.0, le=JOIN_SECONDS_MAX)] = 0.0
    """How long to wait for keys that another session is writing, before the answer; 0: they are left to it at once."""
    tokens: Annotated[list[Tokens], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)] = msgspec.field(
        default_factory=list
    )
    """`tokens[i]` are those of block i alone, unsigned 32-bit integers, little-endian, or empty bytes. Sent only to a node
    that `wants_tokens`; empty: none are told."""


class Report(Message, frozen=True):
    """I will not touch the slots of this session again; this is what became of each granted block, in grant order.

    `checksums[i]` covers what this rank wrote of block i, packed (empty where `good[i]` is false).
    """

    session: str
    attempt: int
    rank: int
    node_incarnation: int
    slab: int
    good: Annotated[list[bool], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]
    checksums: Annotated[list[Sums], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]


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
    """Answered by `Stats`."""


class Clear(Message, frozen=True):
    """Administrator's verb: forget every block that was published before this was said. Done in slices."""


class Remove(Message, frozen=True):
    """Administrator's verb: forget the blocks of `tenant` (what is being written for him included), or those whose key
    begins with these hexadecimal digits, or those that both are said of, or just `keys`. Done in slices.

    All but `keys` is done at the node's peers, too, and remembered: `Done.missed` are the nodes that have not carried it out
    yet (away, or their disk fails); they will, and until then nobody takes such blocks from them (core/removals)."""

    tenant: Tenant | None = None
    prefix: HexPrefix = ""
    keys: Annotated[list[Key], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)] = msgspec.field(
        default_factory=list
    )


class Pin(Message, frozen=True):
    """Keep the longest prefix of `keys` that is here from being evicted, for `seconds` or until my process ends.

    The connection has to be attached. A pin of the same name is replaced. Answered by `Done` with the number of blocks.
    """

    name: str
    keys: Keys
    seconds: float


class Unpin(Message, frozen=True):
    """Ends the pin of this name; none of that name is no error."""

    name: str


class ListBlocks(Message, frozen=True):
    """One page of the published blocks: those that stand in the next slots from `cursor` on. 0 begins."""

    cursor: Annotated[int, msgspec.Meta(ge=0)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=BLOCKS_LISTED_MAX)] = BLOCKS_LISTED_MAX
    """Slots to look at."""
    tenant: Tenant | None = None
    prefix: HexPrefix = ""


class VerifyBlocks(Message, frozen=True):
    """Check the bytes of the blocks that stand in the next slots from `cursor` on; those that fail leave the index."""

    cursor: Annotated[int, msgspec.Meta(ge=0)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=BLOCKS_VERIFIED_MAX)] = BLOCKS_VERIFIED_MAX


class WatchChanges(Message, frozen=True):
    """What changed after number `after` in the index of slab `slab`; waits up to `wait_s` for something to happen."""

    slab: int
    after: Annotated[int, msgspec.Meta(ge=0)]
    limit: Annotated[int, msgspec.Meta(ge=1, le=CHANGES_PER_CALL_MAX)] = CHANGES_PER_CALL_MAX
    wait_s: Annotated[float, msgspec.Meta(ge=0.0, le=WATCH_SECONDS_MAX)] = 0.0


class GetTenants(Message, frozen=True):
    """Who uses how much."""


# --- from the node -----------------------------------------------------------------------------------------------


class Attached(Message, frozen=True):
    """Answers `Attach`: which slab, and its shape in bytes and slots. Its descriptor comes along."""

    slab: int
    slab_bytes: int
    slot_bytes: int
    slots: int
    wants_tokens: bool = False
    """Whether this node publishes what tokens its blocks stand for."""


class Matched(Message, frozen=True):
    """The first `len(locations)` keys can be read. `slab` says of which slab the slots are. In columns (wire/locations)."""

    slab: int
    slots: Annotated[bytes, msgspec.Meta(max_length=SLOT_BYTES * BLOCKS_PER_CALL_MAX)] = b""
    sums: bytes = b""
    stretches: Annotated[list[Stretch], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)] = msgspec.field(
        default_factory=list
    )
    coming: int = 0
    """So many further keys are on their way from disk: whoever asks again soon is told where they are."""

    def __post_init__(self) -> None:
        """Raises `ValueError` when the columns do not go together."""
        Locations(self.slots, self.sums, self.stretches)

    @classmethod
    def at(
        cls, slab: int, slots: Sequence[int], sums: Sequence[bytes], cuts: Sequence[Cuts], coming: int = 0
    ) -> Matched:
        """From one slot, one run of packed checksums and one shape for each block, in order."""
        return cls(slab, pack_slots(slots), b"".join(sums), stretches_of(sums, cuts), coming)

    @property
    def locations(self) -> Locations:
        """The blocks one by one; views of what came, not copies."""
        return Locations(self.slots, self.sums, self.stretches)


class Grant(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`index` into the asked keys, and the slot to write that block to."""

    index: int
    slot: int


class WriteStarted(Message, frozen=True):
    """What may be written. `grants` empty: all present or under way elsewhere, and no session was begun."""

    slab: int
    grants: Annotated[list[Grant], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)]
    under_way: int = 0
    """So many of the asked keys another session is writing; they are left to it."""
    present: int = 0
    """So many of them are here already."""


class Listed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A published block, as a listing shows it."""

    key: bytes
    parent: bytes
    slot: int
    size_bytes: int
    block_tokens: int
    tenant: str = ""
    pinned: bool = False


class BlockPage(Message, frozen=True):
    """`sequence` is the number of the last change when this page was made; `next` where to go on, None at the end."""

    slab: int
    sequence: int
    blocks: Annotated[list[Listed], msgspec.Meta(max_length=BLOCKS_LISTED_MAX)]
    next: int | None


class Verified(Message, frozen=True):
    """So many blocks were checked; `bad` failed and were forgotten."""

    checked: int
    bad: Annotated[list[bytes], msgspec.Meta(max_length=BLOCKS_VERIFIED_MAX)]
    next: int | None


class ChangedBlock(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A block came ("stored") or left ("removed"). `medium` in vLLM's words: "CPU" is the slab, "STORAGE" the disk."""

    kind: str
    key: bytes
    parent: bytes
    block_tokens: int
    tenant: str
    medium: str


class Changes(Message, frozen=True):
    """Changes up to number `last`. `gap`: some are forgotten; list the blocks, then watch from the first page's `sequence`."""

    slab: int
    last: int
    gap: bool
    changes: Annotated[list[ChangedBlock], msgspec.Meta(max_length=CHANGES_PER_CALL_MAX)]


class TenantUse(msgspec.Struct, frozen=True, array_like=True):
    """What a tenant's blocks take of the slab; `quota_bytes` None: no quota."""

    tenant: str
    used_bytes: int
    quota_bytes: int | None


class Tenants(Message, frozen=True):
    """Answers `GetTenants`."""

    tenants: list[TenantUse]


class Done(Message, frozen=True):
    """Heard and done. `count` says how many things it concerned."""

    count: int = 0
    missed: Annotated[list[str], msgspec.Meta(max_length=BLOCKS_PER_CALL_MAX)] = msgspec.field(
        default_factory=list
    )
    """Nodes that have not done it yet, where all of them had to."""


class Stats(Message, frozen=True):
    """Counters and gauges of the node by metric name (docs/operations lists them)."""

    values: dict[str, float]


ClientMessage = (
    Attach
    | Match
    | StartWrite
    | Report
    | AbortWrite
    | Withdraw
    | GetStats
    | Clear
    | Remove
    | Pin
    | Unpin
    | ListBlocks
    | VerifyBlocks
    | WatchChanges
    | GetTenants
)
NodeMessage = Attached | Matched | WriteStarted | Done | Stats | BlockPage | Verified | Changes | Tenants
