"""Moving KV blocks between a rank's tensors and the slab: one small class per kind of device.

A save has two halves. `gather` reads the KV tensors, into staging of our own, and runs in the model's thread inside the hook;
summing up and filling the slots (`put`) needs no KV tensor any more and runs anywhere (`saver`). A load is checked in memory
of our own before a KV tensor is touched (store/rank_slots). A mover decides nothing: which blocks, into which slots, and when
it must not touch them any more is its caller's business.

The CPU's mover uses NumPy, not torch: torch would start a second team of compute threads for the loader's thread, which
fights the model's own for the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from interlock.connectors.vllm.packing import Order, elements, to_canonical, to_packed
from interlock.connectors.vllm.tensors import KVBlocks
from interlock.core.layouts import KVLayout
from interlock.store.mapping import MappedSlab
from interlock.store.rank_slots import (
    FOREIGN,
    GOOD,
    LATE,
    MISMATCH,
    Bytes,
    RankSlots,
    runs,
    scales_of,
    tokens_of,
)
from interlock.wire.locations import Location


class Staging(msgspec.Struct, eq=False):
    """Memory for one batch of a save. `staged`: `[block, head, layer, byte]`; `settle` returns when it is all there."""

    staged: Bytes
    settle: Callable[[], None]
    device: Any = None
    """The device's own part of it, where the device has memory of its own."""


class Mover(Protocol):
    """What moves one rank's KV blocks, on one kind of device."""

    def batches(self, count: int) -> list[range]:
        """`count` blocks in parts that fit into one staging each."""
        ...

    def staging(self) -> Staging:
        """New memory for one batch of a save."""
        ...

    def gather(self, blocks: Sequence[int], staging: Staging) -> None:
        """Copies KV blocks to `staging`. After it the model may write to them again: nothing reads them out of order."""
        ...

    def put(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], staging: Staging
    ) -> list[list[int]]:
        """Fills slots from what was gathered; per block the checksums of the parts held. Any thread; all done on return."""
        ...

    def load(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        blocks: Sequence[int],
        in_time: Callable[[], bool],
    ) -> list[str]:
        """Copies slots into KV blocks, each checked before; one of GOOD, MISMATCH, FOREIGN, LATE per block.

        All done on return: nothing touches the KV tensor afterwards. `in_time` is asked before each batch.
        """
        ...


class _HostMover:
    """What both kinds have in common: everything between host memory and the slab."""

    def __init__(self, kv: KVBlocks, layout: KVLayout, head_start: int) -> None:
        self._slots = RankSlots(layout, head_start, head_start + kv.heads, layers=kv.layers)
        self._layout = layout
        self._scales = kv.scale_bytes()
        self.batches = self._slots.batches

    def put(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], staging: Staging
    ) -> list[list[int]]:
        staging.settle()
        staged = staging.staged[: len(slots)]
        if self._scales is not None:
            scales_of(staged, self._layout)[:] = self._scales
        return self._slots.put(slab, keys, slots, staged)

    def _judged(self, batch: range, part: Bytes, good: Sequence[int], outcomes: list[str]) -> list[int]:
        """Those of `good` that this engine can use; the others' outcomes are set."""
        for i in batch:
            outcomes[i] = MISMATCH
        if self._scales is None:
            return list(good)
        scales = scales_of(part, self._layout)
        usable = [i for i in good if np.array_equal(scales[i - batch.start], self._scales)]
        for i in set(good) - set(usable):
            outcomes[i] = FOREIGN  # the same bytes would be other values here; the block is right for others
        return usable


class CpuMover(_HostMover):
    """KV tensors in host memory."""

    def __init__(self, kv: KVBlocks, layout: KVLayout, head_start: int, order: Order | None = None) -> None:
        """`order`: how vLLM's kernels permute a block's elements here (`packing`)."""
        super().__init__(kv, layout, head_start)
        self._pieces = kv.byte_pieces()
        self._arrivals: Bytes | None = None
        self._order = order

    def put(
        self, slab: MappedSlab, keys: Sequence[bytes], slots: Sequence[int], staging: Staging
    ) -> list[list[int]]:
        if self._order is not None:
            to_canonical(elements(staging.staged[: len(slots)], self._layout), self._order)
        return super().put(slab, keys, slots, staging)

    def staging(self) -> Staging:
        return Staging(self._slots.staging(), _settled)

    def gather(self, blocks: Sequence[int], staging: Staging) -> None:
        dense = tokens_of(staging.staged, self._layout)
        for run in runs(range(len(blocks)), blocks):
            chosen = run.chosen(blocks[run.start])
            for layers, piece in self._pieces:
                np.copyto(dense[run.start : run.stop, :, layers], piece[:, chosen].transpose(1, 2, 0, 3, 4))

    def load(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        blocks: Sequence[int],
        in_time: Callable[[], bool],
    ) -> list[str]:
        outcomes = [LATE] * len(blocks)
        if self._arrivals is None:  # made at the first load: an engine that never hits pays nothing
            self._arrivals = self._slots.arrivals()
        for batch in self.batches(len(blocks)):
            if not in_time():
                break
            part, believed = self._slots.fetch(slab, keys, locations, self._arrivals, batch)
            good = self._judged(batch, part, believed, outcomes)
            if self._order is not None:
                to_packed(elements(part, self._layout), self._order)
            dense = tokens_of(part, self._layout)
            places = [i - batch.start for i in good]
            targets = [blocks[i] for i in good]
            for run in runs(places, targets):
                source = dense[places[run.start] : places[run.stop - 1] + 1 : run.slot_step]
                chosen = run.chosen(targets[run.start])
                for layers, piece in self._pieces:
                    np.copyto(piece[:, chosen].transpose(1, 2, 0, 3, 4), source[:, :, layers])
            for i in good:
                outcomes[i] = GOOD
        return outcomes


