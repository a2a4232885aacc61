"""Lanes that are connections: how they are dialled, admitted, used several at a time, and ended. TCP is one; shared memory is built on it.

The acceptor is concurrent and bounded: each newcomer is greeted in a task of its own, within HELLO_SECONDS_MAX, and no more than GREETINGS_MAX of
them wait (Mooncake's listener greets one at a time, and a mute client holds it for five seconds).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from interlock.core.endpoint_state import Lane as LaneName
from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import (
    CHUNK_BYTES,
    GREETINGS_MAX,
    HELLO_SECONDS_MAX,
    LANE_CONNECTIONS_MAX,
    LANE_STALL_SECONDS_MAX,
)
from interlock.host.base import Clock
from interlock.host.bulk import BulkListener, BulkSocket
from interlock.host.bulk_pool import BulkPool
from interlock.transfer.lanes.base import LaneUnusable, Pairing
from interlock.transfer.lanes.connection import Connection
from interlock.transfer.lanes.greeting import (
    DIALLER_READS,
    LISTENER_READS,
    LaneHello,
    LaneWelcome,
    answer,
    greet,
    hear_hello,
)
from interlock.transfer.lanes.pulling import PullConnection
from interlock.transfer.lanes.serving import Mapper, ServeConnection
from interlock.transfer.outcomes import Outcome, Transfer, in_callback
from interlock.transfer.prepared import PreparedRead
from interlock.transfer.segments import SegmentTable

GROW_BYTES = 32 * 1024 * 1024
"""A smaller transfer gains nothing from a second connection."""
AGAIN_SECONDS = 0.02
ACCEPT_PAUSE_SECONDS = 0.1
_log = logging.getLogger(__name__)


class Admission(Protocol):
    """The engine's part: who may open which lane (core/endpoints)."""

    async def judge(self, hello: LaneHello) -> LaneWelcome: ...

    def arrived(self, hello: LaneHello, sock: BulkSocket) -> None:
        """A connection that was welcomed and confirmed; owns it from now on."""
        ...


