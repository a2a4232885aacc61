"""A slab as a client sees it: its memory, and where in it a slot's block lies."""

from __future__ import annotations

import weakref

from interlock.core.layouts import KVLayout
from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.host.memory import map_memory, populate
from interlock.host.threads import Event, start_thread
from interlock.store.checksums import Binding

WARM_BYTES = 16 * 1024 * 1024
"""Pages mapped in one go: a few milliseconds, after which a slab that nobody uses any more can be let go."""


class MappedSlab:
    """The mapped memory of one slab of one life of a node. It stays mapped while this object or a view of it lives.

    There is no `close`: a mapping that a copy still uses must not go, and one that nothing refers to goes by itself.
    """

    def __init__(
        self, fd: int, *, slab: int, node_incarnation: int, size_bytes: int, layout: KVLayout, writable: bool
    ) -> None:
        """Maps `fd`, which is ours from now on. Raises `ValueError` when it is not sealed memory of that size."""
        memory = map_memory(fd, size_bytes, writable=writable)
        # Views keep the pages mapped beyond this; the descriptor goes with us.
        weakref.finalize(self, memory.close)
        self.slab = slab
        self.node_incarnation = node_incarnation
        self.layout = layout
        self.writable = writable
        self.view = memory.view
        """All of the slab's bytes; for `torch.frombuffer` and the like."""
        self.warm = Event()
        """Set once every page is mapped, or the kernel would not: copies meet no page fault from then on."""
        me, warm = weakref.ref(self), self.warm
        if size_bytes > WARM_BYTES:
            start_thread("interlock-slab-warm", lambda: _warm(me, warm))
        else:
            _warm(me, warm)

    def offset(self, slot: int) -> int:
        """Where slot `slot` begins in `view`, in bytes. Raises `IndexError` when a block there would leave the slab."""
        start = slot * SLOT_GRAIN_BYTES
        if slot < 0 or start + self.layout.block_bytes > len(self.view):
            raise IndexError(f"slot {slot} does not lie in slab {self.slab}")
        return start

    def block(self, slot: int) -> memoryview:
        """The block's bytes at `slot`, in canonical order `[head][layer][token][content]`."""
        start = self.offset(slot)
        return self.view[start : start + self.layout.block_bytes]

    def heads(self, slot: int, head_start: int, head_stop: int) -> memoryview:
        """The bytes of heads [head_start, head_stop) of the block at `slot`: contiguous, what one shard holds."""
        size = self.layout.head_bytes
        start = self.offset(slot)
        return self.view[start + head_start * size : start + head_stop * size]

    def binding(self, key: bytes, slot: int) -> Binding:
        """What the checksums of block `key` at `slot` are bound to."""
        return Binding(key, slot, self.node_incarnation, self.slab)


def _warm(slab_of: weakref.ref[MappedSlab], warm: Event) -> None:
    """Maps the whole slab in the background, so that saves and loads copy at the memory's speed from the first on."""
    at = 0
    while (slab := slab_of()) is not None and at < len(slab.view):
        if not populate(slab.view[at : at + WARM_BYTES], writable=slab.writable):
            break
        at += WARM_BYTES
        del slab
    warm.set()
