"""Pins: prefixes that an owner wants to stay for a while.

A pin is a wish with an owner and a deadline. It keeps blocks from being evicted for room, nothing else: a block that fails
its check, a tenant's deletion or an administrator removes it all the same, and whoever reads checks what he read. It
ends when the owner takes it back, at its deadline, or when the exit of the owner's process is proven: a client that died
holds no memory. All pins together hold at most `limits.PINNED_SHARE_MAX` of the slab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from interlock.core.limits import PIN_SECONDS_MAX, PINNED_SHARE_MAX, PINS_PER_OWNER_MAX
from interlock.core.prefixes import Block
from interlock.store.refusal import Refusal


class _Pin(msgspec.Struct):
    blocks: tuple[Block, ...]
    until_s: float


class Pins:
    """Pins by (owner, name). `hold` and `release` are told of each block when its first pin comes and its last goes."""

    def __init__(
        self,
        slab_bytes: int,
        slot_bytes: Callable[[int], int],
        hold: Callable[[Block], None],
        release: Callable[[Block], None],
    ) -> None:
        self._bytes_max = int(PINNED_SHARE_MAX * slab_bytes)
        self._slot_bytes, self._hold, self._release = slot_bytes, hold, release
        self._pins: dict[str, dict[str, _Pin]] = {}
        self._counts: Counter[bytes] = Counter()
        self.bytes = 0
        """Of the slots of all pinned blocks."""

    def __len__(self) -> int:
        return sum(map(len, self._pins.values()))

    def __contains__(self, key: object) -> bool:
        return key in self._counts

    def add(self, owner: str, name: str, blocks: Sequence[Block], now_s: float, seconds: float) -> None:
        """Pins `blocks`, in place of what that name pinned before. Raises `Refusal`, changing nothing, beyond the limits."""
        if not 0 < seconds <= PIN_SECONDS_MAX:
            raise Refusal("bad_pin", f"a pin lasts more than 0 and at most {PIN_SECONDS_MAX:.0f} seconds")
        mine = self._pins.get(owner, {})
        if name not in mine and len(mine) >= PINS_PER_OWNER_MAX:
            raise Refusal(
                "too_many_pins", f"{owner} has {PINS_PER_OWNER_MAX} pins already", hint="take some back"
            )
        more = sum(self._slot_bytes(block.layout) for block in blocks if block.key not in self._counts)
        if self.bytes + more > self._bytes_max:
            raise Refusal(
                "pins_full",
                f"{self.bytes} bytes are pinned and {more} more would pass {self._bytes_max}, "
                f"{PINNED_SHARE_MAX:.0%} of the slab",
                retryable=True,
                hint="take pins back or let them end",
            )
        for block in blocks:
            self._count(block)
        self.remove(owner, name)
        if blocks:
            self._pins.setdefault(owner, {})[name] = _Pin(tuple(blocks), now_s + seconds)

    def remove(self, owner: str, name: str) -> int:
        """How many blocks that pin held; 0 when there was none of that name."""
        mine = self._pins.get(owner, {})
        pin = mine.pop(name, None)
        if pin is None:
            return 0
        if not mine:
            del self._pins[owner]
        for block in pin.blocks:
            self._uncount(block)
        return len(pin.blocks)

    def owner_gone(self, owner: str) -> None:
        """That process's exit is proven: its pins end."""
        for name in list(self._pins.get(owner, ())):
            self.remove(owner, name)

    def tick(self, now_s: float) -> None:
        """Pins past their deadline end."""
        due = [
            (owner, name)
            for owner, pins in self._pins.items()
            for name, pin in pins.items()
            if now_s >= pin.until_s
        ]
        for owner, name in due:
            self.remove(owner, name)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books do not balance."""
        counts = Counter(b.key for pins in self._pins.values() for pin in pins.values() for b in pin.blocks)
        assert counts == self._counts
        sizes = {
            b.key: self._slot_bytes(b.layout)
            for p in self._pins.values()
            for q in p.values()
            for b in q.blocks
        }
        assert sum(sizes.values()) == self.bytes <= self._bytes_max

    def _count(self, block: Block) -> None:
        self._counts[block.key] += 1
        if self._counts[block.key] == 1:
            self.bytes += self._slot_bytes(block.layout)
            self._hold(block)

    def _uncount(self, block: Block) -> None:
        self._counts[block.key] -= 1
        if not self._counts[block.key]:
            del self._counts[block.key]
            self.bytes -= self._slot_bytes(block.layout)
            self._release(block)
