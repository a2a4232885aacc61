"""How an engine comes to have a peer: looked up, dialled, its endpoint made, evicted when another needs the place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from interlock.core.endpoint_events import Retire
from interlock.core.errors import ChannelFault, InterlockError, LocalProtocolError, StaleError
from interlock.host.base import Host
from interlock.membership.directory import Directory
from interlock.transfer.endpoint import EndpointDriver
from interlock.transfer.lanes.base import LaneKind
from interlock.transfer.link import PeerLink
from interlock.transfer.outcomes import TransferFailed
from interlock.transfer.peer import Peer, PeerStore
from interlock.wire.channel import Channel, Secure
from interlock.wire.identity import Identity

_log = logging.getLogger(__name__)


class Meeting:
    """`serve`: hears a channel of that peer to its end; `begin`: a new endpoint's clock; `secure`: TLS for what is dialled over TCP."""

    def __init__(
        self,
        host: Host,
        me: Identity,
        directory: Directory,
        token: bytes,
        kinds: dict[str, LaneKind],
        peers: PeerStore,
        serve: Callable[[Channel, str], Awaitable[None]],
        begin: Callable[[Peer], None],
        secure: Secure | None = None,
    ) -> None:
        self._host, self._me, self._directory, self._token = host, me, directory, token
        self._kinds, self._peers = kinds, peers
        self._serve, self._begin = serve, begin
        self._secure = secure
        self._attempts = 0
        self._over: StaleError | None = None
        self._evictions: set[asyncio.Task[None]] = set()

    def get(self, name: str) -> Peer:
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
            self._secure,
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
            eviction = asyncio.create_task(self._evict(victim))
            self._evictions.add(eviction)
            eviction.add_done_callback(self._evictions.discard)
        self._begin(peer)
        return peer

    async def known(self, name: str, timeout_s: float) -> Peer:
        """A peer that can be dialled, or came by itself. Raises `TransferFailed` with the directory's words."""
        there = self._peers.get(name)
        if there is None or not there.link.is_up:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._directory.address_of(name)
            except (InterlockError, OSError, TimeoutError) as error:
                why = str(error) or f"the directory did not say within {timeout_s} s where {name} is"
                raise TransferFailed("unreachable", why, peer=name, retryable=True) from error
        return self.get(name)

    async def _evict(self, peer: Peer) -> None:
        peer.driver.tell(Retire("another endpoint needed its place"))
        await peer.close()

    async def close(self) -> None:
        """Returns when nothing is left of peers that were evicted."""
        await asyncio.gather(*self._evictions, return_exceptions=True)

    async def ask(self, peer: str, body: msgspec.Struct, timeout_s: float) -> tuple[Any, int]:
        """(the answer, the life of who gave it)."""
        begun_s = self._host.clock.monotonic_s()
        there = await self.known(peer, timeout_s)
        left_s = timeout_s - (self._host.clock.monotonic_s() - begun_s)
        try:
            with there.used():
                return await there.link.request(body, max(0.0, left_s))
        except (TimeoutError, ConnectionError) as error:
            raise TransferFailed("unreachable", str(error), peer=peer, retryable=True) from error
        except ChannelFault as fault:
            raise TransferFailed("refused", str(fault), peer=peer) from fault

    def moved(self, peer: str) -> None:
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
