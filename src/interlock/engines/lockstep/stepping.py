"""The engine's thread of one rank: steps when the leader grants one, and every step is exactly one forward."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from interlock.core.targets import Mode
from interlock.engines.lockstep.seat import Seat
from interlock.engines.transformers.asking import promised
from interlock.engines.transformers.building import Built
from interlock.engines.transformers.loop import Loop, Told
from interlock.engines.transformers.plans import Chunk, Step
from interlock.engines.transformers.scheduler import Scheduler


class OneForward(Scheduler):
    """Plans one chunk or the decoding requests, never both: prompts and decoding take turns.

    `tokens_max` bounds the chunk: the grant says how much a step may compute, and its deadline stands on that.
    """

    tokens_max = 0
    forwards = 0
    """Planned so far."""
    _decodes_next = False

    def plan(self) -> Step | None:
        step = super().plan()
        if step is None:
            return None
        chunks = self._affordable(step.chunks)
        decode = step.decode
        if chunks and decode:
            if self._decodes_next:
                chunks = []
            else:
                decode = []
        self._decodes_next = bool(chunks)
        if chunks or decode:
            self.forwards += 1
        elif not (step.saves or step.drops):
            return None
        return Step(step.saves, step.drops, chunks, self._boundaries(chunks), decode)

    def _affordable(self, chunks: list[Chunk]) -> list[Chunk]:
        """The first chunk, cut to the grant at a block boundary; none where not even one block is granted."""
        for chunk in chunks[:1]:
            if len(chunk.tokens) <= self.tokens_max:
                return [chunk]
            block = self.limits.block_tokens
            count = (chunk.start + self.tokens_max) // block * block - chunk.start
            if self.limits.continues and count > 0:
                return [Chunk(chunk.key, chunk.start, chunk.tokens[:count], False)]
        return []

    def wanted_tokens(self) -> int:
        """The most that the next step would compute, were it granted: a rank says so with each report."""
        requests = self.requests
        prefill = max((r.left for r in requests if not r.decodes), default=0)
        if prefill > self.limits.step_tokens and self.limits.continues:
            prefill = max(self.limits.step_tokens, self.limits.block_tokens)
        return max(prefill, len(requests), 1)


class LockstepLoop(Loop):
    """`on_said` is called in this thread when what this rank wants, or how it stands, has changed."""

    def __init__(
        self,
        deliver: Callable[[Told], None],
        on_death: Callable[[str], None],
        on_said: Callable[[], None],
        rank: int,
    ) -> None:
        super().__init__(deliver, on_death)
        self._on_said = on_said
        self.seat = Seat(rank, self._wake)
        self.wants_tokens = 0
        self.stood = 0
        self._said = (0, 0)

    def make_scheduler(self, built: Built) -> Scheduler:
        return OneForward(built.limits, built.hooks.scheduler)

    def hold(self, number: int, mode: str) -> None:
        """In this thread. In force once nothing of a step is left to be copied: then `stood` says so."""
        if not mode:
            self.unpause()
            self.stood = max(self.stood, number)
            return
        standing: Future[None] = promised()

        def stands(done: Future[None]) -> None:
            if done.exception() is None:
                self.stood = max(self.stood, number)

        standing.add_done_callback(stands)
        self.pause(Mode(mode), standing)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _seconds_to_step(self) -> float | None:
        return None if self.seat.step is None else 0.0

    def _step(self) -> None:
        scheduler, step = self.scheduler, self.seat.step
        assert isinstance(scheduler, OneForward)
        assert step is not None
        before, scheduler.tokens_max = scheduler.forwards, self.seat.tokens
        if self._has_to_step():
            super()._step()
        if scheduler.forwards == before:
            self.ranks.computer.empty_forward()
            self.counts["empty_steps"] = self.counts.get("empty_steps", 0) + 1
        self._look()
        self.seat.ended(step)
        self._on_said()

    def _settle(self) -> None:
        super()._settle()
        if self._look():
            self._on_said()

    def _look(self) -> bool:
        """Whether there is something new to say."""
        scheduler, before = self.scheduler, self._said
        assert isinstance(scheduler, OneForward)
        self.wants_tokens = scheduler.wanted_tokens() if self._has_to_step() else 0
        self._said = (self.wants_tokens, self.stood)
        return self._said != before
