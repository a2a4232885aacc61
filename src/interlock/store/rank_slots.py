"""A rank's heads in the store's slots: which slots move in one strided copy, and the check of what came out of them.

A slot holds `[head][layer]([token][content] ‖ scales)` for *all* heads and layers (`core/layouts`), so the part of a
tensor-parallel rank is one contiguous range, and that of a pipeline's stage one range a head. Consecutive slots and blocks
at equal distances move together: a prefill chunk into fresh slots is one copy. Used by every engine that saves (vLLM's
connector, the Transformers engine).

A block that is saved goes through memory of the rank's own (*staging*): its checksums are of that copy, which is what the
KV tensors held, and never of the slot (hazards W3). So summing up and filling the slot need no KV tensor, and can be done
by another thread than the model's. A block that is loaded goes through staging too, and is checked there: bytes that are
still in a slot can change between the check and the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.lib.stride_tricks import as_strided

from interlock.core.layouts import KVLayout, Span, covering_span
from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.store.checksums import block_checksums, verify_block
from interlock.store.mapping import MappedSlab
from interlock.wire.locations import Location

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

STAGING_BYTES_MAX = 16 * 1024 * 1024
"""Enough that a copy's fixed cost vanishes, and little beside a model."""

GOOD, MISMATCH, LATE, FOREIGN = "good", "mismatch", "late", "foreign"
"""What became of a block that was to be loaded: in place; not what was promised; not tried any more; what was promised, but
quantised with other scales than this engine's."""


class Run(msgspec.Struct, frozen=True):
    """Positions [start, stop) of two parallel lists that each advance by a constant step there (1 for a single one)."""

    start: int
    stop: int
    slot_step: int
    block_step: int

    def chosen(self, first_block: int) -> slice:
        """The run's blocks as a slice, its first one being `first_block`."""
        return slice(
            first_block, first_block + self.block_step * (self.stop - self.start - 1) + 1, self.block_step
        )


def runs(slots: Sequence[int], blocks: Sequence[int]) -> Iterator[Run]:
    """Strided runs that cover (slots, blocks) in order, each as long as it can be. Steps are positive."""
    start, total = 0, len(slots)
    while start < total:
        stop, slot_step, block_step = start + 1, 1, 1
        if stop < total:
            slot_step, block_step = slots[stop] - slots[start], blocks[stop] - blocks[start]
        if slot_step <= 0 or block_step <= 0:
            yield Run(start, start + 1, 1, 1)
            start += 1
            continue
        while (
            stop < total
            and slots[stop] - slots[stop - 1] == slot_step
            and blocks[stop] - blocks[stop - 1] == block_step
        ):
            stop += 1
        yield Run(start, stop, slot_step, block_step)
        start = stop


class SlotBytes:
    """One rank's heads in every slot of a slab, as arrays over the slab's own memory."""

    def __init__(
        self,
        memory: memoryview,
        layout: KVLayout,
        head_start: int,
        head_stop: int,
        layers: Span | None = None,
    ) -> None:
        self._memory: Bytes = np.frombuffer(memory, dtype=np.uint8)
        self._layout = layout
        self._start = head_start * layout.head_bytes
        self._heads = head_stop - head_start
        self._layers = layers or (0, layout.layers)

    def of(self, slots: Sequence[int], run: Run) -> Bytes:
        """`[n, head, layer, token, byte]` over the slots of `run`. Raises `IndexError` outside the slab."""
        return tokens_of(self.whole(slots, run), self._layout)

    def whole(self, slots: Sequence[int], run: Run, layers: Span | None = None) -> Bytes:
        """`[n, head, layer, byte]`, tokens and scales, of this rank's layers or of `layers`. Raises `IndexError`."""
        first, last = slots[run.start], slots[run.stop - 1]
        if first < 0 or last * SLOT_GRAIN_BYTES + self._layout.block_bytes > len(self._memory):
            raise IndexError(f"slots {first} to {last} do not lie in the slab")
        start, stop = layers or self._layers
        layer = self._layout.layer_bytes
        return as_strided(
            self._memory[first * SLOT_GRAIN_BYTES + self._start + start * layer :],
            (run.stop - run.start, self._heads, stop - start, layer),
            (run.slot_step * SLOT_GRAIN_BYTES, self._layout.head_bytes, layer, 1),
        )


def tokens_of(whole: Bytes, layout: KVLayout) -> Bytes:
    """Of `[n, head, layer, byte]` the tokens, `[n, head, layer, token, byte]`, without a copy."""
    n, head, layer, _ = whole.strides
    shape = (*whole.shape[:3], layout.block_tokens, layout.token_bytes)
    return as_strided(whole, shape, (n, head, layer, layout.token_bytes, 1))


def scales_of(whole: Bytes, layout: KVLayout) -> Bytes:
    """Of `[n, head, layer, byte]` the scales, `[n, head, layer, byte]`, without a copy."""
    return whole[..., layout.layer_bytes - layout.scale_bytes :]


