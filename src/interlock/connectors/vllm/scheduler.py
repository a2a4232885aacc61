"""The scheduler's half: which blocks a request may take from the store, and which blocks a step gives to it.

It runs inside vLLM's scheduler, between two steps, so a store call waits a few milliseconds at most and is a miss
otherwise. The rules (hazards W2, W4, F7; tair §2.8):

* A request is looked up **once**. vLLM asks again every step while the request waits or was preempted; the first answer
  is repeated, without side effects. "Ask me later" is said only while the store itself says that blocks are on their way
  from its disk, and for a second of a request's life at most: with the store away requests are computed, not starved.
* Loads always take vLLM's asynchronous path: nothing is computed from a block before every rank has checked it.
* A block whose load failed is burned for that request's life and withdrawn from the index, or the same hit would fail for
  ever. The request saves nothing any more.
* Saved are blocks that this very step completes or that the request still holds, all of whose tokens are known and
  computed by this step. Never allocated, speculative or preempted ones.
* A change of weights is told by `reset_cache` (vLLM calls it when it drops caches): requests alive then neither read nor
  save any more, since their blocks may mix two versions. Nothing that is shared is deleted. Later requests are named anew, by a
  word that no other engine has, unless their `cache_salt` names the weights: blocks of the old ones must not be hit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from interlock.connectors.vllm.config import EngineShape
from interlock.connectors.vllm.keys import Salts
from interlock.connectors.vllm.metadata import LoadTask, RankNews, SaveTask, StepTasks
from interlock.core.limits import BLOCKS_PER_CALL_MAX, REQUESTS_TRACKED_MAX
from interlock.host.threads import monotonic_s
from interlock.store.client import MatchResult, StoreClient
from interlock.store.keys import KeyChain
from interlock.store.told_tokens import pack_tokens
from interlock.store.waiting import ComingWait


class Answer(msgspec.Struct, frozen=True):
    """What the store said of a request: its blocks from `first` on can be read at `found.locations`."""

    first: int
    found: MatchResult

    def slice(self, first: int, stop: int) -> MatchResult:
        return MatchResult(self.found.slab, self.found.locations[first - self.first : stop - self.first])

    @property
    def stop(self) -> int:
        return self.first + len(self.found.locations)


class Tracked:
    """What the connector remembers of one live request."""

    def __init__(self, request: Any, chain: KeyChain) -> None:
        self.request = request
        self.chain = chain
        self.answer: Answer | None = None
        self.waits = ComingWait()
        self.preemptions = 0
        self.offered = 0
        """First block of what was offered last; vLLM allocates for exactly that."""
        self.burned: set[int] = set()
        self.reads = True
        # vLLM's own way of saying something about one request to its connector.
        self.saves = not (getattr(request, "kv_transfer_params", None) or {}).get("no_store", False)
        self.saved = 0
        """Blocks before this one are stored, or were handed over to be."""
        self.asked = 0
        """Blocks that were full when a save was last tried: a refusal is tried again when another one is."""


class PendingLoad:
    """A load that ranks have not all reported yet."""

    def __init__(self, task: LoadTask, first: int) -> None:
        self.task = task
        self.first = first
        """The request's block that the task begins with."""
        self.failed: set[int] = set()
        """Indices into the task, the union over all ranks."""
        self.mismatched: set[int] = set()