class SocketLane:
    """`pulls`: connections that we read over; `serves`: those that the peer reads over."""

    def __init__(
        self,
        name: LaneName,
        pairing: Pairing,
        pool: BulkPool,
        segments: SegmentTable,
        broken: Callable[[str], None],
        *,
        mapper: Mapper | None = None,
        connections: int = 1,
        dial: Callable[[str, int], Awaitable[BulkSocket]] | None = None,
    ) -> None:
        self.name, self.pairing = name, pairing
        self._pool, self._segments, self._broken = pool, segments, broken
        self._mapper, self._connections, self._dial = mapper, connections, dial
        self.pulls: list[PullConnection] = []
        self.serves: list[ServeConnection] = []
        self._listed = self._destroyed = self._is_broken = False
        self._all: list[Connection] = []
        self._loop = asyncio.get_running_loop()
        self._growing: asyncio.Task[None] | None = None
        self._next_number = 1

    # --- connections -----------------------------------------------------------------------------------------------

    def add(self, sock: BulkSocket, *, we_read: bool) -> None:
        connection: PullConnection | ServeConnection
        if we_read:
            connection = PullConnection(sock, self._pool, self._ended, self.name.kind)
            self.pulls.append(connection)
        else:
            connection = ServeConnection(sock, self._pool, self._ended, self._segments, self._mapper)
            connection.is_listed = self._listed
            self.serves.append(connection)
        self._all.append(connection)
        connection.begin()
        if self._destroyed:
            connection.end("the lane is being destroyed")

    def _ended(self, connection: Connection, reason: str) -> None:
        """On any thread."""
        mine: list[Any] = self.pulls if isinstance(connection, PullConnection) else self.serves
        if connection in mine:
            mine.remove(connection)
        if connection in self._all:
            self._all.remove(connection)
        if not mine and not self._is_broken and not self._destroyed:
            self._is_broken = True
            self._broken(reason)

    def list_it(self, *, is_only: bool) -> None:
        if self._listed:
            return
        self._listed = True
        for serve in self.serves:
            serve.is_listed = True
            serve.look()
        if is_only and self._dial is not None:
            self._grow(LISTENER_READS, 1)

    def _grow(self, role: str, count: int) -> None:
        if not self._destroyed and (self._growing is None or self._growing.done()):
            self._growing = asyncio.create_task(self._dial_more(role, count), name=f"grow {self.name.kind}")

    async def _dial_more(self, role: str, count: int) -> None:
        assert self._dial is not None
        for _ in range(count):
            number, self._next_number = self._next_number, self._next_number + 1
            try:
                async with asyncio.timeout(HELLO_SECONDS_MAX):
                    sock = await self._dial(role, number)
            except (TimeoutError, OSError, EOFError, LaneUnusable, RemoteProtocolError) as error:
                _log.info(
                    "one more connection to %s was not had (%s): %s", self.pairing.peer, role, str(error)
                )
                return
            self.add(sock, we_read=role == DIALLER_READS)

    # --- bytes -----------------------------------------------------------------------------------------------------

    def carry(self, transfer: Transfer) -> bool:
        return self._carry(transfer, here=False)

    def carry_here(self, transfer: Transfer) -> bool:
        return self._carry(transfer, here=True)

    def read_now(self, prepared: PreparedRead, deadline_s: float) -> Outcome | None:
        """See `Lane.read_now`. Over one idle connection, if one is enough, and never in a callback: it waits for the peer."""
        if prepared.plan.size_bytes >= GROW_BYTES or not self._may_carry(prepared) or in_callback():
            return None
        if not prepared.plan.is_on_host:
            return None
        for pull in list(self.pulls):
            if pull.is_idle and (outcome := pull.read_now(prepared, deadline_s)) is not None:
                return outcome
        return None

    def _may_carry(self, read: Transfer | PreparedRead) -> bool:
        """Not what is of another life: whoever gives it to us may have found us a moment after it looked for the peer's life."""
        return self._listed and read.plan.incarnation == self.pairing.theirs.incarnation

    def _carry(self, transfer: Transfer, *, here: bool) -> bool:
        """Idle connections first: a busy one takes a chunk only when all are."""
        if not self._may_carry(transfer) or not transfer.plan.is_on_host:
            return False
        ways = sorted(self.pulls, key=lambda pull: not pull.is_idle)
        size = transfer.plan.size_bytes
        if self._dial is not None and size >= GROW_BYTES and len(ways) < self._connections:
            self._loop.call_soon_threadsafe(
                self._grow, DIALLER_READS, min(self._connections, -(-size // CHUNK_BYTES) + 1) - len(ways)
            )
        took = False
        for pull in ways[1:] if size >= GROW_BYTES else []:
            if pull.is_idle:
                took |= pull.carry(transfer)
        for pull in ways[:1]:
            took |= pull.carry_here(transfer) if here else pull.carry(transfer)
        return took or transfer.over or not transfer.has_pending

    # --- life ------------------------------------------------------------------------------------------------------

    def check(self, now_s: float) -> None:
        for connection in [*self.pulls, *self.serves]:
            connection.stall(now_s, LANE_STALL_SECONDS_MAX)

    async def destroy(self) -> None:
        self._destroyed = True
        if self._growing is not None:
            self._growing.cancel()
            await asyncio.gather(self._growing, return_exceptions=True)
        connections = list(self._all)
        for connection in connections:
            connection.end("the lane is being destroyed")
        for connection in connections:
            await asyncio.wrap_future(connection.closed)
        self.pulls.clear()
        self.serves.clear()

    def explain(self) -> list[str]:
        who = "us" if self.name.dialler == self.pairing.me else self.pairing.peer
        words = f"{self.name.kind}, dialled by {who}; connections: {len(self.pulls)} to read over, {len(self.serves)} that the peer reads over"
        return [words + ("" if self._listed else "; not listed")]


class SocketKind:
    """What kinds of lanes over connections share; subclasses say how to listen, connect, and what an offer holds."""

    kind = "socket"
    rank = 9

    def __init__(
        self,
        clock: Clock,
        me: str,
        pool: BulkPool,
        segments: SegmentTable,
        admission: Admission,
        connections: int = 2,
    ) -> None:
        if not 1 <= connections <= LANE_CONNECTIONS_MAX:
            raise ValueError(
                f"{connections} connections a lane are not possible, 1 to {LANE_CONNECTIONS_MAX} are"
            )
        self._clock, self._me, self._pool, self._segments = clock, me, pool, segments
        self._admission, self._connections = admission, connections
        self._listener: BulkListener | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._secrets: dict[str, bytes] = {}

    # --- for subclasses --------------------------------------------------------------------------------------------

    def listen(self) -> BulkListener:
        raise NotImplementedError

    def parameters(self, secret: bytes) -> bytes:
        raise NotImplementedError

    async def reach(self, parameters: bytes) -> tuple[BulkSocket, bytes]:
        """A fresh connection to whoever made the offer, and the secret in it. Raises `LaneUnusable`, `ConnectionError`."""
        raise NotImplementedError

    async def received(self, sock: BulkSocket) -> BulkSocket:
        """A fresh connection that was accepted, before its greeting."""
        return sock

    def make_lane(
        self,
        name: LaneName,
        pairing: Pairing,
        broken: Callable[[str], None],
        dial: Callable[[str, int], Awaitable[BulkSocket]] | None,
    ) -> SocketLane:
        return SocketLane(
            name,
            pairing,
            self._pool,
            self._segments,
            broken,
            connections=self._connections,
            dial=dial,
        )

    # --- listening -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises `OSError` when the address cannot be had."""
        self._listener = self.listen()
        self._spawn(self._accept(self._listener), f"accept {self.kind}")

    def offer(self, peer: str) -> bytes:
        secret = self._secrets.setdefault(peer, os.urandom(32))
        return self.parameters(secret)

    def forget(self, peer: str) -> None:
        self._secrets.pop(peer, None)

    def is_from_us(self, hello: LaneHello) -> bool:
        """Was the hello made with the secret of the offer that we made to its sender?"""
        secret = self._secrets.get(hello.sender)
        return secret is not None and hello.receiver == self._me and hello.is_signed(secret)

    async def _accept(self, listener: BulkListener) -> None:
        greeting = 0

        def done(_: asyncio.Task[None]) -> None:
            nonlocal greeting
            greeting -= 1

        while True:
            try:
                sock = await listener.accept()
            except OSError as error:
                _log.warning("%s: a connection was not accepted: %s", listener.address, error)
                await self._clock.sleep_s(ACCEPT_PAUSE_SECONDS)
                continue
            if greeting >= GREETINGS_MAX:
                sock.close()
                continue
            greeting += 1
            self._spawn(self._greet(sock), f"greet {sock.peer.address}").add_done_callback(done)

    async def _greet(self, sock: BulkSocket) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS_MAX):
                sock = await self.received(sock)
                hello = await hear_hello(sock)
                if hello.kind != self.kind or not self.is_from_us(hello):
                    raise RemoteProtocolError(
                        f"{sock.peer.address} has no token for a {self.kind} lane of {self._me}"
                    )
                welcome = await self._admission.judge(hello)
                await answer(sock, welcome)
        except (TimeoutError, EOFError, OSError, RemoteProtocolError) as error:
            _log.info("a connection of a lane was not admitted: %s", str(error) or "it took too long")
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        if welcome.refusal:
            sock.close()
        else:
            self._admission.arrived(hello, sock)

    # --- dialling --------------------------------------------------------------------------------------------------

    async def dial(
        self, name: LaneName, parameters: bytes, pairing: Pairing, broken: Callable[[str], None]
    ) -> SocketLane:
        async def more(role: str, number: int) -> BulkSocket:
            return await self._connect(name, parameters, pairing, role, number)

        sock = await more(DIALLER_READS, 0)
        lane = self.make_lane(name, pairing, broken, more)
        lane.add(sock, we_read=True)
        return lane

    async def _connect(
        self, name: LaneName, parameters: bytes, pairing: Pairing, role: str, number: int
    ) -> BulkSocket:
        """Until it is welcomed or refused for good: the peer may hear of the pairing later than of the connection."""
        while True:
            sock, secret = await self.reach(parameters)
            try:
                hello = LaneHello(
                    name.kind, pairing.me, pairing.peer, pairing.mine, pairing.theirs, role, number
                )
                welcome = await greet(sock, hello.signed(secret))
            except EOFError:
                sock.close()
                raise LaneUnusable(
                    f"{pairing.peer} closed the connection at its greeting", hint="is its offer an old one?"
                ) from None
            except BaseException:
                sock.close()
                raise
            if not welcome.refusal:
                return sock
            sock.close()
            if not welcome.again:
                raise LaneUnusable(f"{pairing.peer} refused the lane: {welcome.refusal}")
            await self._clock.sleep_s(AGAIN_SECONDS)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
