"""Lanes over simulated streams, for the world of endpoints: the real offers, tokens, greetings and listing, with a made-up way of moving bytes.

A reader asks one question, "who are you?", and the owner answers with its name and life. That is all that a read has to show here: whether an answer
of another life, or over a lane that was not listed, can ever be taken for the owner's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec

from interlock.core.endpoint_state import Lane as LaneName
from interlock.core.errors import RemoteProtocolError
from interlock.host.base import Host, Listener, Peer, Stream
from interlock.host.bulk import BulkListener, BulkSocket
from interlock.transfer.lanes.base import LaneUnusable, Pairing
from interlock.transfer.lanes.sockets import Admission, SocketKind, SocketLane
from interlock.transfer.segments import SegmentTable

ASK, REFUSED = b"?", b"-"
ANSWER_BYTES = 32


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    address: str
    secret: bytes


class _Socket:
    """What the greeting needs of a `BulkSocket`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.closed = asyncio.Event()

    @property
    def peer(self) -> Peer:
        return self._stream.peer

    async def say(self, data: bytes) -> None:
        await self._stream.send(data)

    async def hear(self, count: int) -> bytes:
        return await self._stream.receive_exactly(count)

    def close(self) -> None:
        self._stream.close()
        self.closed.set()


class _Arrivals:
    """What `SocketKind` needs of a `BulkListener`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.waiting: asyncio.Queue[_Socket] = asyncio.Queue()

    async def accept(self) -> _Socket:
        return await self.waiting.get()

    def close(self) -> None:
        while not self.waiting.empty():
            self.waiting.get_nowait().close()


class Link:
    """One connection of a lane, with a task of its own."""

    def __init__(self, lane: SimLane, sock: _Socket, *, we_read: bool, listed: bool) -> None:
        self._lane, self._sock, self.we_read = lane, sock, we_read
        self.is_listed = listed
        self._turn = asyncio.Lock()
        self.task = asyncio.create_task(self._watch() if we_read else self._serve(), name="a lane's link")

    def close(self) -> None:
        self._sock.close()

    def look(self) -> None: ...

    def stall(self, now_s: float, seconds_max: float) -> None: ...

    async def _serve(self) -> None:
        try:
            while await self._sock.hear(1) == ASK:
                answer = self._lane.life if self.is_listed else REFUSED
                await self._sock.say(answer.ljust(ANSWER_BYTES))
        except (EOFError, ConnectionError) as error:
            self._lane.link_ended(self, str(error))
        finally:
            self._sock.close()

    async def _watch(self) -> None:
        """The reader's end asks now and then, so that half-open connections are found out. It may be refused: the chooser lists a lane before
        the other side has heard of it, and only what is read over a lane of a connected endpoint is judged."""
        try:
            while True:
                await asyncio.sleep(1.0)
                if self._lane.is_listed:
                    await self.ask(5.0)
        except (EOFError, ConnectionError, TimeoutError) as error:
            self._lane.link_ended(self, str(error) or "no answer")
        finally:
            self._sock.close()

    async def ask(self, timeout_s: float) -> bytes:
        """Raises `ConnectionError`, `EOFError`, `TimeoutError`."""
        async with asyncio.timeout(timeout_s), self._turn:
            await self._sock.say(ASK)
            return (await self._sock.hear(ANSWER_BYTES)).strip()


class SimLane(SocketLane):
    """`life` is what this side answers; `told` hears (pairing, answer) of each read."""

    def __init__(
        self,
        name: LaneName,
        pairing: Pairing,
        segments: SegmentTable,
        broken: Callable[[str], None],
        dial: Callable[[str, int], Awaitable[BulkSocket]] | None,
        life: bytes,
        told: Callable[[Pairing, bytes], None],
    ) -> None:
        super().__init__(name, pairing, cast("Any", None), segments, broken, dial=dial)
        self.life, self._told = life, told
        self.links: list[Link] = []

    @property
    def is_listed(self) -> bool:
        return self._listed

    def add(self, sock: BulkSocket, *, we_read: bool) -> None:
        link = Link(self, cast("_Socket", sock), we_read=we_read, listed=self._listed)
        self.links.append(link)
        cast("list[Any]", self.pulls if we_read else self.serves).append(link)
        if self._destroyed:
            link.task.cancel()

    def link_ended(self, link: Link, reason: str) -> None:
        mine = cast("list[Any]", self.pulls if link.we_read else self.serves)
        if link in mine:
            mine.remove(link)
        if link in self.links:
            self.links.remove(link)
        if not mine and not self._is_broken and not self._destroyed:
            self._is_broken = True
            self._broken(reason)

    async def read(self, timeout_s: float) -> bytes | None:
        """Who the owner is; None where this lane has nothing to read over. Raises as `Link.ask`."""
        link = next((link for link in self.links if link.we_read), None)
        if link is None or not self._listed:
            return None
        answer = await link.ask(timeout_s)
        self._told(self.pairing, answer)
        return answer

    async def destroy(self) -> None:
        self._destroyed = True
        tasks = [link.task for link in self.links]
        if self._growing is not None:
            tasks.append(self._growing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self.links:
            link.close()  # also of a task that was ended before its first step
        self.links.clear()
        self.pulls.clear()
        self.serves.clear()


class SimKind(SocketKind):
    """The real `SocketKind`: its acceptor, its tokens, its dialling; only the sockets are streams of the simulated host.

    `walled`: addresses that begin so cannot be dialled by anybody, as behind a firewall.
    """

    kind = "sim"
    rank = 1

    def __init__(
        self,
        host: Host,
        me: str,
        life: bytes,
        segments: SegmentTable,
        admission: Admission,
        told: Callable[[Pairing, bytes], None],
        address: str,
        walled: str,
    ) -> None:
        super().__init__(host.clock, me, cast("Any", None), segments, admission, connections=1)
        self._walled = walled
        self._host, self._life, self._told, self._address = host, life, told, address
        self._arrivals = _Arrivals(address)
        self._open: Listener | None = None

    async def start(self) -> None:
        self._open = await self._host.listen(self._address, self._arrive)
        await super().start()

    async def _arrive(self, stream: Stream) -> None:
        sock = _Socket(stream)
        self._arrivals.waiting.put_nowait(sock)
        await sock.closed.wait()

    def listen(self) -> BulkListener:
        return cast("BulkListener", self._arrivals)

    def parameters(self, secret: bytes) -> bytes:
        return msgspec.msgpack.encode(_Offer(self._address, secret))

    async def reach(self, parameters: bytes) -> tuple[BulkSocket, bytes]:
        try:
            offer = msgspec.msgpack.decode(parameters, type=_Offer)
        except msgspec.MsgspecError as error:
            raise RemoteProtocolError(f"the offer is none: {error}") from error
        if offer.address.startswith(self._walled):
            raise LaneUnusable("a wall stands before it")
        return cast("BulkSocket", _Socket(await self._host.connect(offer.address))), offer.secret

    def make_lane(
        self,
        name: LaneName,
        pairing: Pairing,
        broken: Callable[[str], None],
        dial: Callable[[str, int], Awaitable[BulkSocket]] | None,
    ) -> SimLane:
        return SimLane(name, pairing, self._segments, broken, dial, self._life, self._told)

    async def close(self) -> None:
        await super().close()
        if self._open is not None:
            with contextlib.suppress(ConnectionError):
                await self._open.close()
