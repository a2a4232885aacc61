"""Finds lanes for a transfer, and others when those break: within its deadline, without anybody's help.

The ordinary case takes no task: the endpoint is connected, its best lane takes the transfer at once, on whatever thread asks. Only a
transfer that nobody carries gets a task, which opens the endpoint (again), and gives it to the next lane.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from interlock.core.limits import TRANSFERS_UNDER_WAY_MAX
from interlock.host.threads import monotonic_s
from interlock.transfer.lanes.sockets import GROW_BYTES
from interlock.transfer.outcomes import Transfer, TransferFailed, check_timeout
from interlock.transfer.peer import Peer
from interlock.transfer.pieces import Part, Plan, make_plan
from interlock.transfer.prepared import PreparedRead

TRY_SECONDS_MIN = 0.005
TRY_SECONDS_MAX = 0.2
Wanted = Sequence[Part] | PreparedRead
CLOSED = "this engine was closed"
WAYS = 2
"""Connections at a time that a large transfer is cut for; more gain nothing on one path."""


class Readings:
    """All reads of one engine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[Transfer, asyncio.Task[None]] = {}
        self.under_way: set[Transfer] = set()
        self._closed = False

    def begin(self, peer: Peer, what: Wanted, timeout_s: float, *, here: bool = False) -> Transfer:
        """From any thread; `here`: this thread may do the work itself. Raises `LocalProtocolError` for pieces that cannot be."""
        prepared = what if isinstance(what, PreparedRead) else PreparedRead(make_plan(what))
        plan = prepared.plan
        transfer = self._make(peer, prepared, timeout_s)
        peer.visited = True
        if timeout_s <= 0:  # it could come in time by luck alone
            self.expire(peer, transfer)
            return transfer
        if peer.driver.state.theirs is None or self._is_theirs(peer, plan):
            for lane in peer.driver.usable:
                took = lane.carry_here(transfer) if here else lane.carry(transfer)
                if took:
                    break
        if transfer.is_stranded():
            self._strand(transfer, peer)
        return transfer

    def watch(self, peer: Peer, transfer: Transfer) -> None:
        """Its deadline, on the loop."""
        left_s = max(0.0, transfer.deadline_s - monotonic_s())
        timer = self._loop.call_later(left_s, self.expire, peer, transfer)

        def released() -> None:
            self._on_loop(timer.cancel)

        transfer.when_released(released)

    def expire(self, peer: Peer, transfer: Transfer) -> None:
        """The deadline of that transfer has passed: it fails by name, unless it is over."""
        if transfer.over:
            return
        state = peer.driver.state
        why = transfer.trouble or peer.driver.ended or peer.link.trouble
        transfer.fail(
            "deadline",
            f"reading {transfer.plan.size_bytes} bytes in {transfer.plan.count} pieces from {peer.name} was not done by "
            f"its deadline (endpoint {state.phase}{'; ' + why if why else ''})",
        )

    async def close(self) -> None:
        """Ends all with "closed", also those that another thread begins meanwhile."""
        self._closed = True
        for transfer in list(self.under_way):
            transfer.fail("closed", CLOSED)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _make(self, peer: Peer, prepared: PreparedRead, timeout_s: float) -> Transfer:
        check_timeout(timeout_s)
        if len(self.under_way) >= TRANSFERS_UNDER_WAY_MAX:
            raise TransferFailed(
                "refused",
                f"{TRANSFERS_UNDER_WAY_MAX} transfers are under way, no more are taken",
                peer=peer.name,
                retryable=True,
            )
        transfer: Transfer

        def stranded() -> None:
            self._strand(transfer, peer)

        def released() -> None:
            self.under_way.discard(transfer)
            peer.end_use()

        plan = prepared.plan
        chunks = prepared.chunks(WAYS if plan.size_bytes >= GROW_BYTES else 1)
        transfer = Transfer(plan, chunks, monotonic_s() + timeout_s, stranded)
        peer.begin_use()
        self.under_way.add(transfer)
        transfer.when_released(released)
        return transfer

    def _strand(self, transfer: Transfer, peer: Peer) -> None:
        """From any thread: somebody has to find another way for it."""
        if not self._on_loop(self._rescue, transfer, peer):
            transfer.fail("closed", CLOSED)

    def _on_loop(self, call: Any, *arguments: Any) -> bool:
        """False: the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            return False
        return True

    def _is_theirs(self, peer: Peer, plan: Plan) -> bool:
        theirs = peer.driver.state.theirs
        return theirs is not None and theirs.incarnation == plan.incarnation

    def _rescue(self, transfer: Transfer, peer: Peer) -> None:
        if transfer in self._tasks or not transfer.is_stranded():
            return
        if self._closed:  # it was begun by another thread while the engine closed
            transfer.fail("closed", CLOSED)
            return
        task = self._tasks[transfer] = asyncio.create_task(self._find_way(transfer, peer))
        task.add_done_callback(lambda _: self._ended(transfer, peer))

    def _ended(self, transfer: Transfer, peer: Peer) -> None:
        del self._tasks[transfer]
        if transfer.is_stranded():  # stranded again in the moment its task ended
            self._rescue(transfer, peer)

    async def _find_way(self, transfer: Transfer, peer: Peer) -> None:
        pause_s = TRY_SECONDS_MIN
        while transfer.is_stranded():
            retirements = peer.driver.retirements
            try:
                await _until(transfer, peer.driver.open())
            except TimeoutError:
                self.expire(peer, transfer)
                return
            except TransferFailed as failed:
                if peer.driver.retirements != retirements:
                    continue  # somebody here retired it while we waited: we still want it
                trouble = peer.link.trouble
                why = str(failed) + (f" ({trouble})" if trouble and trouble not in str(failed) else "")
                transfer.fail("unreachable", why)
                return
            if peer.driver.state.theirs is not None and not self._is_theirs(peer, transfer.plan):
                transfer.fail(
                    "stale",
                    f"the segments are of {peer.name}'s life {transfer.plan.incarnation}; it is in "
                    f"{peer.driver.state.theirs.incarnation} now",
                )
                return
            if any(lane.carry(transfer) for lane in peer.driver.usable):
                if not transfer.is_stranded():
                    return
            elif not peer.driver.usable and peer.driver.is_connected and not peer.driver.has_lanes:
                transfer.fail("unreachable", f"no lane to {peer.name} works")
                return
            await peer.driver.changes(pause_s)
            pause_s = min(2 * pause_s, TRY_SECONDS_MAX)


async def _until(transfer: Transfer, work: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(max(0.0, transfer.deadline_s - monotonic_s())):
        await work
