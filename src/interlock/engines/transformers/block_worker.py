"""One rank's copies between its caches and the store's slots.

What is saved is read from the KV tensors once, inside `save`, into memory of this rank's own; what is loaded is copied to
memory of its own, checked there, and only then becomes a cache (`store/rank_slots`). Nothing raises into the engine: a save
that fails is reported bad, a load that fails is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec
import torch

from interlock.core.layouts import EMPTY_SHARD, heads_of_rank, shard_of_rank
from interlock.core.limits import LOAD_SECONDS_MAX
from interlock.engines.transformers.hooks import KVView
from interlock.engines.transformers.sharing import LoadOrder, SaveOrder, StoreAccess
from interlock.host.threads import monotonic_s
from interlock.store.client import StoreClient
from interlock.store.mapping import MappedSlab
from interlock.store.rank_slots import Bytes, RankSlots, runs, tokens_of

_log = logging.getLogger(__name__)
_save_orders = msgspec.msgpack.Decoder(SaveOrder)
_load_orders = msgspec.msgpack.Decoder(LoadOrder)

KV = tuple[torch.Tensor, torch.Tensor]


class StoreWorker:
    """`hooks.BlockWorker` of one rank. All calls come from the thread that computes."""

    def __init__(
        self,
        access: StoreAccess,
        rank: int,
        *,
        client: StoreClient | None = None,
        clock: Callable[[], float] = monotonic_s,
    ) -> None:
        layout = access.layout
        self._rank, self._clock, self._layout = rank, clock, layout
        self._size = layout.content // 2
        self._dtype = getattr(torch, layout.dtype)
        shard = shard_of_rank(rank, access.ranks, layers=layout.layers, heads=layout.heads)
        self._writes = shard != EMPTY_SHARD
        self._slots = RankSlots(layout, *heads_of_rank(rank, access.ranks, layout.heads))
        self._staging: Bytes | None = None
        self._arrivals: Bytes | None = None
        self._client = client if client is not None else access.client(rank)
        self._client.start()

    # --- saving --------------------------------------------------------------------------------------------------

    def save(self, orders: bytes, views: dict[str, KVView]) -> None:
        order = _save_orders.decode(orders)
        if not self._writes:  # a lower rank holds the same heads and writes them
            self._client.report(order.grant, self._rank, [], [])
            return
        count = len(order.blocks)
        good, sums = [False] * count, [[] for _ in range(count)]  # type: list[bool], list[list[int]]
        try:
            slab = self._client.slab_of(order.grant.slab)
            view = views.get(order.key)
            if slab is None or slab.node_incarnation != order.grant.node_incarnation or view is None:
                return
            sums = self._copy_out(slab, order, view)
            good = [True] * count
        except Exception:
            _log.exception("rank %d could not save %d blocks; they are reported bad", self._rank, count)
            good, sums = [False] * count, [[] for _ in range(count)]
        finally:
            # Sent by the code that copied: from here on this rank does not touch these slots.
            self._client.report(order.grant, self._rank, good, sums)

    def _copy_out(self, slab: MappedSlab, order: SaveOrder, view: KVView) -> list[list[int]]:
        if self._staging is None:
            self._staging = self._slots.staging()
        sums: list[list[int]] = []
        slots = [grant.slot for grant in order.grant.grants]
        for batch in self._slots.batches(len(order.blocks)):
            self._gather(view, order.blocks[batch.start : batch.stop], self._tensor(self._staging))
            sums += self._slots.put(
                slab,
                order.keys[batch.start : batch.stop],
                slots[batch.start : batch.stop],
                self._staging[: len(batch)],
            )
        return sums

    def _tensor(self, whole: Bytes) -> torch.Tensor:
        """`[block, head, layer, byte]` as `[block, head, layer, token, K‖V]`, the same memory."""
        return torch.from_numpy(tokens_of(whole, self._layout)).view(self._dtype)

    def _gather(self, view: KVView, blocks: Sequence[int], staging: torch.Tensor) -> None:
        """Fills `staging[:len(blocks)]`; consecutive blocks in one copy a layer."""
        size, tokens = self._size, self._layout.block_tokens
        for start, stop in _consecutive(blocks):
            first, last = blocks[start] * tokens, (blocks[stop - 1] + 1) * tokens
            for index, layer in enumerate(view.layers):
                keys, values = view.read(layer, first, last)
                into = staging[start:stop, :, index]
                into[..., :size].copy_(self._by_block(keys))
                into[..., size:].copy_(self._by_block(values))

    def _by_block(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[heads, n * block_tokens, size]` as `[n, heads, block_tokens, size]`."""
        heads, tokens, size = tensor.shape
        block = self._layout.block_tokens
        return tensor.reshape(heads, tokens // block, block, size).transpose(0, 1)

    # --- loading -------------------------------------------------------------------------------------------------

    def load(self, orders: bytes, blocks: int) -> tuple[int, list[KV]]:
        try:
            return self._load(_load_orders.decode(orders), blocks)
        except Exception:
            _log.exception("rank %d could not load a prefix; it is computed", self._rank)
            return 0, []

    def _load(self, order: LoadOrder, blocks: int) -> tuple[int, list[KV]]:
        slab = self._client.slab_of(order.found.slab)
        if slab is None:
            return 0, []
        if self._arrivals is None:
            self._arrivals = self._slots.arrivals()
        layout, locations = self._layout, order.found.locations
        count = min(blocks, len(order.keys))
        shape = (layout.layers, 2, self._slots.heads, count, layout.block_tokens, self._size)
        whole = torch.empty(shape, dtype=self._dtype)
        good, deadline_s = 0, self._clock() + LOAD_SECONDS_MAX
        for batch in self._slots.batches(count):
            if self._clock() >= deadline_s:
                break
            part, found = self._slots.fetch(slab, order.keys, locations, self._arrivals, batch)
            bad = sorted(set(batch) - set(found))
            self._withdraw(order, bad)
            good = bad[0] if bad else batch.stop
            right = good - batch.start
            self._scatter(self._tensor(part[:right]), whole[:, :, :, batch.start : good])
            if bad:
                break
        return good, self._as_caches(whole[:, :, :, :good]) if good else []

    def _withdraw(self, order: LoadOrder, bad: Sequence[int]) -> None:
        """Else the same hit would fail for ever."""
        if bad:
            locations = order.found.locations
            keys, slots = [order.keys[i] for i in bad], [locations[i].slot for i in bad]
            self._client.withdraw(order.found.slab, keys, slots)

    def _scatter(self, arrived: torch.Tensor, into: torch.Tensor) -> None:
        """`[block, head, layer, token, K‖V]` to `[layer, K or V, head, block, token, size]`."""
        by_layer = arrived.permute(2, 1, 0, 3, 4)
        into[:, 0].copy_(by_layer[..., : self._size])
        into[:, 1].copy_(by_layer[..., self._size :])

    def _as_caches(self, whole: torch.Tensor) -> list[KV]:
        flat = whole.reshape(self._layout.layers, 2, 1, self._slots.heads, -1, self._size)
        return [(layer[0].contiguous(), layer[1].contiguous()) for layer in flat]

    def close(self) -> None:
        self._client.close()


def _consecutive(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Positions [start, stop) at which block follows block."""
    found = []
    for run in runs(blocks, range(len(blocks))):
        if run.slot_step == 1:
            found.append((run.start, run.stop))
        else:
            found += [(i, i + 1) for i in range(run.start, run.stop)]
    return found
