"""What a node decides about blocks: the shelf, write sessions, promotions and pins put together. No I/O, no clock of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from interlock.core.layouts import KVLayout
from interlock.core.limits import BLOCKS_LISTED_MAX, JOIN_SECONDS_MAX, NAME_CHARS_MAX
from interlock.core.prefixes import Block
from interlock.core.sessions import SlabName
from interlock.store.promotions import Promotions
from interlock.store.refusal import Refusal
from interlock.store.roster import EngineLife, LifeName, Member
from interlock.store.shelf import Shelf
from interlock.store.slots import QUARANTINED, WRITING, SlotTable
from interlock.store.writes import Writes
from interlock.wire.store_messages import Grant, Report, StartWrite


class BlockStore:
    """The blocks of one slab in one life of a node."""

    def __init__(
        self,
        slab: SlabName,
        slab_bytes: int,
        *,
        join_s: float = JOIN_SECONDS_MAX,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        """`quotas`: bytes by tenant, "*" for every other that has a name. Raises `ValueError` for impossible ones."""
        self.slab = slab
        self.slab_bytes = slab_bytes
        self.counters: Counter[str] = Counter()
        self.shelf = Shelf(slab_bytes, self.counters, quotas=quotas)
        self.on_keys_settled: Callable[[], None] = lambda: None
        """Called, at once and briefly, after keys ceased to be under way."""
        self.on_publish: Callable[[Block], None] = lambda _: None
        """Told of each block that a write session published."""
        self.writes = Writes(
            slab,
            slab_bytes,
            self.shelf,
            self.counters,
            join_s=join_s,
            is_here=lambda key: key in self.shelf or key in self.promotions,
            on_publish=lambda block: self.on_publish(block),
            on_keys_settled=lambda: self.on_keys_settled(),
        )
        self.promotions = Promotions(self.shelf, self.counters, self.writes.under_way)

    @property
    def slots(self) -> SlotTable:
        """The slab's slots, and what each is used for."""
        return self.shelf.slots

    def __len__(self) -> int:
        return len(self.shelf)

    def layout(self, layout: KVLayout) -> int:
        """The number of that layout here. Raises `Refusal` when the slab cannot hold its blocks."""
        return self.shelf.layout(layout)

    # --- readers -------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> list[Block]:
        """The published blocks of the first keys; they are used now."""
        found = self.shelf.match(keys)
        self.counters["hits"] += len(found)
        self.counters["misses"] += len(keys) - len(found)
        return found

    def withdraw(self, keys: Sequence[bytes], slots: Sequence[int]) -> int:
        """Forgets those of `keys` that still stand at their slot; how many. Raises `Refusal` for lists of unequal length."""
        if len(keys) != len(slots):
            raise Refusal("bad_withdraw", f"{len(keys)} keys and {len(slots)} slots do not go together")
        gone = sum(map(self.shelf.withdraw, keys, slots))
        self.counters["withdrawn"] += gone
        return gone

    def sweep(self, cursor: int, wanted: Callable[[Block], bool]) -> tuple[int, int | None]:
        """Forgets published blocks that are `wanted`, in one slice of the slab from `cursor` on: (how many, where to go on).

        A sweep from 0 to None forgets every such block that was published before it began.
        """
        blocks, following = self.shelf.page(cursor, BLOCKS_LISTED_MAX)
        gone = [block for block in blocks if wanted(block)]
        for block in gone:
            self.shelf.withdraw(block.key, block.slot)
        self.counters["swept"] += len(gone)
        return len(gone), following

    # --- pins ----------------------------------------------------------------------------------------------------

    def pin(self, owner: Member, name: str, keys: Sequence[bytes], now_s: float, seconds: float) -> int:
        """Keeps the longest prefix of `keys` that is here from being evicted; how many blocks. Raises `Refusal`."""
        if not 0 < len(name) <= NAME_CHARS_MAX:
            raise Refusal("bad_pin", f"a pin's name has 1 to {NAME_CHARS_MAX} characters")
        found = self.shelf.match(keys)
        self.shelf.pins.add(owner.process, name, found, now_s, seconds)
        return len(found)

    def unpin(self, owner: Member, name: str) -> int:
        """Takes a pin back; how many blocks it held."""
        return self.shelf.pins.remove(owner.process, name)

    # --- writers (store/writes) ------------------------------------------------------------------------------------

    def start_write(self, life: EngineLife, message: StartWrite, now_s: float) -> list[Grant]:
        """Slots for the keys that are missing, in the order asked, as many as there is room for. Raises `Refusal`."""
        return self.writes.start_write(life, message, now_s)

    def report(self, member: Member, message: Report) -> None:
        """What a rank says became of its part. Raises `Refusal` when it cannot be meant for this slab and session."""
        self.writes.report(member, message)

    def abort(self, life: EngineLife, session: str, attempt: int, *, never_given: bool) -> None:
        """Ends a session, also one whose start is still on its way."""
        self.writes.abort(life, session, attempt, never_given=never_given)

    def writer_gone(self, life: LifeName) -> None:
        """The scheduler of that life is proven gone, or the life is over: nothing it began is published any more."""
        self.writes.writer_gone(life)

    def process_gone(self, member: Member) -> None:
        """The exit of a rank's process is proven: it touches no slot any more, and what it did not report failed."""
        self.shelf.pins.owner_gone(member.process)
        self.writes.process_gone(member)

    def tick(self, now_s: float) -> None:
        """Deadlines of joins, sessions and pins; the memory of finished ones fades."""
        self.writes.tick(now_s)
        self.shelf.pins.tick(now_s)

    def under_way(self, key: bytes) -> bool:
        """Whether somebody is writing that block."""
        return self.writes.under_way(key) or key in self.promotions

    def count_under_way(self, keys: Sequence[bytes]) -> int:
        """How many of `keys` another is writing just now."""
        return sum(map(self.under_way, keys))

    # --- promotions (store/promotions) -----------------------------------------------------------------------------

    def begin_promotion(
        self, layout: int, keys: Sequence[bytes], parents: Sequence[bytes], tenant: str = ""
    ) -> list[int]:
        """A slot for each of the first keys, as far as there is room; each is given back by `end_promotion`."""
        return self.promotions.begin(layout, keys, parents, tenant)

    def end_promotion(self, key: bytes, checksums: Sequence[int] | None) -> bool:
        """The block stands in its slot, verified; None: it does not. Whether it is published."""
        return self.promotions.end(key, checksums)

    # --- what is seen from outside -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance. For tests and idle moments: it looks at everything."""
        self.shelf.check_integrity()
        self.writes.check_integrity()
        taken = [*self.writes.held_slots, *self.promotions.held_slots]
        assert len(taken) == len(set(taken)) == self.slots.count[QUARANTINED] + self.slots.count[WRITING]