class RankSlots:
    """What whoever moves one rank's blocks knows: which heads and layers it holds, how many blocks fit into its staging.

    `checksums=False` is for benchmarks and for tests that must see a spoilt block: it writes sums that no other reader
    accepts, and believes what it reads.
    """

    def __init__(
        self,
        layout: KVLayout,
        head_start: int,
        head_stop: int,
        *,
        layers: Span | None = None,
        checksums: bool = True,
    ) -> None:
        self.layout = layout
        self.head_start, self.head_stop = head_start, head_stop
        self.heads = head_stop - head_start
        self.layers = layers or (0, layout.layers)
        self.batch = max(1, STAGING_BYTES_MAX // (self.heads * layout.head_bytes))
        count = self.layers[1] - self.layers[0]
        self.dense_shape = (self.heads, count, layout.block_tokens, layout.content)
        self.checksums = checksums
        self._slots: tuple[MappedSlab, SlotBytes] | None = None

    def slots_of(self, slab: MappedSlab) -> SlotBytes:
        """Made once a slab; the former slab's mapping goes with its last user. Saving and loading threads both ask."""
        known = self._slots
        if known is None or known[0] is not slab:
            made = SlotBytes(slab.view, self.layout, self.head_start, self.head_stop, self.layers)
            known = self._slots = slab, made
        return known[1]

    def batches(self, count: int) -> list[range]:
        """`count` blocks in parts that fit into one staging each."""
        return [range(at, min(at + self.batch, count)) for at in range(0, count, self.batch)]

    # --- saving --------------------------------------------------------------------------------------------------

    def staging(self) -> Bytes:
        """Memory for one batch that is saved, `[block, head, layer, byte]`."""
        layers = self.layers[1] - self.layers[0]
        return np.empty((self.batch, self.heads, layers, self.layout.layer_bytes), dtype=np.uint8)

    def put(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], staged: Bytes
    ) -> list[list[int]]:
        """Fills the slots from `staged`, `[block, head, layer, byte]`; per block the sums of the parts held.

        Any thread may call it. Raises `IndexError` for a slot outside the slab.
        """
        target, sums = self.slots_of(slab), []
        for run in runs(slots, range(len(slots))):
            into = target.whole(slots, run)
            if not self.checksums:
                np.copyto(into, staged[run.start : run.stop])
            for n in range(run.start, run.stop):
                sums.append(self.sums(slab, keys[n], slots[n], staged[n]))
                if self.checksums:  # a block at a time: the copy finds its source in the cache
                    np.copyto(into[n - run.start], staged[n])
        return sums

    def sums(self, slab: MappedSlab, key: bytes, slot: int, dense: Bytes) -> list[int]:
        """The checksums of this rank's part of a block, which lies contiguous in `dense`."""
        if not self.checksums:
            groups = 1 + sum(self.layers[0] < cut < self.layers[1] for cut in self.layout.cuts)
            return [0] * (groups * self.heads)
        return block_checksums(
            slab.binding(key, slot),
            self.layout,
            dense.reshape(-1).data,
            head_start=self.head_start,
            head_stop=self.head_stop,
            layer_start=self.layers[0],
            layer_stop=self.layers[1],
        )

    # --- loading -------------------------------------------------------------------------------------------------

    def arrivals(self) -> Bytes:
        """Memory for one batch that is loaded: all layers of this rank's heads, for others may have cut them elsewhere."""
        return np.empty(self.batch * self.heads * self.layout.head_bytes, dtype=np.uint8)

    def fetch(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        arrivals: Bytes,
        batch: range,
    ) -> tuple[Bytes, list[int]]:
        """This rank's part of the blocks of `batch`, `[block, head, layer, byte]` in `arrivals`, and which can be believed.

        Of a block whose writers cut its layers elsewhere the whole groups are read and checked. Raises `IndexError`,
        and `ValueError` for cuts that are none of this layout.
        """
        span = self._span(locations, batch)
        shape = (len(batch), self.heads, span[1] - span[0], self.layout.layer_bytes)
        whole = arrivals[: int(np.prod(shape))].reshape(shape)
        slots = [locations[i].slot for i in batch]
        source = self.slots_of(slab)
        good: list[int] = []
        for run in runs(slots, range(len(slots))):
            stored = source.whole(slots, run, span)
            if not self.checksums:
                np.copyto(whole[run.start : run.stop], stored)
                good += batch[run.start : run.stop]
                continue
            for n in range(run.start, run.stop):  # a block at a time: the check finds it in the cache
                np.copyto(whole[n], stored[n - run.start])
                if self._believed(slab, keys[batch[n]], locations[batch[n]], whole[n], span):
                    good.append(batch[n])
        return whole[:, :, self.layers[0] - span[0] : self.layers[1] - span[0]], good

    def _span(self, locations: Sequence[Location], batch: range) -> Span:
        """The layers to read, so that every block's groups are whole."""
        if not any(locations[i].cuts for i in batch) and self.layers == (0, self.layout.layers):
            return self.layers
        spans = {
            covering_span(self.layout.layers, cuts, *self.layers)
            for cuts in {tuple(locations[i].cuts) for i in batch}
        }
        return min(start for start, _ in spans), max(stop for _, stop in spans)

    def _believed(self, slab: MappedSlab, key: bytes, location: Location, dense: Bytes, span: Span) -> bool:
        """`dense`: `[head, layer of span, byte]`."""
        own = covering_span(self.layout.layers, location.cuts, *self.layers)
        if own != span:  # another block of the batch needed more
            dense = np.ascontiguousarray(dense[:, own[0] - span[0] : own[1] - span[0]])
        return verify_block(
            slab.binding(key, location.slot),
            self.layout,
            dense.reshape(-1).data,
            location.checksums,
            head_start=self.head_start,
            head_stop=self.head_stop,
            layer_start=own[0],
            layer_stop=own[1],
            cuts=location.cuts,
        )

    def checked(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        staging: Bytes,
        batch: range,
    ) -> list[int]:
        """`fetch` for a rank that holds all layers, into `staging`, `[block, head, layer, token, byte]`."""
        _, good = self.fetch(slab, keys, locations, staging.reshape(-1), batch)
        return good
