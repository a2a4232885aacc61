"""`BlockingTransferEngine`: the synchronous face, for code that has no loop (vLLM's workers, scripts).

The engine lives on a loop in a thread of its own. A read is carried by the calling thread itself where a lane allows it: it asks, receives or
copies, and no other thread has to wake up for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import SEGMENT_RELEASE_SECONDS_MAX, TRANSFER_SECONDS_DEFAULT
from interlock.host.loops import LoopThread
from interlock.host.threads import Lock, monotonic_s
from interlock.transfer.engine import TransferEngine
from interlock.transfer.notices import Notice
from interlock.transfer.outcomes import Outcome, Transfer, in_callback
from interlock.transfer.pieces import Part, make_plan
from interlock.transfer.prepared import PreparedRead
from interlock.transfer.reading import Wanted
from interlock.transfer.segments import RemoteSegment, Segment

START_SECONDS_MAX = 30.0
T = TypeVar("T")


class BlockingTransferEngine:
    """`make` is called on the engine's own loop: `lambda: TransferEngine(host, me, address, …)`. Thread-safe; use `with`."""

    def __init__(self, make: Callable[[], TransferEngine]) -> None:
        self._closing = Lock()
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
        """Where peers dial us."""
        return self._engine.address

    def register(self, buffer: Any, label: str = "", *, takes_writes: bool = False) -> Segment:
        """As `TransferEngine.register`. Raises `LocalProtocolError`."""
        return self._engine.register(buffer, label, takes_writes=takes_writes)

    def unregister(self, segment: Segment, timeout_s: float = SEGMENT_RELEASE_SECONDS_MAX) -> None:
        """As `TransferEngine.unregister`: returns when no peer is given anything of it. Raises `TimeoutError`, `LocalProtocolError`."""
        self._call(self._engine.unregister(segment, timeout_s), timeout_s + 1.0)

    def segments_of(
        self, peer: str, label: str = "", timeout_s: float = TRANSFER_SECONDS_DEFAULT
    ) -> list[RemoteSegment]:
        """As `TransferEngine.segments_of`. Raises `TransferFailed`."""
        return self._call(self._engine.segments_of(peer, label, timeout_s=timeout_s), timeout_s + 1.0)

    def open(self, peer: str, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        """As `TransferEngine.open`. Raises `TransferFailed`."""
        self._call(self._engine.open(peer, timeout_s=timeout_s), timeout_s + 1.0)

    def prepare(self, parts: Sequence[Part]) -> PreparedRead:
        """As `TransferEngine.prepare`: for reads that are done often."""
        return self._engine.prepare(parts)

    def begin_read(self, what: Wanted, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> Transfer:
        """As `TransferEngine.read`; wait by `Transfer.wait_outcome` and `wait_release`."""
        return self._call(_begin(self._engine, what, timeout_s), timeout_s + 1.0)

    def read(self, what: Wanted, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> Outcome:
        """Reads, and returns at the *release*, so that the buffers are the caller's again; raises `TransferFailed`.

        After the deadline the release takes a moment more: threads look up every BULK_PATIENCE_SECONDS.
        """
        begun_s = monotonic_s()
        prepared = what if isinstance(what, PreparedRead) else PreparedRead(make_plan(what), is_once=True)
        outcome = self._engine.read_now(prepared, timeout_s)
        if outcome is not None:
            return outcome.check()
        _may_wait()
        left_s = max(0.0, timeout_s - (monotonic_s() - begun_s))
        transfer = self._engine.read_here(prepared, left_s) or self.begin_read(prepared, left_s)
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
        return self._call(work, timeout_s + SEGMENT_RELEASE_SECONDS_MAX).check()

    def notify(self, peer: str, payload: bytes, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        """As `TransferEngine.notify`: returns when the peer acknowledged it. Raises `TransferFailed`."""
        self._call(self._engine.notify(peer, payload, timeout_s=timeout_s), timeout_s + 1.0)

    def next_notice(self, timeout_s: float) -> Notice:
        """Raises `TimeoutError`."""
        return self._call(_notice(self._engine), timeout_s)

    def ping(self, peer: str, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> float:
        """Seconds to that peer and back. Raises `TransferFailed`."""
        return self._call(self._engine.ping(peer, timeout_s=timeout_s), timeout_s + 1.0)

    def explain(self, peer: str) -> list[str]:
        """Over which lane that peer is read and why, in sentences."""
        return self._engine.explain(peer)

    def close(self) -> None:
        """Idempotent, from any thread. Raises `LocalProtocolError` inside a transfer's callback, which must not wait."""
        if self._thread.loop.is_closed():
            return
        _may_wait()
        with self._closing:  # a second one would end the loop under the first
            if self._thread.loop.is_closed():
                return
            try:
                self._call(self._engine.close(), START_SECONDS_MAX)
            finally:
                self._thread.close()

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        try:
            _may_wait()
        except LocalProtocolError:
            work.close()
            raise
        return self._thread.call(work, timeout_s)


def _may_wait() -> None:
    if in_callback():
        raise LocalProtocolError(
            "a transfer's callback must not wait for other transfers, nor close their engine",
            hint="hand it to a thread of yours",
        )


async def _make(make: Callable[[], TransferEngine]) -> TransferEngine:
    engine = make()
    await engine.start()
    return engine


async def _begin(engine: TransferEngine, what: Wanted, timeout_s: float) -> Transfer:
    return engine.read(what, timeout_s=timeout_s)


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
