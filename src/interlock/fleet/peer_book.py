"""The coordinator's list of transfer engines: where each was last announced, in which life, and who wants to hear of moves.

It is a hint, not membership: an entry lapses when it is not repeated, a lower incarnation never replaces a higher one, and a coordinator that
restarts hears everybody again within a lease. Nothing of it is kept on disk.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import ChannelClosed
from interlock.core.limits import DIRECTORY_LEASE_SECONDS, DIRECTORY_PEERS_MAX
from interlock.wire.channel import Channel, Received
from interlock.wire.fleet_messages import Announce, FindPeer, PeerAddress


class _Entry(msgspec.Struct, frozen=True):
    where: PeerAddress
    until_s: float


class PeerBook:
    """What peers announced, by name; mutable, one a coordinator."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._channels: dict[Channel, None] = {}

    async def hear(self, channel: Channel, received: Received, now_s: float) -> None:
        """Handles `Announce` and `FindPeer` of a channel; `drop` when it ends."""
        match received.body:
            case Announce(address):
                self._channels[channel] = None
                moved = self.announce(channel.peer.name, channel.peer.incarnation, address, now_s)
                if moved is not None:
                    await self._tell(moved, but=channel)
            case FindPeer(name):
                found = self.find(name, now_s)
                if found is None:
                    why = f"no transfer engine {name} has announced itself"
                    await channel.fault(received, "unknown_peer", why, retryable=True)
                else:
                    await channel.reply(received, found)

    def drop(self, channel: Channel) -> None:
        self._channels.pop(channel, None)

    def announce(self, name: str, incarnation: int, address: str, now_s: float) -> PeerAddress | None:
        """What others should hear: the peer is somewhere else than before, or in another life. Else None."""
        before = self._entries.get(name)
        if before is not None and incarnation < before.where.incarnation:
            return None
        if before is None and len(self._entries) >= DIRECTORY_PEERS_MAX:
            self._expire(now_s)
            if len(self._entries) >= DIRECTORY_PEERS_MAX:
                return None
        where = PeerAddress(name, incarnation, address)
        self._entries[name] = _Entry(where, now_s + DIRECTORY_LEASE_SECONDS)
        return where if before is not None and before.where != where else None

    def find(self, name: str, now_s: float) -> PeerAddress | None:
        entry = self._entries.get(name)
        return entry.where if entry is not None and entry.until_s > now_s else None

    def _expire(self, now_s: float) -> None:
        self._entries = {name: entry for name, entry in self._entries.items() if entry.until_s > now_s}

    async def _tell(self, moved: PeerAddress, *, but: Channel) -> None:
        for channel in list(self._channels):
            if channel is but:
                continue
            try:
                await channel.send(moved)
            except ChannelClosed:
                self.drop(channel)
