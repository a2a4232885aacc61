"""The coordinator's directory, from a peer's side: announces this engine, finds others, hears of moves.

Remembered is only what the coordinator said last; it is forgotten when nobody, or somebody else, was there, when the coordinator says that
the peer moved, and when the channel to the coordinator was lost (what was said meanwhile was missed). While the coordinator is away what
is remembered still serves: a restart of the coordinator stops no transfer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.limits import (
    DIRECTORY_LEASE_SECONDS,
    HELLO_SECONDS_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
)
from interlock.host.base import Host
from interlock.membership.directory import UnknownPeer
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.fleet_messages import Announce, FindPeer, PeerAddress
from interlock.wire.identity import Identity

_log = logging.getLogger(__name__)


class CoordinatorDirectory:
    """`announce` is asked for this engine's own address at each announcement; empty: it is not announced (a mere client)."""

    def __init__(
        self, host: Host, me: Identity, coordinator: str, announce: Callable[[], str], token: bytes = b""
    ) -> None:
        self._host, self._me, self._coordinator = host, me, coordinator
        self._own_address, self._token = announce, token
        self._known: dict[str, str] = {}
        self._watchers: list[Callable[[str], None]] = []
        self._channel: Channel | None = None
        self._up = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.last_error = "not connected yet"

    async def start(self) -> None:
        """Begins to announce and to listen; an absent coordinator is asked again and again."""
        self._tasks = [asyncio.create_task(self._run(), name="directory")]

    async def close(self) -> None:
        """Ends both. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- Directory -------------------------------------------------------------------------------------------------

    async def address_of(self, peer: str) -> str:
        """As the coordinator said last. Raises `UnknownPeer`."""
        known = self._known.get(peer)
        if known is not None:
            return known
        try:
            async with asyncio.timeout(HELLO_SECONDS_MAX):
                await self._up.wait()
                assert self._channel is not None
                found = await self._channel.request(FindPeer(peer), HELLO_SECONDS_MAX)
        except ChannelFault as fault:
            raise UnknownPeer(str(fault), peer=peer, retryable=True) from fault
        except (TimeoutError, InterlockError) as error:
            why = str(error) or self.last_error
            raise UnknownPeer(
                f"the coordinator at {self._coordinator} could not be asked for {peer}: {why}", peer=peer
            ) from error
        if not isinstance(found, PeerAddress) or found.name != peer:
            raise UnknownPeer(f"the coordinator answered with something else than where {peer} is", peer=peer)
        self._known[peer] = found.address
        return found.address

    def invalidate(self, peer: str, address: str) -> None:
        """Nobody, or somebody else, was there: that address is forgotten."""
        if self._known.get(peer) == address:
            del self._known[peer]

    def watch(self, changed: Callable[[str], None]) -> None:
        """`changed` is called with the name of a peer whose address is another one."""
        self._watchers.append(changed)

    # --- the channel -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        pause_s = RECONNECT_SECONDS_MIN
        while True:
            try:
                channel = await connect_channel(
                    self._host,
                    self._coordinator,
                    me=self._me,
                    role="transfer",
                    accept=PeerAddress,
                    deadline_s=HELLO_SECONDS_MAX,
                    token=self._token,
                )
            except (OSError, TimeoutError, InterlockError) as error:
                self.last_error = str(error)
            else:
                pause_s = RECONNECT_SECONDS_MIN
                await self._follow(channel)
            await self._host.clock.sleep_s(pause_s * (0.5 + random.random()))
            pause_s = min(2 * pause_s, RECONNECT_SECONDS_MAX)

    async def _follow(self, channel: Channel) -> None:
        announcing = asyncio.create_task(self._announce(channel))
        for peer in list(self._known):  # what was said while we were away was missed
            self._moved(peer, None)
        self._channel = channel
        self._up.set()
        try:
            async for received in channel.messages():
                if isinstance(received.body, PeerAddress):
                    self._moved(received.body.name, received.body.address)
        except InterlockError as error:
            self.last_error = str(error)
        finally:
            self._up.clear()
            self._channel = None
            announcing.cancel()
            await asyncio.gather(announcing, return_exceptions=True)
            await channel.close()

    def _moved(self, peer: str, address: str | None) -> None:
        if address is None:
            self._known.pop(peer, None)
            return
        if peer in self._known:
            self._known[peer] = address
        for changed in self._watchers:
            changed(peer)

    async def _announce(self, channel: Channel) -> None:
        try:
            while True:
                address = self._own_address()
                if address:
                    await channel.send(Announce(address))
                await self._host.clock.sleep_s(DIRECTORY_LEASE_SECONDS / 3)
        except InterlockError as error:
            _log.info("this engine could not be announced: %s", error)
