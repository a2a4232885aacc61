"""Moving KV blocks between a rank's tensors and the slab: one small class per kind of device.

Both sum up what they read *from the KV tensor* when they save (hazards W3), and both check what lies in memory of their
own when they load: bytes that are still in a slot can change between the check and the copy. A mover decides nothing:
which blocks, into which slots, and when it must not touch them any more is its caller's business.

The CPU's mover uses NumPy, not torch: torch would start a second team of compute threads for the loader's thread, which
fights the model's own for the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from interlock.connectors.vllm.tensors import Bytes, KVBlocks, SlotBytes, runs
from interlock.core.layouts import KVLayout
from interlock.store.checksums import HeadHasher, verify_block
from interlock.store.mapping import MappedSlab
from interlock.wire.store_messages import Location

STAGING_BYTES_MAX = 16 * 1024 * 1024
"""Enough that a copy's fixed cost vanishes, and little beside a model."""

GOOD, MISMATCH, LATE = "good", "mismatch", "late"
"""What became of a block that was to be loaded: in place; not what was promised; not tried any more."""


class Mover(Protocol):
    def save(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], blocks: Sequence[int]
    ) -> list[list[int]]:
        """Copies KV blocks into slots; returns, per block, the checksum of each head held. All done on return."""
        ...

    def load(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        blocks: Sequence[int],
        in_time: Callable[[], bool],
    ) -> list[str]:
        """Copies slots into KV blocks, each checked before; one of GOOD, MISMATCH, LATE per block.

        All done on return: nothing touches the KV tensor afterwards. `in_time` is asked before each batch.
        """
        ...


class _Layout:
    """What both movers know: which heads this rank holds, and how many blocks fit into its staging."""

    def __init__(self, kv: KVBlocks, layout: KVLayout, head_start: int) -> None:
        self.kv = kv
        self.layout = layout
        self.head_start, self.head_stop = head_start, head_start + kv.heads
        self.batch = max(1, STAGING_BYTES_MAX // (kv.heads * layout.head_bytes))
        self.dense_shape = (kv.heads, layout.layers, layout.block_tokens, layout.content)
        self._slots: tuple[MappedSlab, SlotBytes] | None = None

    def slots_of(self, slab: MappedSlab) -> SlotBytes:
        """Made once a slab; the former slab's mapping goes with its last user. Saving and loading threads both ask."""
        known = self._slots
        if known is None or known[0] is not slab:
            known = self._slots = slab, SlotBytes(slab.view, self.layout, self.head_start, self.head_stop)
        return known[1]

    def verified(self, slab: MappedSlab, key: bytes, location: Location, dense: Bytes) -> bool:
        return verify_block(
            slab.binding(key, location.slot),
            self.layout,
            dense.reshape(-1).data,
            location.checksums,
            head_start=self.head_start,
            head_stop=self.head_stop,
        )

    def batches(self, count: int) -> list[range]:
        return [range(at, min(at + self.batch, count)) for at in range(0, count, self.batch)]

    def checked(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        staging: Bytes,
        batch: range,
    ) -> list[int]:
        """Fills `staging` from the slots of `batch`; the indices whose bytes are what the look-up promised."""
        slots = [locations[i].slot for i in batch]
        source = self.slots_of(slab)
        for run in runs(slots, range(len(slots))):
            np.copyto(staging[run.start : run.stop], source.of(slots, run))
        return [i for n, i in enumerate(batch) if self.verified(slab, keys[i], locations[i], staging[n])]


class CpuMover:
    """KV tensors in host memory."""

    def __init__(self, kv: KVBlocks, layout: KVLayout, head_start: int) -> None:
        self._common = _Layout(kv, layout, head_start)
        self._pieces = kv.byte_pieces()
        self._staging: Bytes | None = None

    def save(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], blocks: Sequence[int]
    ) -> list[list[int]]:
        target = self._common.slots_of(slab)
        for run in runs(slots, blocks):
            dense, chosen = target.of(slots, run), run.chosen(blocks[run.start])
            for layers, piece in self._pieces:
                np.copyto(dense[:, :, layers], piece[:, chosen].transpose(1, 2, 0, 3, 4))
        return [
            self._sums(slab, key, slot, block) for key, slot, block in zip(keys, slots, blocks, strict=True)
        ]

    def _sums(self, slab: MappedSlab, key: bytes, slot: int, block: int) -> list[int]:
        binding, sums = slab.binding(key, slot), []
        for head in range(self._common.kv.heads):
            hasher = HeadHasher(binding, self._common.head_start + head)
            for _, piece in self._pieces:
                for layer in piece[:, block, head]:
                    hasher.update(np.ascontiguousarray(layer).data)
            sums.append(hasher.value())
        return sums

    def load(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        blocks: Sequence[int],
        in_time: Callable[[], bool],
    ) -> list[str]:
        outcomes = [LATE] * len(blocks)
        staging = self._own_staging()
        for batch in self._common.batches(len(blocks)):
            if not in_time():
                break
            good = self._common.checked(slab, keys, locations, staging, batch)
            for i in batch:
                outcomes[i] = MISMATCH
            places = [i - batch.start for i in good]
            targets = [blocks[i] for i in good]
            for run in runs(places, targets):
                source = staging[places[run.start] : places[run.stop - 1] + 1 : run.slot_step]
                chosen = run.chosen(targets[run.start])
                for layers, piece in self._pieces:
                    np.copyto(piece[:, chosen].transpose(1, 2, 0, 3, 4), source[:, :, layers])
            for i in good:
                outcomes[i] = GOOD
        return outcomes

    def _own_staging(self) -> Bytes:
        """Made at the first load: an engine that never hits pays nothing."""
        if self._staging is None:
            common = self._common
            heads, layers, tokens, _ = common.dense_shape
            token_bytes = common.layout.head_bytes // (layers * tokens)
            self._staging = np.empty((common.batch, heads, layers, tokens, token_bytes), dtype=np.uint8)
        return self._staging


