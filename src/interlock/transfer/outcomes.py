"""One transfer: its outcome, by its deadline, and its release, when no byte can land any more. They are two things.

A deadline that "ends" a transfer while a thread is still in recv gives its buffer to somebody else, and the late bytes overwrite what
that one put there; no checksum looks again (kvcache-ai/Mooncake #3793, hazards W1). So the outcome is decided by whoever is first of
success, failure, cancel and deadline; the release by the last *carrier*: each connection that took a chunk says when it can
touch the buffers no more. Only release frees buffers.

Used from any thread.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import msgspec

from interlock.core.errors import InterlockError, LocalProtocolError
from interlock.host.threads import Local, Lock
from interlock.transfer.pieces import Chunk, Plan


class TransferFailed(InterlockError):  # noqa: N818
    """`code`: "deadline", "cancelled", "unreachable", "stale", "revoked", "bounds", "refused", "closed"."""

    def __init__(self, code: str, message: str, *, peer: str, retryable: bool = False) -> None:
        super().__init__(message, peer=peer, retryable=retryable, code=code)
        self.code = code


def check_timeout(timeout_s: float) -> None:
    """Every wait has a deadline. Raises `LocalProtocolError` for seconds that are no number, or without end."""
    if not math.isfinite(timeout_s):
        raise LocalProtocolError(f"{timeout_s} seconds are no time-out", hint="give how long it may take")


_calling = Local()


def in_callback() -> bool:
    """Is this thread in a callback of `Transfer.when_released`? Whoever waited there could wait for itself."""
    return bool(getattr(_calling, "back", False))


class Outcome(msgspec.Struct, frozen=True):
    """What became of a transfer. `code` is empty when it is good, else one word: deadline, unreachable, revoked, stale, bounds, refused, cancelled, closed."""

    ok: bool
    size_bytes: int
    """That arrived; all of them if `ok`. Which ones is not said: a transfer that failed is read again."""
    code: str = ""
    message: str = ""
    peer: str = ""
    lanes: dict[str, int] = {}
    """Bytes by the kind of lane that carried them."""

    def check(self) -> Outcome:
        """Raises `TransferFailed` unless it is good."""
        if not self.ok:
            retryable = self.code in ("deadline", "unreachable")
            raise TransferFailed(self.code, self.message, peer=self.peer, retryable=retryable)
        return self


class Carrier(Protocol):
    """What carries chunks of transfers: a connection, a copying thread."""

    def look(self) -> None:
        """The transfer is over: stop touching its memory, and say so (`Transfer.leave`). Returns at once."""
        ...


class Transfer:
    """Made by an engine. `outcome` and `release` wait on the loop, `wait_outcome` and `wait_release` in a thread."""

    def __init__(
        self, plan: Plan, chunks: list[Chunk], deadline_s: float, stranded: Callable[[], None]
    ) -> None:
        self.plan = plan
        self.deadline_s = deadline_s
        self._stranded = stranded
        self._lock = Lock()
        self._pending: deque[Chunk] = deque(chunks)
        self._carriers: dict[Carrier, Chunk | None] = {}
        self._done_bytes = 0
        self._lanes: dict[str, int] = {}
        self.over = False
        """The outcome is decided."""
        self.trouble = ""
        """Why the last carrier gave up."""
        self._outcome: Future[Outcome] = Future()
        self._released: Future[None] = Future()
        self._is_released = False

    # --- for its user ----------------------------------------------------------------------------------------------

    async def outcome(self) -> Outcome:
        """By the deadline. Never raises for what befell the transfer: see `Outcome.check`."""
        return await asyncio.shield(asyncio.wrap_future(self._outcome))

    async def release(self) -> None:
        """From then on the buffers may be used for something else."""
        await asyncio.shield(asyncio.wrap_future(self._released))

    def wait_outcome(self, timeout_s: float) -> Outcome:
        """Raises `TimeoutError`."""
        return self._outcome.result(timeout_s)

    def wait_release(self, timeout_s: float) -> None:
        """Raises `TimeoutError`: the buffers must be kept."""
        self._released.result(timeout_s)

    @property
    def released(self) -> bool:
        """The buffers are their user's again."""
        return self._released.done()

    def cancel(self) -> None:
        """The outcome is "cancelled", unless it was decided. Its release follows."""
        self.fail("cancelled", "it was cancelled")

    def when_released(self, call: Callable[[], None]) -> None:
        """On whatever thread releases it; at once if it is. `call` must not wait: that thread may be one that others wait for."""
        self._released.add_done_callback(lambda _: call())

    # --- for those that carry it -----------------------------------------------------------------------------------

    def is_stranded(self) -> bool:
        """Something is left to carry, and nobody carries."""
        return bool(self._pending) and not self._carriers and not self.over

    @property
    def has_pending(self) -> bool:
        """A chunk waits for a carrier."""
        return bool(self._pending)

    def join(self, carrier: Carrier) -> bool:
        """The carrier will take chunks; it leaves by `leave`. False: nothing is left to carry."""
        with self._lock:
            if self.over or not self._pending or carrier in self._carriers:
                return False
            self._carriers[carrier] = None
            return True

    def take(self, carrier: Carrier) -> Chunk | None:
        """The next chunk for a carrier that joined; None: it shall leave."""
        with self._lock:
            if self.over or not self._pending:
                return None
            chunk = self._carriers[carrier] = self._pending.popleft()
            return chunk

    def done(self, carrier: Carrier, lane: str) -> None:
        """The chunk taken last arrived whole."""
        with self._lock:
            chunk = self._carriers[carrier]
            assert chunk is not None
            self._carriers[carrier] = None
            self._done_bytes += chunk.size_bytes
            self._lanes[lane] = self._lanes.get(lane, 0) + chunk.size_bytes

    def give_back(self, carrier: Carrier, moved_bytes: int, lane: str) -> None:
        """The chunk taken last arrived up to `moved_bytes`; another carries the rest."""
        with self._lock:
            chunk = self._carriers[carrier]
            if chunk is None:
                return
            self._carriers[carrier] = None
            rest = chunk.rest(moved_bytes)
            whole = chunk.size_bytes - rest.size_bytes
            self._done_bytes += whole
            if whole:
                self._lanes[lane] = self._lanes.get(lane, 0) + whole
            if rest.size_bytes:
                self._pending.appendleft(rest)

    def leave(self, carrier: Carrier, trouble: str = "") -> None:
        """The carrier touches the buffers no more."""
        outcome: Outcome | None = None
        with self._lock:
            if carrier not in self._carriers:
                return
            chunk = self._carriers.pop(carrier)
            assert chunk is None or self.over, "a carrier left with a chunk in its hands"
            self.trouble = trouble or self.trouble
            idle = not self._carriers
            if idle and not self.over and not self._pending:
                self.over = True
                outcome = Outcome(True, self._done_bytes, peer=self.plan.owner, lanes=dict(self._lanes))
            stranded = idle and not self.over
            release = idle and self.over
        if outcome is not None:
            self._outcome.set_result(outcome)
        if release:
            self._release()
        elif stranded:
            self._stranded()

    def fail(self, code: str, message: str) -> bool:
        """Decides the outcome, if nobody did; the carriers leave when they can. True: it was decided here."""
        with self._lock:
            if self.over:
                return False
            self.over = True
            self._pending.clear()
            carriers = list(self._carriers)
            outcome = Outcome(
                False, self._done_bytes, code, message, peer=self.plan.owner, lanes=dict(self._lanes)
            )
        self._outcome.set_result(outcome)
        for carrier in carriers:
            carrier.look()
        if not carriers:
            self._release()
        return True

    def _release(self) -> None:
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        before, _calling.back = in_callback(), True
        try:
            self._released.set_result(None)
        finally:
            _calling.back = before
