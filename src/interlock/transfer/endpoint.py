"""The driver of one endpoint: core/endpoints decides; here its effects are carried out, and lanes are dialled, listed, destroyed.

Everything happens on the loop, at once, and in order: an event is told, its effects are done, and only what takes time (dialling, destroying
lanes) goes into tasks, whose result is the next event. So nothing waits in a transition, and no two of them interleave.

A lane that breaks is used no more at once, and its pieces move to the other lanes. core/endpoints retires an endpoint of which a listed lane
broke; it is told when the last lane broke, or when those transfers had LANE_DRAIN_SECONDS to end on the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from interlock.core import endpoints as core
from interlock.core.endpoint_events import (
    Connect,
    Dial,
    DropLanes,
    Event,
    LaneFailed,
    LaneReady,
    Open,
    Opened,
    OpenFailed,
    Released,
    Retire,
    Retired,
    Send,
    Superseded,
    Tick,
)
from interlock.core.endpoint_moves import TOOK_TOO_LONG
from interlock.core.endpoint_state import Endpoint, Offer, Phase, Stamp
from interlock.core.endpoint_state import Lane as LaneName
from interlock.core.errors import ProtocolError, RemoteProtocolError
from interlock.core.limits import LANE_DIAL_SECONDS_MAX, LANE_PATIENCE_SECONDS
from interlock.host.base import Clock
from interlock.host.bulk import BulkSocket
from interlock.transfer.lanes.base import Lane, LaneKind, LaneUnusable, Pairing
from interlock.transfer.lanes.greeting import DIALLER_READS, LISTENER_READS, LaneHello, LaneWelcome
from interlock.transfer.lanes.sockets import SocketKind, SocketLane
from interlock.transfer.outcomes import TransferFailed
from interlock.wire.transfer_messages import Said, to_wire

LANE_DRAIN_SECONDS = 2.0
OPENED = ""
WAS_CLOSED = "it was closed"
JUDGE_SECONDS_MAX = 1.0
"""How long a lane's connection waits for the messages that pair us; then its dialler comes again."""
_log = logging.getLogger(__name__)
Pair = tuple[Stamp, Stamp]


