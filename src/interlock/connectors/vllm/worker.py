"""The worker's half: one rank's copies between its KV tensors and the store's slots.

Source fence. This rank reads a KV block of the engine only inside `save`, which vLLM calls after the forward of the very
step that completed the block, and the copy is finished when it returns: vLLM cannot have given the block to another
request yet. So nothing is ever pending when a request is preempted, aborted or finished (hazards W2).

Nothing raises into the engine. A save that fails is reported bad, a load that fails is recomputed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from interlock.connectors.vllm.config import EngineShape
from interlock.connectors.vllm.loader import Loader
from interlock.connectors.vllm.metadata import LoadTask, RankNews, SaveTask
from interlock.connectors.vllm.movers import GOOD, LATE, MISMATCH, Mover, mover_for
from interlock.connectors.vllm.tensors import KVBlocks
from interlock.core.layouts import EMPTY_SHARD
from interlock.core.limits import CHILD_GRACE_SECONDS, IDLE_STEP_SECONDS_MAX
from interlock.store.client import StoreClient

_log = logging.getLogger(__name__)

MakeMover = Callable[[KVBlocks, Any, int], Mover]


class WorkerSide:
    """One rank. All calls come from vLLM's worker thread."""

    def __init__(
        self, shape: EngineShape, rank: int, client: StoreClient, *, make_mover: MakeMover = mover_for
    ) -> None:
        self.client = client
        self._shape, self._rank = shape, rank
        self._writes = shape.shard(rank) != EMPTY_SHARD
        self._make_mover = make_mover
        self._mover: Mover | None = None
        self._loader: Loader | None = None
        self._failed_blocks: set[int] = set()
        self._mismatched: set[tuple[int, int]] = set()
        self._counts: Counter[str] = Counter()

    def register(self, tensors: Mapping[str, Any]) -> None:
        """Takes vLLM's KV tensors by layer name. Raises `UnknownTensorsError`, at start-up, where nothing is lost by it."""
        distinct = {tensor.data_ptr(): tensor for _, tensor in sorted(tensors.items(), key=_layer_order)}
        start, stop = self._shape.heads_of(self._rank)
        kv = KVBlocks(list(distinct.values()), self._shape.layout, stop - start)
        self._mover = self._make_mover(kv, self._shape.layout, start)
        self._loader = Loader(self._mover, self.client.slab_of)
        self.client.start()

    def start_loads(self, tasks: Sequence[LoadTask]) -> None:
        assert self._loader is not None, "vLLM registers KV tensors before its first step"
        for task in tasks:
            self._loader.submit(task)

    def save(self, tasks: Sequence[SaveTask]) -> None:
        """Copies and reports each task. On return no KV block is read any more."""
        for task in tasks:
            self._save(task)

    def _save(self, task: SaveTask) -> None:
        if not self._writes:  # a lower rank holds the same heads and writes them
            self.client.report(task.grant, self._rank, [], [])
            return
        count = len(task.block_ids)
        good, sums = [False] * count, [[] for _ in range(count)]  # type: list[bool], list[list[int]]
        try:
            slab = self.client.slab_of(task.grant.slab)
            if slab is None or slab.node_incarnation != task.grant.node_incarnation:
                self._counts["save_slab_gone"] += count
                return
            assert self._mover is not None
            slots = [grant.slot for grant in task.grant.grants]
            sums = self._mover.save(slab, task.keys, slots, task.block_ids)
            good = [True] * count
            self._counts["saved_blocks"] += count
        except Exception:
            _log.exception("rank %d could not save %d blocks; they are reported bad", self._rank, count)
            good, sums = [False] * count, [[] for _ in range(count)]
            self._counts["save_error"] += 1
        finally:
            # Sent by the code that copied: from here on this rank does not touch these slots.
            self.client.report(task.grant, self._rank, good, sums)

    def take_released(self, *, idle: bool) -> set[str]:
        """Requests whose load is released on this rank, each load once. `idle`: wait a little rather than poll."""
        if self._loader is None:
            return set()
        released = set()
        for loaded in self._loader.take(IDLE_STEP_SECONDS_MAX if idle else 0.0):
            self._failed_blocks |= loaded.failed_blocks
            self._mismatched |= loaded.mismatched
            if loaded.why:
                self._counts[loaded.why] += 1
            for outcome in (GOOD, MISMATCH, LATE):
                self._counts[f"loaded_{outcome}_blocks"] += loaded.outcomes.count(outcome)
            released.add(loaded.task.request)
        return released

    def take_failed_blocks(self) -> set[int]:
        """KV blocks that were not loaded; told in the same step as the release of their load."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_news(self) -> RankNews | None:
        self._counts = +self._counts  # without zeros
        if not self._counts and not self._mismatched:
            return None
        news = RankNews(self._mismatched, self._counts)
        self._mismatched, self._counts = set(), Counter()
        return news

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close(CHILD_GRACE_SECONDS)
        self.client.close()


def _layer_order(item: tuple[str, Any]) -> tuple[list[int], str]:
    """By the layer's number in its name, "model.layers.10.self_attn.attn" after ".9."."""
    name = item[0]
    return [int(part) for part in name.split(".") if part.isdigit()], name