def _settled() -> None:
    """What NumPy copied is there."""


class CudaMover(_HostMover):
    """KV tensors on a GPU: gathered on the device, moved by a stream of our own through pinned staging.

    Written against torch's documented streams and events; **it has not been run on a GPU in this project yet**. The model's
    thread waits for nothing: blocks are gathered on the device in a stream of ours, and the model's own stream is made to
    wait for that gathering before it runs anything later (the source fence, kept by the device); `put` waits for the bytes.
    A load waits for its last copy, so that on return nothing is in flight (release).
    """

    def __init__(self, kv: KVBlocks, layout: KVLayout, head_start: int) -> None:
        super().__init__(kv, layout, head_start)
        self._kv = kv
        self._dtype = getattr(torch, layout.dtype)
        self._saving, self._loading = (torch.cuda.Stream(device=kv.device) for _ in range(2))
        self._arrivals: Bytes | None = None

    def staging(self) -> Staging:
        shape = self._slots.staging().shape
        pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        own = torch.empty(shape, dtype=torch.uint8, device=self._kv.device)
        event = torch.cuda.Event()
        return Staging(pinned.numpy(), event.synchronize, (pinned, own, event))

    def gather(self, blocks: Sequence[int], staging: Staging) -> None:
        pinned, own, event = staging.device
        count = len(blocks)
        model = torch.cuda.current_stream(self._kv.device)
        gathered = torch.cuda.Event()
        self._saving.wait_stream(model)  # the step's forward writes these blocks
        with torch.cuda.stream(self._saving):
            index = torch.tensor(blocks, dtype=torch.int64).pin_memory()
            index = index.to(self._kv.device, non_blocking=True)
            dense = self._tokens(own[:count])
            for layers, piece in self._kv.pieces:
                dense[:, :, layers].copy_(piece.index_select(1, index).permute(1, 2, 0, 3, 4))
            gathered.record(self._saving)
            pinned[:count].copy_(own[:count], non_blocking=True)
            event.record(self._saving)
        model.wait_event(gathered)

    def _tokens(self, whole: torch.Tensor) -> torch.Tensor:
        """Of `[block, head, layer, byte]` the tokens as elements, `[block, head, layer, token, content]`."""
        layout = self._layout
        elements = whole.view(self._dtype)
        n, head, layer, _ = elements.stride()
        shape = (*elements.shape[:3], layout.block_tokens, layout.content)
        return elements.as_strided(shape, (n, head, layer, layout.content, 1))

    def load(
        self,
        slab: MappedSlab,
        keys: Sequence[bytes],
        locations: Sequence[Location],
        blocks: Sequence[int],
        in_time: Callable[[], bool],
    ) -> list[str]:
        outcomes = [LATE] * len(blocks)
        if self._arrivals is None:
            size = len(self._slots.arrivals())
            self._arrivals = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        # A step launched before this load may still write KV blocks that were given to us meanwhile.
        torch.cuda.synchronize(self._kv.device)
        for batch in self.batches(len(blocks)):
            if not in_time():
                break
            part, believed = self._slots.fetch(slab, keys, locations, self._arrivals, batch)
            good = self._judged(batch, part, believed, outcomes)
            try:
                with torch.cuda.stream(self._loading):
                    for i in good:
                        # A stage's layers are a slice of what was read: only the copy is surely dense and pinned.
                        one = torch.from_numpy(np.ascontiguousarray(part[i - batch.start]))
                        dense = self._tokens(one.to(self._kv.device, non_blocking=True).unsqueeze(0))[0]
                        for layers, piece in self._kv.pieces:
                            piece[:, blocks[i]].copy_(dense[:, layers].transpose(0, 1))
            finally:
                self._loading.synchronize()  # memory is used again, and release means that nothing is in flight
            for i in good:
                outcomes[i] = GOOD
        return outcomes


def mover_for(kv: KVBlocks, layout: KVLayout, head_start: int, order: Order | None = None) -> Mover:
    """`order` as of `packing`; only the CPU's kernels have one. Raises `NotImplementedError` for a device that nobody has written a mover for."""
    if kv.device.type == "cpu":
        return CpuMover(kv, layout, head_start, order)
    if kv.device.type == "cuda":
        return CudaMover(kv, layout, head_start)
    raise NotImplementedError(
        f"KV tensors on {kv.device.type!r}: InterlockConnector moves blocks of cpu and cuda devices"
    )
