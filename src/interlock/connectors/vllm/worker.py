"""The worker's half: one rank's copies between its KV tensors and the store's slots.

Source fence. This rank reads a KV block of the engine only inside `save`, which vLLM calls after the forward of the very
step that completed the block, and the copy out of the KV tensor is finished when it returns: vLLM cannot have given the
block to another request yet. So no block is still to be read when a request is preempted, aborted or finished (hazards
W2). What was read is summed up and stored by another thread, which then reports (`saver`).

Nothing raises into the engine. A save that fails is reported bad, a load that fails is recomputed.
"""

from __future__ import annotations

import logging
import queue
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from interlock.connectors.vllm.config import EngineShape
from interlock.connectors.vllm.loader import Loader
from interlock.connectors.vllm.metadata import LoadTask, RankNews, SaveTask
from interlock.connectors.vllm.movers import Mover, mover_for
from interlock.connectors.vllm.saver import Saver
from interlock.connectors.vllm.tensors import KVBlocks, UnknownTensorsError
from interlock.core.limits import CHILD_GRACE_SECONDS, IDLE_STEP_SECONDS_MAX
from interlock.store.client import StoreClient, WriteGrant
from interlock.store.rank_slots import FOREIGN, GOOD, LATE, MISMATCH

_log = logging.getLogger(__name__)

MakeMover = Callable[[KVBlocks, Any, int], Mover]


class WorkerSide:
    """One rank. All calls come from vLLM's worker thread."""

    def __init__(
        self, shape: EngineShape, rank: int, client: StoreClient, *, make_mover: MakeMover = mover_for
    ) -> None:
        self.client = client
        self._shape, self._rank = shape, rank
        self._writes = shape.writes(rank)
        self._make_mover = make_mover
        self._saver: Saver | None = None
        self._news: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._loader: Loader | None = None
        self._failed_blocks: set[int] = set()
        self._mismatched: set[tuple[int, int]] = set()
        self._counts: Counter[str] = Counter()

    def register(
        self, tensors: Mapping[str, Any], scales: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Takes vLLM's KV tensors, and the scales of quantised ones, by layer name.

        Raises `UnknownTensorsError`, at start-up, where nothing is lost by it.
        """
        names = sorted(tensors, key=_layer_order)
        distinct = {tensors[name].data_ptr(): name for name in reversed(names)}
        chosen = [name for name in names if distinct[tensors[name].data_ptr()] == name]
        layout, stage = self._shape.layout, self._shape.stage_of(self._rank)
        _check_stage(chosen, stage, layout.layers)
        start, stop = self._shape.heads_of(self._rank)
        kv = KVBlocks(
            [tensors[name] for name in chosen],
            layout,
            stop - start,
            stage=stage,
            scales=[scales.get(name, ()) for name in chosen] if scales is not None else None,
        )
        mover = self._make_mover(kv, layout, start)
        self._saver = Saver(mover)
        self._loader = Loader(mover, self.client.slab_of)
        self.client.start()

    def start_loads(self, tasks: Sequence[LoadTask]) -> None:
        """Gives this step's loads to the loader's thread."""
        assert self._loader is not None, "vLLM registers KV tensors before its first step"
        for task in tasks:
            self._loader.submit(task)

    def save(self, tasks: Sequence[SaveTask]) -> None:
        """Copies each task's blocks; they are reported when stored. On return no KV block is read any more."""
        for task in tasks:
            self._save(task)

    def _save(self, task: SaveTask) -> None:
        if not self._writes:  # a lower rank holds the same heads and writes them
            self.client.report(task.grant, self._rank, [], [])
            return
        count = len(task.block_ids)
        slab = self.client.slab_of(task.grant.slab)
        if slab is None or slab.node_incarnation != task.grant.node_incarnation:
            self._counts["save_slab_gone"] += count
            self.client.report(task.grant, self._rank, [False] * count, [[] for _ in range(count)])
            return
        assert self._saver is not None, "vLLM registers KV tensors before its first step"
        slots = [grant.slot for grant in task.grant.grants]
        self._saver.save(
            slab,
            task.keys,
            slots,
            task.block_ids,
            lambda good, sums: self._saved(task.grant, good, sums),
        )

    def _saved(self, grant: WriteGrant, good: list[bool], sums: list[list[int]]) -> None:
        """By the thread that copied last: from here on this rank does not touch these slots."""
        stored = good.count(True)
        self._news.put(("saved_blocks", stored))
        if stored < len(good):
            self._news.put(("save_error", 1))
        self.client.report(grant, self._rank, good, sums)

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
            for outcome in (GOOD, MISMATCH, LATE, FOREIGN):
                self._counts[f"loaded_{outcome}_blocks"] += loaded.outcomes.count(outcome)
            released.add(loaded.task.request)
        return released

    def take_failed_blocks(self) -> set[int]:
        """KV blocks that were not loaded; told in the same step as the release of their load."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_news(self) -> RankNews | None:
        """What became of loads since the last time; told once."""
        while not self._news.empty():
            name, count = self._news.get_nowait()
            self._counts[name] += count
        if self._saver is not None:
            self._counts["saved_inline_batches"] += self._saver.inline_batches
            self._saver.inline_batches = 0
        self._counts = +self._counts  # without zeros
        if not self._counts and not self._mismatched:
            return None
        news = RankNews(self._mismatched, self._counts)
        self._mismatched, self._counts = set(), Counter()
        return news

    def close(self) -> None:
        """Finishes saves that were copied, ends threads and the connection."""
        if self._saver is not None:
            self._saver.close(CHILD_GRACE_SECONDS)
        if self._loader is not None:
            self._loader.close(CHILD_GRACE_SECONDS)
        self.client.close()


def _layer_order(name: str) -> tuple[list[int], str]:
    """By the layer's number in its name, "model.layers.10.self_attn.attn" after ".9."."""
    return [int(part) for part in name.split(".") if part.isdigit()], name


def _check_stage(names: Sequence[str], stage: tuple[int, int], layers: int) -> None:
    """Whether a pipeline stage's tensors are those of its layers, as far as names tell. Raises `UnknownTensorsError`."""
    numbers = [number for number in (_number(name) for name in names) if number is not None]
    if stage != (0, layers) and numbers != list(range(*stage)):
        raise UnknownTensorsError(
            f"this pipeline stage should have layers {stage[0]} to {stage[1]}, and vLLM registered {numbers}: models "
            "whose layers do not all keep KV are shared without pipeline parallelism only"
        )


def _number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