class EndpointDriver:
    """`post`: says a word to the peer. `changed`: an Event-like call whenever who is connected, or over what, changed."""

    def __init__(
        self,
        clock: Clock,
        name: str,
        peer: str,
        incarnation: int,
        attempt: int,
        kinds: dict[str, LaneKind],
        post: Callable[[Said], None],
        superseded: Callable[[Stamp], None],
    ) -> None:
        self._clock, self._kinds, self._post = clock, kinds, post
        self._superseded = superseded
        offers = tuple(Offer(kind, each.offer(peer)) for kind, each in kinds.items())
        self.state = Endpoint(name, peer, incarnation, offers, attempt=attempt)
        self._lanes: dict[Pair, dict[LaneName, Lane]] = {}
        self._admitted: set[tuple[Pair, LaneName, str, int]] = set()
        self._broken: dict[LaneName, str] = {}
        self._broken_s: float | None = None
        self.usable: tuple[Lane, ...] = ()
        """Listed lanes that work, best first: read from any thread."""
        self.refused: dict[str, str] = {}
        """Why a kind of lane is not used, by kind, for `explain`."""
        self.ended = ""
        """Why the endpoint before this one was retired."""
        self.retirements = 0
        """How often our side retired it: no reason for who waits to give up."""
        self._late_open: Open | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        """Lanes being destroyed: never cancelled, for until they are through some thread may be in a buffer."""
        self._closed = False
        self._waiters: set[asyncio.Future[str]] = set()
        """Told why the attempt ended, or OPENED."""
        self._changes: set[asyncio.Future[None]] = set()

    # --- for the engine --------------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return self.state.phase is Phase.CONNECTED

    @property
    def has_lanes(self) -> bool:
        """Some listed lane is there, or was and is being replaced."""
        return bool(self.usable or self._broken)

    async def open(self) -> None:
        """Until CONNECTED. Raises `TransferFailed`; bounded by the caller.

        Each attempt has a deadline of its own, and may have been begun by somebody else long ago: who is still waiting when it ends goes on with
        the next.
        """
        peer, reason = self.state.peer, TOOK_TOO_LONG
        if self._closed:  # another took its place while a thread had it in hand
            raise TransferFailed("unreachable", f"no connection to {peer}: {WAS_CLOSED}", peer=peer)
        while not self.is_connected and reason == TOOK_TOO_LONG:
            waiter: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                self.tell(Connect())
                reason = await waiter
            finally:
                self._waiters.discard(waiter)
            if reason not in (OPENED, TOOK_TOO_LONG):
                raise TransferFailed("unreachable", f"no connection to {peer}: {reason}", peer=peer)

    def tell(self, event: Event) -> None:
        """Raises `RemoteProtocolError` when it was the peer's and cannot be; nothing was changed then."""
        try:
            self.state, effects = core.transition(self.state, event)
        except RemoteProtocolError:
            raise
        except ProtocolError as error:  # a driver's mistake must not end the others
            _log.error("%s", error)
            return
        self.retirements += isinstance(event, Retire)
        if isinstance(event, Open) and self.state.phase is Phase.RETIRING:
            self._late_open = event
        for effect in effects:
            self._do(effect)
        self._list()
        self._tell_change()

    async def changes(self, timeout_s: float) -> None:
        """Returns when anything changed, or after `timeout_s`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._changes.discard(waiter)

    def tick(self) -> None:
        now_s = self._clock.monotonic_s()
        self.tell(Tick(now_s))
        for lanes in list(self._lanes.values()):
            for lane in lanes.values():
                lane.check(now_s)
        if self._broken_s is not None and now_s - self._broken_s >= LANE_DRAIN_SECONDS:
            self._tell_broken()

    async def close(self) -> None:
        """Returns when every lane is destroyed."""
        self._closed = True
        self.usable = ()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pair in list(self._lanes):
            await self._destroy(pair)
        await asyncio.gather(*self._endings)
        for kind in self._kinds.values():
            if isinstance(kind, SocketKind):
                kind.forget(self.state.peer)
        self._tell_waiters(WAS_CLOSED)

    # --- effects ---------------------------------------------------------------------------------------------------

    def _do(self, effect: Any) -> None:
        match effect:
            case Send(message):
                self._post(to_wire(message))
            case Dial(lane, parameters, mine, theirs):
                self._spawn(self._dial(lane, parameters, mine, theirs))
            case DropLanes(mine, theirs):
                self._end(self._destroy((mine, theirs)))
            case Opened():
                self._tell_waiters(OPENED)
            case OpenFailed(reason):
                self._tell_waiters(reason)
            case Retired(mine, _, reason):
                self.ended = reason
                self.usable = ()
                self._broken, self._broken_s = {}, None
                self._end(self._release(mine))
            case Superseded(highest):
                self._superseded(highest)

    def _tell_waiters(self, reason: str) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(reason)

    def _tell_change(self) -> None:
        for waiter in self._changes:
            if not waiter.done():
                waiter.set_result(None)

    def _list(self) -> None:
        """Lanes that both sides listed may carry bytes; others of this pairing are destroyed."""
        state = self.state
        if state.theirs is None or not state.chosen:
            return
        lanes = self._lanes.get((state.stamp, state.theirs), {})
        for name in [name for name in lanes if name not in state.chosen]:
            self._end(lanes.pop(name).destroy())
        for name, lane in lanes.items():
            kinds = [chosen for chosen in state.chosen if chosen.kind == name.kind]
            lane.list_it(is_only=len(kinds) == 1)
        if state.phase is Phase.CONNECTED:
            working = [lanes[name] for name in state.chosen if name in lanes and name not in self._broken]
            # Of two lanes of a kind that which we dialled comes first: we can add connections to it.
            working.sort(key=lambda lane: (self._kinds[lane.name.kind].rank, lane.name.dialler != state.name))
            self.usable = tuple(working)

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _pairing(self, mine: Stamp, theirs: Stamp) -> Pairing:
        return Pairing(self.state.name, self.state.peer, mine, theirs)

    def _is_current(self, mine: Stamp, theirs: Stamp) -> bool:
        return self.state.stamp == mine and self.state.theirs == theirs

    def _breaking(self, name: LaneName, mine: Stamp, theirs: Stamp) -> Callable[[str], None]:
        """What that lane calls, on any thread, when it broke."""
        loop = asyncio.get_running_loop()

        def broken(reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._lane_broke, name, mine, theirs, reason)

        return broken

    async def _dial(self, name: LaneName, parameters: bytes, mine: Stamp, theirs: Stamp) -> None:
        pairing, broken = self._pairing(mine, theirs), self._breaking(name, mine, theirs)
        try:
            async with asyncio.timeout(LANE_DIAL_SECONDS_MAX):
                lane = await self._kinds[name.kind].dial(name, parameters, pairing, broken)
        except (TimeoutError, EOFError, OSError, LaneUnusable, RemoteProtocolError) as error:
            why = str(error) or f"{self.state.peer} did not answer within {LANE_DIAL_SECONDS_MAX} s"
            self.refused[name.kind] = why
            self.tell(LaneFailed(name, mine, theirs, why))
            return
        if self._closed or not self._is_current(mine, theirs):
            self._end(lane.destroy())
            return
        self.refused.pop(name.kind, None)
        self._lanes.setdefault((mine, theirs), {})[name] = lane
        self._tell_ready(name, mine, theirs)

    async def judge(self, hello: LaneHello) -> LaneWelcome:
        """May this connection of a lane come in? Waits a little for the messages that would pair us with its dialler."""
        end_s = self._clock.monotonic_s() + JUDGE_SECONDS_MAX
        while True:
            state = self.state
            if hello.theirs != state.stamp or state.phase in (Phase.RETIRING, Phase.CLOSED):
                return LaneWelcome(f"{state.name} is at {state.stamp}, not at {hello.theirs}")
            if hello.mine < state.known:
                return LaneWelcome(f"{hello.mine} is old, {state.known} is known")
            if hello.mine == state.theirs:
                break
            left_s = end_s - self._clock.monotonic_s()
            if left_s <= 0:
                return LaneWelcome("this pairing is not known yet", again=True)
            await self.changes(left_s)
        if hello.role not in (DIALLER_READS, LISTENER_READS) or hello.lane not in state.candidates:
            return LaneWelcome(f"{hello.lane} in the role {hello.role!r} is none that these two can have")
        if state.chosen and hello.lane not in state.chosen:
            return LaneWelcome(f"{hello.lane} was not listed")
        key = ((hello.theirs, hello.mine), hello.lane, hello.role, hello.number)
        if key in self._admitted:
            return LaneWelcome("this connection was admitted already")
        self._admitted.add(key)
        return LaneWelcome()

    def arrived(self, hello: LaneHello, sock: BulkSocket) -> None:
        """A connection of a lane that the peer dialled."""
        mine, theirs, name = hello.theirs, hello.mine, hello.lane
        if self._closed or not self._is_current(mine, theirs):
            sock.close()
            return
        lanes = self._lanes.setdefault((mine, theirs), {})
        lane = lanes.get(name)
        if lane is None:
            kind = self._kinds[name.kind]
            assert isinstance(kind, SocketKind)
            broken = self._breaking(name, mine, theirs)
            lane = lanes[name] = kind.make_lane(name, self._pairing(mine, theirs), broken, None)
        assert isinstance(lane, SocketLane)
        self._list()  # before it begins: on a slow network both sides listed it already, and the first request is here
        lane.add(sock, we_read=hello.role == LISTENER_READS)
        self._tell_ready(name, mine, theirs)

    def _tell_ready(self, name: LaneName, mine: Stamp, theirs: Stamp) -> None:
        """Whoever chooses waits a little for the other lanes, and no longer: what cannot be dialled (a firewall) may never be heard of."""
        before = self.state.ready
        self.tell(LaneReady(name, mine, theirs))
        if not before and self.state.ready and not self.state.chosen:
            self._spawn(self._choose_soon(mine, theirs))

    async def _choose_soon(self, mine: Stamp, theirs: Stamp) -> None:
        for wait_s in (0.0, 1.01 * LANE_PATIENCE_SECONDS):
            await self._clock.sleep_s(wait_s)
            if not self._is_current(mine, theirs) or self.state.chosen:
                return
            self.tell(Tick(self._clock.monotonic_s()))

    def _lane_broke(self, name: LaneName, mine: Stamp, theirs: Stamp, reason: str) -> None:
        if not self._is_current(mine, theirs):
            return
        _log.info("%s to %s broke: %s", name, self.state.peer, reason)
        if name not in self.state.chosen:
            self.tell(LaneFailed(name, mine, theirs, reason))
            return
        self._broken[name] = reason
        self.usable = tuple(lane for lane in self.usable if lane.name != name)
        self._tell_change()
        if not self.usable:
            self._tell_broken()
        elif self._broken_s is None:
            self._broken_s = self._clock.monotonic_s()

    def _tell_broken(self) -> None:
        state = self.state
        if self._broken and state.theirs is not None:
            name, reason = next(iter(self._broken.items()))
            self.tell(LaneFailed(name, state.stamp, state.theirs, reason))

    async def _destroy(self, pair: Pair) -> None:
        lanes = self._lanes.pop(pair, {})
        self._admitted = {key for key in self._admitted if key[0] != pair}
        await asyncio.gather(*(lane.destroy() for lane in lanes.values()))

    async def _release(self, mine: Stamp) -> None:
        """Destroys every lane of the retired endpoint, then says so."""
        await asyncio.gather(*(self._destroy(pair) for pair in list(self._lanes) if pair[0] <= mine))
        if self._closed:
            return
        self.tell(Released())
        late, self._late_open = self._late_open, None
        if late is not None:  # any message may be late; this one is now, and its sender need not repeat it
            self.tell(late)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"endpoint to {self.state.peer}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"lanes to {self.state.peer} end")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