class SchedulerSide:
    """One engine's scheduler. All calls come from vLLM's scheduler, one at a time."""

    def __init__(
        self, shape: EngineShape, salts: Salts, client: StoreClient, *, weights_in_salt: bool = False
    ) -> None:
        self._weights_in_salt = weights_in_salt
        self._weights = ""
        """What tells its weights from those it was started with; empty: they are those."""
        self._block_tokens = shape.layout.block_tokens
        self._salts = salts
        self.client = client
        self._requests: dict[str, Tracked] = {}
        self._loads: dict[str, PendingLoad] = {}
        self._new_loads: list[LoadTask] = []
        self._attempts = 0
        self._sessions = 0
        self.counts: Counter[str] = Counter()

    # --- requests ------------------------------------------------------------------------------------------------

    def track(self, request: Any) -> None:
        """A request was added. One whose KV has no exact name is not tracked, hence neither read nor saved."""
        if len(self._requests) >= REQUESTS_TRACKED_MAX:
            self.counts["untracked_full"] += 1
            return
        salt = self._salts.of(request, self._weights)
        if salt is None:
            self.counts["untracked_unnamed"] += 1
            return
        self._requests[request.request_id] = Tracked(request, KeyChain(salt, self._block_tokens))

    def forget(self, request_id: str) -> None:
        """The request ended. A load of it goes on being watched until the ranks have reported it."""
        self._requests.pop(request_id, None)

    def forget_lookups(self) -> None:
        """Caches were dropped, perhaps for new weights: whoever is alive now neither reads nor saves any more, and whoever comes
        finds nothing that was saved before."""
        if not self._weights_in_salt:
            self._weights = os.urandom(16).hex()
        for tracked in self._requests.values():
            tracked.answer = None
            tracked.reads = tracked.saves = False

    # --- reads ---------------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Any, computed_tokens: int) -> int | None:
        """Tokens after `computed_tokens` that can be loaded: whole blocks, at least one token left to compute.

        None: more are on their way from the store's disk; ask again, for `PROMOTION_WAIT_SECONDS_MAX` at most.
        """
        tracked = self._requests.get(request.request_id)
        if tracked is None or not tracked.reads or request.skip_reading_prefix_cache:
            return 0
        first = computed_tokens // self._block_tokens
        stop = min((request.num_tokens - 1) // self._block_tokens, first + BLOCKS_PER_CALL_MAX)
        stop = min([stop, *(block for block in tracked.burned if block >= first)])
        if stop <= first:
            return 0
        answer = self._answer(tracked, first, stop)
        if answer is None:
            return None
        tracked.offered = first
        return max(0, min(stop, answer.stop) - first) * self._block_tokens

    def _answer(self, tracked: Tracked, first: int, stop: int) -> Answer | None:
        """The remembered answer; asked for once, and anew only for another question (preempted, blocks lost locally).

        None while blocks come up from disk and the request may still wait for them.
        """
        answer, request = tracked.answer, tracked.request
        if answer is None or tracked.preemptions != request.num_preemptions or first < answer.first:
            if tracked.waits.too_early(monotonic_s()):
                return None
            keys = tracked.chain.upto(stop, request.all_token_ids)[first:stop]
            found = self.client.match(keys)
            if found is not None and found.coming and tracked.waits.may_wait(monotonic_s()):
                self.counts["asked_again"] += 1
                return None
            self.counts["asked_blocks"] += len(keys)
            self.counts["lookup_unanswered"] += found is None
            tracked.answer = answer = Answer(first, found or MatchResult(0, []))
            tracked.preemptions = request.num_preemptions
            if found is not None:
                tracked.saved = max(tracked.saved, answer.stop if tracked.saved >= first else 0)
        return answer

    def allocated(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        """vLLM has allocated blocks. With external tokens a load begins; without, the request runs from here on."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        answer, tracked.answer = tracked.answer, None
        if external_tokens == 0:
            return
        first = tracked.offered
        stop = first + external_tokens // self._block_tokens
        assert answer is not None, "vLLM loads what it was offered"
        assert stop <= answer.stop, "vLLM loads no more than it was offered"
        assert request.request_id not in self._loads, "one load of a request at a time"
        self._attempts += 1
        task = LoadTask(
            request=request.request_id,
            attempt=self._attempts,
            keys=tracked.chain.keys[first:stop],
            source=answer.slice(first, stop),
            block_ids=block_ids[first:stop],
        )
        self._loads[request.request_id] = PendingLoad(task, first)
        self._new_loads.append(task)
        self.counts["loads"] += 1
        self.counts["load_blocks"] += stop - first

    @property
    def loading(self) -> bool:
        """Whether any rank may still touch KV blocks for a load."""
        return bool(self._loads)

    def heard(self, released: Iterable[str], failed_blocks: set[int], news: RankNews | None) -> None:
        """What the ranks said after a step. `released`: loads that *all* ranks have reported."""
        if news is not None:
            self.counts += news.counts
        if failed_blocks or (news is not None and news.mismatched):
            by_attempt = {pending.task.attempt: pending for pending in self._loads.values()}
            for pending in by_attempt.values():
                ids = pending.task.block_ids
                pending.failed |= {i for i, block in enumerate(ids) if block in failed_blocks}
            for attempt, index in news.mismatched if news is not None else ():
                if attempt in by_attempt:
                    by_attempt[attempt].mismatched.add(index)
        for request_id in released:
            pending_load = self._loads.pop(request_id, None)
            if pending_load is not None:
                self._end_load(pending_load)

    def _end_load(self, pending: PendingLoad) -> None:
        task = pending.task
        self.counts["loaded_blocks"] += len(task.block_ids) - len(pending.failed)
        if not pending.failed:
            return
        self.counts["failed_loads"] += 1
        self.counts["failed_blocks"] += len(pending.failed)
        tracked = self._requests.get(task.request)
        if tracked is not None:
            tracked.burned |= {pending.first + i for i in pending.failed}
            tracked.saves = False
        bad = sorted(pending.mismatched)
        if bad:
            slots = [task.source.locations[i].slot for i in bad]
            self.client.withdraw(task.source.slab, [task.keys[i] for i in bad], slots)

    # --- writes --------------------------------------------------------------------------------------------------

    def step(self, output: Any) -> StepTasks:
        """The work that goes with one step. `output` is vLLM's SchedulerOutput."""
        loads, self._new_loads = self._new_loads, []
        saves = self._saves(output)
        return StepTasks(loads, saves, idle=output.total_num_scheduled_tokens == 0)

    def _saves(self, output: Any) -> list[SaveTask]:
        """One write session for all that this step completes; nothing when the store refuses or is late."""
        candidates = self._completed(output)
        if not candidates:
            return []
        wanted: dict[
            bytes, tuple[bytes, int]
        ] = {}  # by key: two requests may complete one prefix in one step
        for tracked, first, full, block_ids in candidates:
            tracked.asked = full
            for block in range(first, full):
                wanted.setdefault(tracked.chain.keys[block], (tracked.chain.parent(block), block_ids[block]))
        keys = list(wanted)
        parents, blocks = [parent for parent, _ in wanted.values()], [block for _, block in wanted.values()]
        tokens = self._tokens_of(keys, candidates) if self.client.wants_tokens else []
        self._sessions += 1
        grant = self.client.start_write(f"save-{self._sessions}", 1, keys, parents, tokens=tokens)
        if grant is None:
            self.counts["save_refused"] += 1
            return []
        for tracked, _, full, _ in candidates:
            tracked.saved = full
        if not grant.grants:
            return []
        self.counts["save_blocks"] += len(grant.grants)
        chosen = [given.index for given in grant.grants]
        return [SaveTask(grant, [keys[i] for i in chosen], [blocks[i] for i in chosen])]

    def _tokens_of(
        self, keys: list[bytes], candidates: list[tuple[Tracked, int, int, list[int]]]
    ) -> list[bytes]:
        """The tokens of each block, for a store that publishes them."""
        size, found = self._block_tokens, dict[bytes, bytes]()
        for tracked, first, full, _ in candidates:
            ids = list(tracked.request.all_token_ids[first * size : full * size])
            for block in range(first, full):
                at = (block - first) * size
                found[tracked.chain.keys[block]] = pack_tokens(ids[at : at + size])
        return [found[key] for key in keys]

    def _completed(self, output: Any) -> list[tuple[Tracked, int, int, list[int]]]:
        """(request, first, stop, its block ids): blocks not saved yet whose tokens are all known and computed by this step.

        `num_computed_tokens` still stands before this step. Known tokens are those in `all_token_ids`: with
        asynchronous scheduling a step also computes a token that is sampled only then, which does not count.
        """
        found, room = [], BLOCKS_PER_CALL_MAX
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None or not tracked.saves:
                continue
            request = tracked.request
            full = min(request.num_computed_tokens + scheduled, request.num_tokens) // self._block_tokens
            if full <= max(tracked.saved, tracked.asked):
                continue
            full = min(full, tracked.saved + room)  # the rest comes with a later step
            if full <= tracked.saved:
                continue
            room -= full - tracked.saved
            tracked.chain.upto(full, request.all_token_ids)
            block_ids = output.kv_connector_block_state.get_block_ids(request_id)[0]
            found.append((tracked, tracked.saved, full, block_ids))
        return found

    def close(self) -> None:
        """Ends the connection to the store."""
        self.client.close()