class CudaMover:
    """KV tensors on a GPU: gathered on the device, moved by a stream of our own through pinned staging.

    Written against torch's documented streams and events; **it has not been run on a GPU in this project yet**. Saves
    and loads have a stream and staging each, since they run in different threads. Every call waits for its last event,
    so that on return no copy is in flight (source fence, release).
    """

    def __init__(self, kv: KVBlocks, layout: KVLayout, head_start: int) -> None:
        self._common = _Layout(kv, layout, head_start)
        self._save, self._load = self._lane(), self._lane()

    def _lane(self) -> tuple[Any, torch.Tensor, Bytes]:
        """(stream, pinned staging as a tensor, the same as bytes)."""
        common = self._common
        dtype = getattr(torch, common.layout.dtype)
        staging = torch.empty((common.batch, *common.dense_shape), dtype=dtype, pin_memory=True)
        return torch.cuda.Stream(device=common.kv.device), staging, staging.view(torch.uint8).numpy()

    def save(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], blocks: Sequence[int]
    ) -> list[list[int]]:
        common, (stream, staging, staged) = self._common, self._save
        target, sums = common.slots_of(slab), []
        stream.wait_stream(
            torch.cuda.current_stream(common.kv.device)
        )  # the step's forward writes these blocks
        for batch in common.batches(len(blocks)):
            with torch.cuda.stream(stream):
                self._gather([blocks[i] for i in batch], staging[: len(batch)])
            stream.synchronize()
            some = [slots[i] for i in batch]
            for run in runs(some, range(len(some))):
                np.copyto(target.of(some, run), staged[run.start : run.stop])
            sums += [self._sums(slab, keys[i], slots[i], staged[n]) for n, i in enumerate(batch)]
        return sums

    def _gather(self, blocks: list[int], into: torch.Tensor) -> None:
        index = (
            torch.tensor(blocks, dtype=torch.int64).pin_memory().to(self._common.kv.device, non_blocking=True)
        )
        for layers, piece in self._common.kv.pieces:
            dense = piece.index_select(1, index).permute(1, 2, 0, 3, 4).contiguous()
            into[:, :, layers].copy_(dense, non_blocking=True)

    def _sums(self, slab: MappedSlab, key: bytes, slot: int, dense: Bytes) -> list[int]:
        binding, sums = slab.binding(key, slot), []
        for head in range(self._common.kv.heads):
            hasher = HeadHasher(binding, self._common.head_start + head)
            hasher.update(dense[head].reshape(-1).data)
            sums.append(hasher.value())
        return sums

    def load(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        blocks: Sequence[int],
        in_time: Callable[[], bool],
    ) -> list[str]:
        common, (stream, staging, staged) = self._common, self._load
        outcomes = [LATE] * len(blocks)
        # A step launched before this load may still write KV blocks that were given to us meanwhile.
        torch.cuda.synchronize(common.kv.device)
        for batch in common.batches(len(blocks)):
            if not in_time():
                break
            good = common.checked(slab, keys, locations, staged, batch)
            for i in batch:
                outcomes[i] = GOOD if i in good else MISMATCH
            try:
                with torch.cuda.stream(stream):
                    for i in good:
                        device = staging[i - batch.start].to(common.kv.device, non_blocking=True)
                        for layers, piece in common.kv.pieces:
                            piece[:, blocks[i]].copy_(device[:, layers].transpose(0, 1))
            finally:
                stream.synchronize()  # staging is used again, and release means that nothing is in flight
        return outcomes


def mover_for(kv: KVBlocks, layout: KVLayout, head_start: int) -> Mover:
    """Raises `NotImplementedError` for a device that nobody has written a mover for."""
    if kv.device.type == "cpu":
        return CpuMover(kv, layout, head_start)
    if kv.device.type == "cuda":
        return CudaMover(kv, layout, head_start)
    raise NotImplementedError(
        f"KV tensors on {kv.device.type!r}: InterlockConnector moves blocks of cpu and cuda devices"
    )
