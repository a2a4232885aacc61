"""Who waits, who runs, and what the next step computes. Decides by counts alone and computes nothing.

Of each request one thing is known: its tokens (prompt and made ones) and how many of them are computed. What is left to
compute decides its phase: more than the last token is *prefill*, in chunks; the last token alone is *decode*. So a
request whose KV was lost, by preemption or by new weights, simply has more left to compute.

Memory: the batch stands right-aligned, so it costs rows times the longest. A newcomer waits until that fits; when growth
makes it too large, the request that came last gives its KV back and waits again. One request alone always fits: what
could not is refused when it comes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from typing import Any

import msgspec

from interlock.engines.base import Progress, RequestRejected, Work
from interlock.engines.transformers.hooks import BlockScheduler
from interlock.engines.transformers.plans import Chunk, Step
from interlock.engines.transformers.sampling import Sampler
from interlock.wire.engine_messages import TokenLogprobs
from interlock.wire.fleet_messages import Load as Busy

_log = logging.getLogger(__name__)


class Request:
    """One request: its tokens, and how far they are computed."""

    def __init__(self, work: Work, sampler: Sampler, order: int, output: Sequence[int] = ()) -> None:
        self.work, self.sampler, self.order = work, sampler, order
        self.known = [*work.prompt, *output]
        self.computed = 0
        self.cached_tokens = 0
        self.saved_blocks = 0
        self.mixed = False
        """Lived through a change of weights: its KV is not what its salt says, so it saves no block."""
        self.parked: tuple[int, list[bytes]] | None = None
        """How far it is computed and the caches of it, one a rank, that it came with and that no rank holds yet."""
        self.begun = False
        self.not_before_s = 0.0
        """It waits for blocks that are on their way until then, and is asked for again."""

    @property
    def key(self) -> str:
        return self.work.key

    @property
    def output(self) -> list[int]:
        return self.known[len(self.work.prompt) :]

    @property
    def left(self) -> int:
        """Tokens to compute before the next can be chosen."""
        return len(self.known) - self.computed

    @property
    def decodes(self) -> bool:
        return self.left == 1 and self.computed > 0

    @property
    def rank(self) -> tuple[int, int]:
        return self.work.priority, self.order


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds a step and the whole."""

    step_tokens: int
    running_max: int
    waiting_max: int
    kv_tokens: int
    """Tokens whose KV the engine may hold, padding counted."""
    model_tokens: int
    block_tokens: int
    continues: bool
    """Prompts may be computed in chunks."""
    stop_every_blocks: int | None = None
    """Chunks end at least so often on a block boundary (for snapshots)."""
    captures: bool = False
    """Boundaries that prompts' chunks end on are shown to the boundary hook."""


