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
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from interlock.core.endpoint_events import Retire
from interlock.core.endpoint_state import Phase, Stamp
from interlock.core.errors import (
    ChannelClosed,
    ChannelFault,
    InterlockError,
    LocalProtocolError,
    RemoteProtocolError,
    StaleError,
)
from interlock.core.limits import (
    ENDPOINTS_MAX,
    HEARTBEAT_SECONDS,
    QUESTIONS_UNDER_WAY_MAX,
    SEGMENT_RELEASE_SECONDS_MAX,
    TRANSFER_SECONDS_DEFAULT,
)
from interlock.host.base import Host, Listener
from interlock.host.bulk import BulkSocket
from interlock.host.bulk_pool import borrow_pool, return_pool
from interlock.host.bulk_tls import TlsFiles
from interlock.membership.directory import Directory, StaticDirectory
from interlock.transfer.endpoint import EndpointDriver
from interlock.transfer.lanes.base import LaneKind
from interlock.transfer.lanes.greeting import LaneHello, LaneWelcome
from interlock.transfer.lanes.kinds import LaneOptions, make_kinds
from interlock.transfer.link import PeerLink
from interlock.transfer.notices import Notice, Notices
from interlock.transfer.outcomes import Transfer, TransferFailed
from interlock.transfer.peer import Peer, PeerStore
from interlock.transfer.pieces import Part
from interlock.transfer.pulling import Pulls, Write, Writes
from interlock.transfer.reading import Readings
from interlock.transfer.segments import RemoteSegment, Segment, SegmentTable
from interlock.wire.channel import Channel, Received, serve_channels
from interlock.wire.identity import Identity
from interlock.wire.transfer_messages import (
    Answer,
    Ask,
    AskEcho,
    Echo,
    FindSegments,
    FoundSegments,
    Notified,
    Notify,
    Pull,
    Pulled,
    Said,
    TransferWord,
    from_wire,
)

HANDSHAKE_TICK_SECONDS = 0.25
"""How often an endpoint that is not connected yet says again what it says."""
TICK_GRAIN_SECONDS = 0.02
"""Endpoints that are due within it are looked at together: a thousand that open must not each cost a look at all."""
HANDSHAKE_TICK_SECONDS_MAX = 2.0
STEADY = (Phase.IDLE, Phase.CONNECTED, Phase.CLOSED)
_log = logging.getLogger(__name__)

