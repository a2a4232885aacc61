"""`BlockingTransferEngine`: the synchronous face, for code that has no loop (vLLM's workers, scripts).

The engine lives on a loop in a thread of its own. A read is carried by the calling thread itself where a lane allows it: it asks, receives or
copies, and no other thread has to wake up for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from interlock.core.limits import SEGMENT_RELEASE_SECONDS_MAX, TRANSFER_SECONDS_DEFAULT
from interlock.host.loops import LoopThread
from interlock.host.threads import monotonic_s
from interlock.transfer.engine import TransferEngine
from interlock.transfer.notices import Notice
from interlock.transfer.outcomes import Outcome, Transfer
from interlock.transfer.pieces import Part
from interlock.transfer.segments import RemoteSegment, Segment

START_SECONDS_MAX = 30.0


class BlockingTransferEngine:
    """`make` is called on the engine's own loop: `lambda: TransferEngine(host, me, address, …)`. Thread-safe; use `with`."""

    def __init__(self, make: Callable[[], TransferEngine]) -> None:
        self._thread = LoopThread("transfer")
        try:
            self._engine = self._thread.call(_make(make), START_SECONDS_MAX)
        except BaseException:
            self._thread.close()
            raise

    def __enter__(self) -> BlockingTransferEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return self._engine.address

    def register(self, buffer: Any, label: str = "", *, takes_writes: bool = False) -> Segment:
        return self._engine.register(buffer, label, takes_writes=takes_writes)

    def unregister(self, segment: Segment, timeout_s: float = SEGMENT_RELEASE_SECONDS_MAX) -> None:
        self._thread.call(self._engine.unregister(segment, timeout_s), timeout_s + 1.0)

    def segments_of(
        self, peer: str, label: str = "", timeout_s: float = TRANSFER_SECONDS_DEFAULT
    ) -> list[RemoteSegment]:
        return self._thread.call(self._engine.segments_of(peer, label, timeout_s=timeout_s), timeout_s + 1.0)

    def open(self, peer: str, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        self._thread.call(self._engine.open(peer, timeout_s=timeout_s), timeout_s + 1.0)

    def begin_read(self, parts: Sequence[Part], timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> Transfer:
        """As `TransferEngine.read`; wait by `Transfer.wait_outcome` and `wait_release`."""
        return self._thread.call(_begin(self._engine, parts, timeout_s), timeout_s + 1.0)

    def read(self, parts: Sequence[Part], timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> Outcome:
        """Reads, and returns at the *release*, so that the buffers are the caller's again; raises `TransferFailed`.

        After the deadline the release takes a moment more: threads look up every BULK_PATIENCE_SECONDS.
        """
        transfer = self._engine.read_here(parts, timeout_s) or self.begin_read(parts, timeout_s)
        left_s = max(0.0, transfer.deadline_s - monotonic_s())
        with contextlib.suppress(TimeoutError):
            transfer.wait_outcome(left_s)
        if not transfer.over:
            transfer.fail("deadline", f"reading from {transfer.plan.owner} was not done within {timeout_s} s")
        transfer.wait_release(SEGMENT_RELEASE_SECONDS_MAX)
        return transfer.wait_outcome(0.0).check()

    def write(
        self,
        target: RemoteSegment,
        source: Segment,
        pieces: Any = None,
        timeout_s: float = TRANSFER_SECONDS_DEFAULT,
    ) -> Outcome:
        """Returns at the release. Raises `TransferFailed`; `TimeoutError` when the owner does not say that it reads no more."""
        work = _write(self._engine, target, source, pieces, timeout_s)
        return self._thread.call(work, timeout_s + SEGMENT_RELEASE_SECONDS_MAX).check()

    def notify(self, peer: str, payload: bytes, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        self._thread.call(self._engine.notify(peer, payload, timeout_s=timeout_s), timeout_s + 1.0)

    def next_notice(self, timeout_s: float) -> Notice:
        """Raises `TimeoutError`."""
        return self._thread.call(_notice(self._engine), timeout_s)

    def ping(self, peer: str, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> float:
        return self._thread.call(self._engine.ping(peer, timeout_s=timeout_s), timeout_s + 1.0)

    def explain(self, peer: str) -> list[str]:
        return self._engine.explain(peer)

    def close(self) -> None:
        try:
            self._thread.call(self._engine.close(), START_SECONDS_MAX)
        finally:
            self._thread.close()


async def _make(make: Callable[[], TransferEngine]) -> TransferEngine:
    engine = make()
    await engine.start()
    return engine


async def _begin(engine: TransferEngine, parts: Sequence[Part], timeout_s: float) -> Transfer:
    return engine.read(parts, timeout_s=timeout_s)


async def _write(
    engine: TransferEngine, target: RemoteSegment, source: Segment, pieces: Any, timeout_s: float
) -> Outcome:
    write = engine.write(target, source, pieces, timeout_s=timeout_s)
    outcome = await write.outcome()
    await write.release()
    return outcome


async def _notice(engine: TransferEngine) -> Notice:
    async for notice in engine.notices():
        return notice
    raise AssertionError("notices do not end")