class Scheduler:
    """All requests of the engine. Only the engine's thread calls it."""

    def __init__(self, limits: Limits, blocks: BlockScheduler | None) -> None:
        self.limits, self._blocks = limits, blocks
        self.waiting: list[Request] = []
        self.running: dict[str, Request] = {}
        self._saves: list[bytes] = []
        self._drops: list[str] = []
        self.preempted = 0

    # --- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Raises `RequestRejected` when it can never be computed, or when too many wait."""
        if len(self.waiting) >= self.limits.waiting_max:
            raise RequestRejected(f"{len(self.waiting)} requests wait already; try again later")
        longest = min(len(request.work.prompt) + request.work.sampling.max_tokens, self.limits.model_tokens)
        if longest > self.limits.kv_tokens:
            raise RequestRejected(
                f"prompt and max_tokens make {longest} tokens; this engine's KV memory holds {self.limits.kv_tokens}"
            )
        self._wait(request)

    def _wait(self, request: Request) -> None:
        self.waiting.append(request)
        self.waiting.sort(key=lambda waiting: waiting.rank)

    def remove(self, key: str) -> Request | None:
        """Ends a request in whatever phase; its caches go with the next step."""
        request = self.running.pop(key, None)
        if request is None:
            request = next((waiting for waiting in self.waiting if waiting.key == key), None)
            if request is None:
                return None
            self.waiting.remove(request)
        self._drop(request)
        return request

    def _drop(self, request: Request) -> None:
        if request.computed:
            self._drops.append(request.key)
        elif self._blocks is not None:
            self._blocks.ended(request.key)

    def forget_caches(self) -> None:
        """Every cache is gone: all that runs begins anew from its tokens."""
        for request in self.running.values():
            request.computed = 0
        self._saves.clear()
        self._drops.clear()

    @property
    def requests(self) -> list[Request]:
        return [*self.running.values(), *self.waiting]

    @property
    def unsaved(self) -> bool:
        """Whether ranks still have something to copy or to drop."""
        return bool(self._saves or self._drops)

    def busy(self) -> Busy:
        held = len(self.running) * max((len(r.known) for r in self.running.values()), default=0)
        share = min(1.0, held / self.limits.kv_tokens)
        return Busy(running=len(self.running), waiting=len(self.waiting), kv_used_share=share)

    # --- one step ------------------------------------------------------------------------------------------------

    def admit(self, before: int | None, now_s: float = math.inf) -> list[Request]:
        """Moves waiting requests to the running ones, as far as memory allows: those that came before `before`, and of the
        postponed ones those whose time has come."""
        admitted = []
        for request in [r for r in self._waiting(before) if r.not_before_s <= now_s]:
            if len(self.running) >= self.limits.running_max:
                break
            if self.running and self._held([*self.running.values(), request]) > self.limits.kv_tokens:
                break
            self.waiting.remove(request)
            self.running[request.key] = request
            admitted.append(request)
        return admitted

    def _waiting(self, before: int | None) -> list[Request]:
        return [r for r in self.waiting if before is None or r.order < before]

    def postpone(self, request: Request, until_s: float) -> None:
        """One just admitted, of which nothing is computed, waits again; others run meanwhile."""
        del self.running[request.key]
        request.not_before_s = until_s
        self._wait(request)

    def idle_s(self, before: int | None, now_s: float) -> float:
        """How long every request there is (of those that `admit` may take) only waits for its time; 0: there is a step to take."""
        waiting = self._waiting(before)
        if self.running or self.unsaved or not waiting:
            return 0.0
        return max(0.0, min(request.not_before_s for request in waiting) - now_s)

    @staticmethod
    def _held(requests: Sequence[Request]) -> int:
        """Tokens of the batch after its next step, padding counted."""
        return len(requests) * (max(len(r.known) for r in requests) + 1)

    def plan(self) -> Step | None:
        """The next step, or None when nothing is to be done."""
        self._fit()
        decode = [(r.key, r.known[-1]) for r in self.running.values() if r.decodes]
        chunks = self._chunks(self.limits.step_tokens - len(decode))
        if not (decode or chunks or self.unsaved):
            return None
        step = Step(self._saves, self._drops, chunks, self._boundaries(chunks), decode)
        self._saves, self._drops = [], []
        return step

    def flush(self) -> Step | None:
        """A step that computes nothing: what is to be saved and dropped before the engine stands."""
        if not self.unsaved:
            return None
        step = Step(self._saves, self._drops)
        self._saves, self._drops = [], []
        return step

    def _fit(self) -> None:
        while len(self.running) > 1 and self._held(list(self.running.values())) > self.limits.kv_tokens:
            last = max(self.running.values(), key=lambda r: r.rank)
            del self.running[last.key]
            if last.computed:
                self._drops.append(last.key)
            last.computed = 0
            self._wait(last)
            self.preempted += 1

    def _chunks(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in sorted(self.running.values(), key=lambda r: r.rank):
            if request.decodes or request.left == 0:
                continue
            count = self._chunk_tokens(request, budget, first=not chunks)
            if count == 0:
                break
            start = request.computed
            tokens = request.known[start : start + count]
            chunks.append(Chunk(request.key, start, tokens, start + count == len(request.known)))
            budget -= count
        return chunks

    def _boundaries(self, chunks: Sequence[Chunk]) -> list[tuple[str, str]]:
        if not self.limits.captures:
            return []
        ends = [(chunk.key, chunk.start + len(chunk.tokens)) for chunk in chunks]
        return [
            (key, self.running[key].work.cache_salt)
            for key, end in ends
            if end % self.limits.block_tokens == 0 and not self.running[key].mixed
        ]

    def _chunk_tokens(self, request: Request, budget: int, *, first: bool) -> int:
        """How many tokens of its rest: all, or up to a block boundary; at least one block in every step."""
        if not self.limits.continues:
            return request.left if first or request.left <= budget else 0
        block, start = self.limits.block_tokens, request.computed
        end = min(len(request.known), start + max(0, budget))
        if self.limits.stop_every_blocks is not None:
            span = self.limits.stop_every_blocks * block
            end = min(end, (start // span + 1) * span)
        if end < len(request.known):
            end = end // block * block
        if end <= start and first:
            end = min(len(request.known), (start // block + 1) * block)
        return max(0, end - start)

    def advance(
        self,
        step: Step,
        chosen: dict[str, tuple[int, TokenLogprobs | None]],
        failed: Container[str] = (),
    ) -> list[tuple[Request, Progress]]:
        """Books what the step computed and the tokens chosen from its answers; what each request has to tell.

        Of requests that `failed` nothing is saved: what gave them no token would give none to whoever loaded it.
        """
        if self._blocks is not None and step.drops:
            kept = {request.key for request in self.requests}
            for key in step.drops:
                if key not in kept:
                    self._blocks.ended(key)
        for chunk in step.chunks:
            self.running[chunk.key].computed += len(chunk.tokens)
        for key, _ in step.decode:
            self.running[key].computed += 1
        told = []
        for key, (token, logprobs) in chosen.items():
            request = self.running[key]
            request.known.append(token)
            finish, detail = request.sampler.ended_by(
                request.output, self.limits.model_tokens - len(request.work.prompt)
            )
            told.append(
                (
                    request,
                    Progress([token], [logprobs] if logprobs else [], finish, request.cached_tokens, detail),
                )
            )
        computed = [*(c.key for c in step.chunks), *(k for k, _ in step.decode)]
        self._save_whole_blocks([key for key in computed if key not in failed])
        for request, progress in told:
            if progress.finish:
                del self.running[request.key]
                self._drop(request)
        return told

    def _save_whole_blocks(self, keys: Sequence[str]) -> None:
        if self._blocks is None:
            return
        for key in keys:
            request = self.running[key]
            whole = request.computed // self.limits.block_tokens
            if whole <= request.saved_blocks or request.mixed:
                continue
            orders = self._blocks.completed(
                key, request.known[: request.computed], request.saved_blocks, whole
            )
            request.saved_blocks = whole
            if orders is not None:
                self._saves.append(orders)

    def loaded(self, request: Request, blocks: int) -> None:
        """A prefix of so many blocks came from the store."""
        request.computed = blocks * self.limits.block_tokens
        request.saved_blocks = max(request.saved_blocks, blocks)
        if not request.output:
            request.cached_tokens = request.computed
        if self._blocks is not None:
            self._blocks.loaded(request.key, blocks)

    def check_integrity(self) -> None:
        """Raises `AssertionError` where the books contradict themselves."""
        keys = [r.key for r in self.requests]
        assert len(keys) == len(set(keys)), "a request is both waiting and running"
        for request in self.requests:
            assert 0 <= request.computed < len(request.known), f"{request.key} has computed what is not known"
        assert all(r.computed == 0 or r.key in self.running for r in self.requests), (
            "a waiting request holds KV"
        )


def choose(
    requests: dict[str, Request], logits: dict[str, Any]
) -> tuple[dict[str, tuple[int, TokenLogprobs | None]], dict[str, str]]:
    """The next token of every request that has an answer, plain greedy ones together; and why others can have none.

    What one request asked for, or made the model compute, is no reason to end those beside it.
    """
    import torch

    plain = [key for key in logits if requests[key].sampler.plain]
    chosen: dict[str, tuple[int, TokenLogprobs | None]] = {}
    if plain:
        best = torch.stack([logits[key] for key in plain]).max(dim=-1)
        numbers = (~best.values.isnan()).tolist()
        both = zip(plain, best.indices.tolist(), numbers, strict=True)
        chosen = {key: (token, None) for key, token, number in both if number}
    failed: dict[str, str] = {}
    for key in logits:
        if key not in chosen:
            try:
                chosen[key] = requests[key].sampler.choose(logits[key], requests[key].output)
            except Exception as error:
                _log.exception("no token can be chosen for %s", key)
                failed[key] = f"no token can be chosen: {error}"
    return chosen, failed
