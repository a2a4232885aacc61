"""`TransferEngine`: the asynchronous face. Offers segments, opens endpoints, reads, writes, notifies, explains.

    engine = TransferEngine(host, me, "tcp:10.0.0.5:7400", directory=StaticDirectory({"b": "tcp:10.0.0.6:7400"}), token=secret)
    await engine.start()
    (segment,) = await engine.segments_of("b", "kv", timeout_s=5)
    transfer = engine.read([Part(segment, buffer, rows)], timeout_s=5)
    (await transfer.outcome()).check()
    await transfer.release()      # only now may `buffer` be used for something else

Any number of engines may live in a process; they share its threads for bulk bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from interlock.core.endpoint_events import Retire
from interlock.core.endpoint_state import Stamp
from interlock.core.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    StaleError,
)
from interlock.core.limits import (
    ENDPOINTS_MAX,
    SEGMENT_RELEASE_SECONDS_MAX,
    TRANSFER_SECONDS_DEFAULT,
)
from interlock.host.base import Host, Listener
from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import borrow_pool, return_pool
from interlock.host.bulk_tls import TlsFiles
from interlock.host.threads import monotonic_s
from interlock.membership.directory import Directory, StaticDirectory
from interlock.transfer.explaining import explain_peer
from interlock.transfer.hearing import Hearing
from interlock.transfer.lanes.base import LaneKind
from interlock.transfer.lanes.greeting import LaneHello, LaneWelcome
from interlock.transfer.lanes.kinds import LaneOptions, control_tls, make_kinds
from interlock.transfer.meeting import Meeting
from interlock.transfer.notices import Notice, Notices
from interlock.transfer.outcomes import Outcome, Transfer, TransferFailed, check_timeout
from interlock.transfer.peer import PeerStore
from interlock.transfer.pieces import Part, make_plan
from interlock.transfer.prepared import PreparedRead
from interlock.transfer.pulling import Pulls, Write, Writes
from interlock.transfer.reading import Readings, Wanted
from interlock.transfer.segments import RemoteSegment, Segment, SegmentTable
from interlock.transfer.ticks import Ticks
from interlock.wire.channel import Channel, serve_channels
from interlock.wire.identity import Identity
from interlock.wire.transfer_messages import (
    Answer,
    Ask,
    AskEcho,
    FindSegments,
    FoundSegments,
    TransferWord,
)

_log = logging.getLogger(__name__)

__all__ = ["LaneOptions", "Notice", "Part", "PreparedRead", "TlsFiles", "TransferEngine", "TransferFailed"]


class TransferEngine:
    """`me`: who this is, in which life; `address`: where it is dialled for control ("unix:/…", or "tcp:host:port" with a `token`)."""

    def __init__(
        self,
        host: Host,
        me: Identity,
        address: str,
        *,
        directory: Directory | None = None,
        token: bytes = b"",
        lanes: LaneOptions | None = None,
        endpoints_max: int = ENDPOINTS_MAX,
    ) -> None:
        self._host, self._me, self._address = host, me, address
        self._directory: Directory = directory if directory is not None else StaticDirectory()
        self._token = token
        self._options = lanes or LaneOptions()
        self._dials, self._listens = control_tls(self._options.tls)
        self.segments = SegmentTable(me.name)
        self._kinds: dict[str, LaneKind] = {}
        self._peers = PeerStore(endpoints_max)
        self._notices = Notices()
        self._listener: Listener | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ticks = Ticks(host.clock, self._peers)
        self._running = False
        self._closing = asyncio.Lock()
        self._readings: Readings | None = None
        self._writes = Writes()
        self._pulls = Pulls(self.segments, self._read_for)
        self._hearing = Hearing(
            self._peers,
            self.segments,
            self._notices,
            self._pulls,
            self._writes,
            self._ticks,
            self._spawn,
        )
        self._meeting = Meeting(
            host,
            me,
            self._directory,
            token,
            self._kinds,
            self._peers,
            self._hearing.serve,
            self._ticks.begin,
            self._dials,
        )

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens, for control and for each kind of lane. Raises `OSError` when an address cannot be had."""
        self._readings = Readings()
        self.segments.incarnation = self._me.incarnation
        pool = borrow_pool()
        self._running = True
        try:
            self._kinds.update(
                make_kinds(self._options, self._host, self._me.name, pool, self.segments, self, self._address)
            )
            for kind in list(self._kinds.values()):
                await kind.start()
            self._listener = await serve_channels(
                self._host,
                self._address,
                me=self._me,
                accept=TransferWord,
                on_channel=self._on_channel,
                token=self._token,
                secure=self._listens if self._address.startswith("tcp:") else None,
            )
        except BaseException:
            await self.close()
            raise
        self._directory.watch(self._meeting.moved)
        self._spawn(self._ticks.run())

    async def close(self) -> None:
        """Ends transfers ("closed"), takes all segments back, destroys lanes, closes channels.

        Returns when nothing of ours touches any buffer, and no peer is given anything of them.
        """
        async with self._closing:  # who closes it a second time waits for the first, too
            if self._running:
                await self._close()

    async def _close(self) -> None:
        self._running = False
        self.segments.revoke_all()
        if self._readings is not None:
            await self._readings.close()
        await self._pulls.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for kind in self._kinds.values():
            await kind.close()
        for peer in self._peers:
            await peer.driver.close()
        await self._meeting.close()
        await self._writes.close()
        if self._listener is not None:
            await self._listener.close()
        for peer in self._peers:
            await peer.link.close()
        return_pool()

    @property
    def address(self) -> str:
        """Where it listens; with the port it got."""
        return self._listener.address if self._listener is not None else self._address

    @property
    def name(self) -> str:
        """Ours, as peers know us."""
        return self._me.name

    @property
    def loop_bound(self) -> Readings:
        """The reads under way. Raises `LocalProtocolError` before `start`."""
        if self._readings is None or not self._running:
            raise LocalProtocolError("this engine is not running", hint="start it, and do not close it")
        return self._readings

    # --- segments --------------------------------------------------------------------------------------------------

    def register(self, buffer: Any, label: str = "", *, takes_writes: bool = False) -> Segment:
        """Offers `buffer` (see `memory_of`) to every peer. Raises `LocalProtocolError`."""
        return self.segments.register(buffer, label, takes_writes=takes_writes)

    async def unregister(self, segment: Segment, timeout_s: float = SEGMENT_RELEASE_SECONDS_MAX) -> None:
        """No piece of it is given from now on; returns when nothing reads it any more, so that it may be used otherwise.

        Connections that still send from it after half of `timeout_s` are ended. Raises `TimeoutError`: it must be kept.
        """
        readers = self.segments.revoke(segment)
        if not readers:
            return
        released = asyncio.wrap_future(segment.released)
        try:
            async with asyncio.timeout(timeout_s / 2):
                await asyncio.shield(released)
                return
        except TimeoutError:
            pass
        for reader in list(segment.readers):
            reader.end(f"{segment} was unregistered")
        try:
            async with asyncio.timeout(timeout_s / 2):
                await asyncio.shield(released)
        except TimeoutError:
            raise TimeoutError(
                f"{segment} is still read by {len(segment.readers)} peers; keep its memory"
            ) from None

    async def segments_of(
        self, peer: str, label: str = "", *, timeout_s: float = TRANSFER_SECONDS_DEFAULT
    ) -> list[RemoteSegment]:
        """What `peer` offers under that label. Raises `TransferFailed`."""
        found = await self._meeting.ask(peer, FindSegments(label), timeout_s)
        if not isinstance(found[0], FoundSegments):
            raise RemoteProtocolError(f"{peer} answered with a {type(found[0]).__name__}")
        return [RemoteSegment(peer, found[1], *each) for each in found[0].segments]

    # --- endpoints -------------------------------------------------------------------------------------------------

    async def open(self, peer: str, *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        """Returns when both sides agree on one connection. Raises `TransferFailed` ("unreachable", "deadline"), `StaleError`.

        Reading opens by itself. Many who open at once share one handshake.
        """
        begun_s = self._host.clock.monotonic_s()
        there = await self._meeting.known(peer, timeout_s)
        try:
            async with asyncio.timeout(timeout_s - (self._host.clock.monotonic_s() - begun_s)):
                await there.driver.open()
        except TimeoutError:
            why = there.link.trouble or there.driver.ended or "no answer"
            raise TransferFailed(
                "deadline", f"{peer} was not connected within {timeout_s} s: {why}", peer=peer, retryable=True
            ) from None
        except TransferFailed as failed:
            if there.link.trouble and not there.link.is_up:
                raise TransferFailed(
                    failed.code, f"{failed}: {there.link.trouble}", peer=peer, retryable=True
                ) from failed
            raise

    def retire(self, peer: str, reason: str = "it is not wanted any more") -> None:
        """Ends the connection to `peer`; the next read opens another."""
        there = self._peers.look(peer)
        if there is not None:
            there.driver.tell(Retire(reason))

    def is_connected(self, peer: str) -> bool:
        """Is there a usable endpoint to that peer now? Opens nothing."""
        there = self._peers.look(peer)
        return there is not None and there.driver.is_connected

    def stamps(self, peer: str) -> tuple[Stamp, Stamp] | None:
        """(ours, the peer's) of the connection that stands, or None. Equal, the other way round, at the peer."""
        there = self._peers.look(peer)
        if there is None or not there.driver.is_connected or there.driver.state.theirs is None:
            return None
        return there.driver.state.stamp, there.driver.state.theirs

    # --- bytes -----------------------------------------------------------------------------------------------------

    def prepare(self, parts: Sequence[Part]) -> PreparedRead:
        """For reads that are done often: what `read` would find out about the pieces each time is found out once.

        Nothing is promised for it: the owner may unregister, restart or be away, and each read says so. Raises `LocalProtocolError`.
        """
        return PreparedRead(make_plan(parts))

    def read(self, what: Wanted, *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> Transfer:
        """Begins to read pieces of one peer's segments (parts, or what `prepare` made of them) into local memory; see `Transfer` for
        its two ends.

        Raises `LocalProtocolError` for pieces that cannot be; what befalls the transfer stands in its outcome.
        """
        peer = self._meeting.get(_owner(what))
        transfer = self.loop_bound.begin(peer, what, timeout_s)
        if not transfer.released:
            self.loop_bound.watch(peer, transfer)
        return transfer

    def read_here(self, what: Wanted, timeout_s: float) -> Transfer | None:
        """From another thread than the loop's, which may do the work itself; None: the peer is not known here yet."""
        peer = self._peers.look(_owner(what))
        if peer is None or not peer.driver.usable:
            return None
        return self.loop_bound.begin(peer, what, timeout_s, here=True)

    def read_now(self, prepared: PreparedRead, timeout_s: float) -> Outcome | None:
        """As `read_here`, all of it at once, which is its release, too; None: the best lane is none that can, or not now."""
        check_timeout(timeout_s)
        peer = self._peers.look(prepared.plan.owner)
        usable = peer.driver.usable if peer is not None else ()
        if peer is None or not usable:
            return None
        peer.visited = True
        peer.begin_use()
        try:
            return usable[0].read_now(prepared, monotonic_s() + timeout_s)
        finally:
            peer.end_use()

    def write(
        self,
        target: RemoteSegment,
        source: Segment,
        pieces: Any = None,
        *,
        timeout_s: float = TRANSFER_SECONDS_DEFAULT,
    ) -> Write:
        """Asks the owner of `target` to read `pieces` (remote offset, local offset, bytes) of our registered `source`.

        The source must not change before the release. Raises `LocalProtocolError`.
        """
        if not self.segments.has(source):
            raise LocalProtocolError(f"{source} is not registered with this engine", hint="register it first")
        return self._writes.begin(target, source, pieces, timeout_s, self._meeting.get(target.owner))

    async def notify(self, peer: str, payload: bytes, *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        """Returns when the peer acknowledged it; there it is delivered once. Raises `TransferFailed`."""
        there = await self._meeting.known(peer, timeout_s)
        with there.used():
            await self._notices.send(peer, payload, timeout_s, there.link.post)

    async def notices(self) -> AsyncIterator[Notice]:
        """What peers notify us of, in the order in which it came."""
        while True:
            yield await self._notices.next()

    async def ping(self, peer: str, *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> float:
        """Seconds to the peer and back, over the control channel. Raises `TransferFailed`."""
        begun_s = self._host.clock.monotonic_s()
        await self._meeting.ask(peer, AskEcho(), timeout_s)
        return self._host.clock.monotonic_s() - begun_s

    # --- for what is built on this ---------------------------------------------------------------------------------

    def answer_with(self, answer: Callable[[Identity, bytes], Awaitable[bytes]]) -> None:
        """`answer(who asks, payload)` is called for each `ask` of a peer; what it raises of ours becomes the peer's `TransferFailed`."""
        self._hearing.answer = answer

    async def ask(self, peer: str, payload: bytes, *, timeout_s: float) -> tuple[bytes, int]:
        """The peer's answer, and the life that gave it. Raises `TransferFailed`."""
        answer, incarnation = await self._meeting.ask(peer, Ask(payload), timeout_s)
        if not isinstance(answer, Answer):
            raise TransferFailed("refused", f"{peer} answered with a {type(answer).__name__}", peer=peer)
        return answer.payload, incarnation

    # --- what there is ---------------------------------------------------------------------------------------------

    def peers(self) -> list[str]:
        """Those there is an endpoint for, by name."""
        return sorted(peer.name for peer in self._peers)

    def explain(self, peer: str) -> list[str]:
        """In sentences: how `peer` is reached, over which lanes, and why not over others."""
        there = self._peers.look(peer)
        if there is None:
            return [f"nothing was ever asked of {peer}, nor did it ask"]
        return explain_peer(there, self._kinds, self._options)

    def check_integrity(self) -> None:
        """At idle. Raises `AssertionError` when something is held that nobody needs."""
        self.segments.check_integrity()
        assert self._readings is None or not self._readings.under_way, "a transfer was never released"

    # --- what is heard ---------------------------------------------------------------------------------------------

    async def _on_channel(self, channel: Channel) -> None:
        try:
            peer = self._meeting.get(channel.peer.name)
        except (LocalProtocolError, StaleError) as error:
            _log.warning("%s was turned away: %s", channel.peer, error)
            return
        await peer.link.attend(channel, dialled=False)

    async def judge(self, hello: LaneHello) -> LaneWelcome:
        """For lanes' acceptors."""
        peer = self._peers.look(hello.sender)
        if peer is None:
            return LaneWelcome(f"{self._me.name} has no endpoint to {hello.sender}")
        return await peer.driver.judge(hello)

    def arrived(self, hello: LaneHello, sock: BulkSocket) -> None:
        peer = self._peers.look(hello.sender)
        if peer is None or not self._running:
            sock.close()
        else:
            peer.driver.arrived(hello, sock)

    def _read_for(self, peer: str, parts: list[Part], timeout_s: float) -> Transfer:
        there = self._meeting.get(peer)
        transfer = self.loop_bound.begin(there, parts, timeout_s)
        self.loop_bound.watch(there, transfer)
        return transfer

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _owner(what: Wanted) -> str:
    if isinstance(what, PreparedRead):
        return what.plan.owner
    if not what:
        raise LocalProtocolError("a transfer of nothing is no transfer", hint="give at least one part")
    return what[0].segment.owner