__all__ = ["LaneOptions", "Notice", "Part", "TlsFiles", "TransferEngine", "TransferFailed"]


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
        self.segments = SegmentTable(me.name)
        self._kinds: dict[str, LaneKind] = {}
        self._peers = PeerStore(endpoints_max)
        self._attempts = 0
        self._notices = Notices()
        self._listener: Listener | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._due = asyncio.Event()
        self._next_s = 0.0
        self._over: StaleError | None = None
        self._running = False
        self._readings: Readings | None = None
        self._writes = Writes()
        self._answer: Callable[[Identity, bytes], Awaitable[bytes]] | None = None
        self._pulls = Pulls(self.segments, self._read_for)

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens, for control and for each kind of lane. Raises `OSError` when an address cannot be had."""
        self._readings = Readings()
        self.segments.incarnation = self._me.incarnation
        pool = borrow_pool()
        self._running = True
        try:
            self._kinds = make_kinds(
                self._options, self._host, self._me.name, pool, self.segments, self, self._address
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
            )
        except BaseException:
            await self.close()
            raise
        self._directory.watch(self._moved)
        self._spawn(self._tick())

    async def close(self) -> None:
        """Ends transfers ("closed"), destroys lanes, closes channels. Returns when nothing of ours touches any buffer."""
        if not self._running:
            return
        self._running = False
        if self._readings is not None:
            await self._readings.close()
        await self._writes.close()
        await self._pulls.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for kind in self._kinds.values():
            await kind.close()
        for peer in self._peers:
            await peer.driver.close()
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
        return self._me.name

    @property
    def loop_bound(self) -> Readings:
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
        found = await self._ask(peer, FindSegments(label), timeout_s)
        if not isinstance(found[0], FoundSegments):
            raise RemoteProtocolError(f"{peer} answered with a {type(found[0]).__name__}")
        return [RemoteSegment(peer, found[1], *each) for each in found[0].segments]

    # --- endpoints -------------------------------------------------------------------------------------------------

    async def open(self, peer: str, *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        """Returns when both sides agree on one connection. Raises `TransferFailed` ("unreachable", "deadline"), `StaleError`.

        Reading opens by itself. Many who open at once share one handshake.
        """
        there = await self._known(peer)
        try:
            async with asyncio.timeout(timeout_s):
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
        there = self._peers.look(peer)
        return there is not None and there.driver.is_connected

    def stamps(self, peer: str) -> tuple[Stamp, Stamp] | None:
        """(ours, the peer's) of the connection that stands, or None. Equal, the other way round, at the peer."""
        there = self._peers.look(peer)
        if there is None or not there.driver.is_connected or there.driver.state.theirs is None:
            return None
        return there.driver.state.stamp, there.driver.state.theirs

    # --- bytes -----------------------------------------------------------------------------------------------------

    def read(self, parts: Sequence[Part], *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> Transfer:
        """Begins to read pieces of one peer's segments into local memory; see `Transfer` for its two ends.

        Raises `LocalProtocolError` for pieces that cannot be; what befalls the transfer stands in its outcome.
        """
        if not parts:
            raise LocalProtocolError("a transfer of nothing is no transfer", hint="give at least one part")
        peer = self._peer(parts[0].segment.owner)
        transfer = self.loop_bound.begin(peer, parts, timeout_s)
        if not transfer.released:
            self.loop_bound.watch(peer, transfer)
        return transfer

    def read_here(self, parts: Sequence[Part], timeout_s: float) -> Transfer | None:
        """From another thread than the loop's, which may do the work itself; None: the peer is not known here yet."""
        peer = self._peers.look(parts[0].segment.owner) if parts else None
        if peer is None or not peer.driver.usable:
            return None
        return self.loop_bound.begin(peer, parts, timeout_s, here=True)

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
        peer = self._peer(target.owner)

        def life() -> int:
            theirs = peer.driver.state.theirs
            return theirs.incarnation if theirs is not None else 0

        return self._writes.begin(target, source, pieces, timeout_s, peer.link.post, life)

    async def notify(self, peer: str, payload: bytes, *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> None:
        """Returns when the peer acknowledged it; there it is delivered once. Raises `TransferFailed`."""
        there = await self._known(peer)
        await self._notices.send(peer, payload, timeout_s, there.link.post)

    async def notices(self) -> AsyncIterator[Notice]:
        """What peers notify us of, in the order in which it came."""
        while True:
            yield await self._notices.next()

    async def ping(self, peer: str, *, timeout_s: float = TRANSFER_SECONDS_DEFAULT) -> float:
        """Seconds to the peer and back, over the control channel. Raises `TransferFailed`."""
        begun_s = self._host.clock.monotonic_s()
        await self._ask(peer, AskEcho(), timeout_s)
        return self._host.clock.monotonic_s() - begun_s

    # --- for what is built on this ---------------------------------------------------------------------------------

    def answer_with(self, answer: Callable[[Identity, bytes], Awaitable[bytes]]) -> None:
        """`answer(who asks, payload)` is called for each `ask` of a peer; what it raises of ours becomes the peer's `TransferFailed`."""
        self._answer = answer

    async def ask(self, peer: str, payload: bytes, *, timeout_s: float) -> tuple[bytes, int]:
        """The peer's answer, and the life that gave it. Raises `TransferFailed`."""
        answer, incarnation = await self._ask(peer, Ask(payload), timeout_s)
        if not isinstance(answer, Answer):
            raise TransferFailed("refused", f"{peer} answered with a {type(answer).__name__}", peer=peer)
        return answer.payload, incarnation

    async def _answer_one(self, channel: Channel, received: Received, peer: Peer) -> None:
        """In a task of its own: an answer may wait, and other words must not."""
        assert self._answer is not None
        peer.questions += 1
        try:
            payload = await self._answer(channel.peer, received.body.payload)
            await channel.reply(received, Answer(payload))
        except ChannelClosed:
            return
        except InterlockError as error:
            await self._fault(channel, received, "refused", str(error), error.retryable)
        except Exception:
            _log.exception("a question of %s could not be answered", channel.peer)
            await self._fault(channel, received, "failed", "the answer failed; see the log there", False)
        finally:
            peer.questions -= 1

    async def _fault(self, channel: Channel, received: Received, code: str, why: str, again: bool) -> None:
        with contextlib.suppress(ChannelClosed):
            await channel.fault(received, code, why, again)

    # --- what there is ---------------------------------------------------------------------------------------------

    def peers(self) -> list[str]:
        return sorted(peer.name for peer in self._peers)

    def explain(self, peer: str) -> list[str]:
        """In sentences: how `peer` is reached, over which lanes, and why not over others."""
        there = self._peers.look(peer)
        if there is None:
            return [f"nothing was ever asked of {peer}, nor did it ask"]
        state = there.driver.state
        words = [
            f"endpoint to {peer}: {state.phase} as {state.stamp}"
            + (f" with {state.theirs}" if state.theirs else "")
        ]
        if there.driver.ended and state.phase is not Phase.CONNECTED:
            words.append(f"the endpoint before it was retired: {there.driver.ended}")
        if there.link.trouble:
            words.append(f"its control channel: {there.link.trouble}")
        for lane in there.driver.usable:
            words += lane.explain()
        ours = set(self._kinds)
        theirs = {offer.kind for offer in state.their_offers}
        for kind in sorted(ours | theirs):
            if kind in there.driver.refused:
                words.append(f"{kind} is not used: {there.driver.refused[kind]}")
            elif kind not in ours:
                words.append(f"{kind} is not used: this side has it not ({self._options.why_not(kind)})")
            elif theirs and kind not in theirs:
                words.append(f"{kind} is not used: {peer} does not offer it")
        return words

    def check_integrity(self) -> None:
        """At idle. Raises `AssertionError` when something is held that nobody needs."""
        self.segments.check_integrity()
        assert self._readings is None or not self._readings.under_way, "a transfer was never released"

    # --- peers -----------------------------------------------------------------------------------------------------

    def _peer(self, name: str) -> Peer:
        """What there is of that peer, made if there is nothing. Raises `LocalProtocolError` when there is no room."""
        if self._over is not None:
            raise self._over
        there = self._peers.get(name)
        if there is not None:
            return there
        if name == self._me.name:
            raise LocalProtocolError(f"{name} is this engine itself", hint="copy the memory instead")
        self._attempts += 1
        link = PeerLink(
            self._host,
            self._me,
            name,
            self._directory,
            self._token,
            lambda channel: self._serve(channel, name),
            self._superseded,
        )
        driver = EndpointDriver(
            self._host.clock,
            self._me.name,
            name,
            self._me.incarnation,
            self._attempts * 1_000_000,
            self._kinds,
            link.post,
            lambda highest: self._superseded(
                StaleError(
                    f"{name} knows a newer life of {self._me.name}",
                    highest=highest.incarnation,
                    hint="stop this process",
                )
            ),
        )
        peer = Peer(name, link, driver)
        victim = self._peers.add(peer)
        if victim is not None:
            self._spawn(self._evict(victim))
        peer.next_tick_s = self._host.clock.monotonic_s() + HANDSHAKE_TICK_SECONDS
        if self._next_s > peer.next_tick_s + TICK_GRAIN_SECONDS:
            self._due.set()
        return peer

    async def _known(self, name: str) -> Peer:
        """A peer that can be dialled, or came by itself. Raises `TransferFailed` with the directory's words."""
        there = self._peers.get(name)
        if there is None or not there.link.is_up:
            try:
                await self._directory.address_of(name)
            except (InterlockError, OSError, TimeoutError) as error:
                raise TransferFailed("unreachable", str(error), peer=name) from error
        return self._peer(name)

    async def _evict(self, peer: Peer) -> None:
        peer.driver.tell(Retire("another endpoint needed its place"))
        await peer.close()

    async def _ask(self, peer: str, body: msgspec.Struct, timeout_s: float) -> tuple[Any, int]:
        """(the answer, the life of who gave it)."""
        there = await self._known(peer)
        try:
            return await there.link.request(body, timeout_s)
        except (TimeoutError, ConnectionError) as error:
            raise TransferFailed("unreachable", str(error), peer=peer, retryable=True) from error
        except ChannelFault as fault:
            raise TransferFailed("refused", str(fault), peer=peer) from fault

    def _moved(self, peer: str) -> None:
        there = self._peers.look(peer)
        if there is not None:
            there.link.moved()

    def _superseded(self, error: StaleError) -> None:
        """A newer life of this name is known somewhere: this one is over, and says so to whoever asks it for anything."""
        if self._over is None:
            _log.error("%s", error)
            self._over = error
            self._me.outlived(error.highest)
            for peer in self._peers:
                peer.driver.tell(Retire("a newer life of this process is known"))

    # --- what is heard ---------------------------------------------------------------------------------------------

    async def _on_channel(self, channel: Channel) -> None:
        try:
            peer = self._peer(channel.peer.name)
        except (LocalProtocolError, StaleError) as error:
            _log.warning("%s was turned away: %s", channel.peer, error)
            return
        await peer.link.attend(channel, dialled=False)

    async def _serve(self, channel: Channel, name: str) -> None:
        async for received in channel.messages():
            peer = self._peers.look(name)
            if peer is None:
                return
            try:
                await self._hear(channel, received, peer)
            except ChannelClosed:
                return
            except RemoteProtocolError as error:
                _log.warning("%s", error)
                return

    async def _hear(self, channel: Channel, received: Received, peer: Peer) -> None:
        match received.body:
            case Said() as said:
                peer.driver.tell(from_wire(peer.name, channel.peer.incarnation, said))
                self._sooner(peer)
            case Notify() as said:
                notified = self._notices.arrived(channel.peer, said)
                if notified is not None:
                    await channel.send(notified)
            case Notified(number):
                self._notices.acknowledged(peer.name, number)
            case FindSegments(label):
                found = self.segments.find(label)
                rows = [(s.number, s.size_bytes, s.label, s.takes_writes) for s in found]
                await channel.reply(received, FoundSegments(rows))
            case Pull() as said:
                self._pulls.asked(channel.peer, said, peer.link.post)
            case Pulled() as said:
                self._writes.answered(channel.peer, said)
            case Ask() if self._answer is None or peer.questions >= QUESTIONS_UNDER_WAY_MAX:
                why = "nobody answers questions here" if self._answer is None else "too many at a time"
                await channel.fault(received, "refused", why, retryable=self._answer is not None)
            case Ask():
                self._spawn(self._answer_one(channel, received, peer))
            case AskEcho():
                await channel.reply(received, Echo())

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
        there = self._peer(peer)
        transfer = self.loop_bound.begin(there, parts, timeout_s)
        self.loop_bound.watch(there, transfer)
        return transfer

    # --- time ------------------------------------------------------------------------------------------------------

    def _sooner(self, peer: Peer) -> None:
        """An endpoint that is not connected yet speaks more often than one that is."""
        if peer.driver.state.phase in STEADY or peer.repeats:
            return
        next_s = self._host.clock.monotonic_s() + HANDSHAKE_TICK_SECONDS
        if peer.next_tick_s > next_s:
            peer.next_tick_s = next_s
        if self._next_s > peer.next_tick_s + TICK_GRAIN_SECONDS:
            self._due.set()

    def _pause_s(self, peer: Peer) -> float:
        """Words are seldom lost, and late when there are many: who repeats them at a fixed pace drowns a busy peer (a thousand that
        open at once never got through). So each repetition of a handshake waits twice as long as the one before."""
        if peer.driver.state.phase in STEADY:
            peer.repeats = 0
            return HEARTBEAT_SECONDS
        peer.repeats += 1
        return min(HANDSHAKE_TICK_SECONDS * float(2**peer.repeats), HANDSHAKE_TICK_SECONDS_MAX)

    async def _tick(self) -> None:
        """Each endpoint says what it says about every heartbeat, more often while it is not connected, each at its own moments."""
        while True:
            now_s = self._host.clock.monotonic_s()
            self._next_s = now_s + HEARTBEAT_SECONDS
            for peer in self._peers:
                if peer.next_tick_s <= now_s:
                    try:
                        peer.driver.tick()
                    except Exception:  # a defect of ours must not stop the other endpoints' clocks
                        _log.exception("a tick of the endpoint to %s failed", peer.name)
                    peer.next_tick_s = now_s + self._pause_s(peer) * (0.75 + 0.5 * random.random())
                self._next_s = min(self._next_s, peer.next_tick_s)
            self._due.clear()
            try:
                async with asyncio.timeout(max(TICK_GRAIN_SECONDS, self._next_s - now_s)):
                    await self._due.wait()
            except TimeoutError:
                pass

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
