"""One rank as its runner sees it: a channel, what it said last, and calls whose faults come back as what they mean."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from interlock.core.errors import ChannelClosed, ChannelFault, InterlockError
from interlock.core.limits import HELLO_SECONDS_MAX, LOCKSTEP_CALL_SECONDS_MAX
from interlock.core.lockstep import RankReport
from interlock.engines.base import EngineGone, NotStanding, Progress, RequestRejected, Unable, UpdateFailed
from interlock.engines.lockstep.words import Failed, FromRank, Made, Said
from interlock.host.base import Host
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.identity import Identity

MEANINGS: dict[str, type[Exception]] = {
    "rejected": RequestRejected,
    "unknown": KeyError,
    "not_standing": NotStanding,
    "unable": Unable,
    "update_failed": UpdateFailed,
}


class Audience:
    """Who hears what a rank says. All calls come from the loop."""

    def said(self, rank: int, said: Said) -> None:
        raise NotImplementedError

    def made(self, told: list[tuple[str, Progress]]) -> None:
        raise NotImplementedError

    def lost(self, why: str) -> None:
        """Its channel has ended, or it said that it cannot go on."""
        raise NotImplementedError


class RankLink:
    """The runner's, or a leader's, channel to one rank."""

    def __init__(self, rank: int, channel: Channel, audience: Audience) -> None:
        self.rank, self._channel, self._audience = rank, channel, audience
        self.said = Said(RankReport(rank, 0, 0, 0))
        self.counts: dict[str, int] = {}
        self.reports = 0
        """Heard so far."""
        self._closing = False
        self._reader = asyncio.create_task(self._read(), name=f"rank {rank}")

    @classmethod
    async def open(
        cls, host: Host, address: str, *, rank: int, me: Identity, role: str, audience: Audience
    ) -> RankLink:
        """Raises what `connect_channel` raises.

        Not leased: a rank that is busy or frozen is not to be dropped for its silence. Steps have deadlines, exits are seen.
        """
        channel = await connect_channel(
            host, address, me=me, role=role, accept=FromRank, deadline_s=HELLO_SECONDS_MAX, leased=False
        )
        return cls(rank, channel, audience)

    @property
    def silent_for_s(self) -> float:
        return self._channel.silent_for_s

    def post(self, body: msgspec.Struct) -> None:
        """Says it, if the channel is open; what a closed one means is heard by `Audience.lost`."""
        with contextlib.suppress(ChannelClosed):
            self._channel.post(body)

    async def call(self, body: msgspec.Struct, timeout_s: float = LOCKSTEP_CALL_SECONDS_MAX) -> Any:
        """The answer. Raises what the call means (`base`), `TimeoutError`, `EngineGone` when the rank is gone."""
        try:
            return await self._channel.request(body, timeout_s)
        except ChannelFault as fault:
            meant = MEANINGS.get(fault.code)
            if meant is None:
                raise EngineGone(f"rank {self.rank}: {fault.message}") from fault
            raise meant(fault.message) from fault
        except ChannelClosed as error:
            raise EngineGone(f"rank {self.rank} is gone: {error}") from error

    async def close(self) -> None:
        """What has come is heard first: tokens are not lost with the rank that made them."""
        self._closing = True
        await self._channel.close()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        why = "its channel ended"
        try:
            async for received in self._channel.messages():
                self._hear(received.body)
        except InterlockError as error:
            why = str(error)
        if not self._closing:
            self._audience.lost(f"rank {self.rank}: {why}")

    def _hear(self, body: Any) -> None:
        match body:
            case Said():
                self.said = body
                self.reports += 1
                self._audience.said(self.rank, body)
            case Made(told, counts):
                self.counts = counts
                self._audience.made(told)
            case Failed(why):
                self._audience.lost(f"rank {self.rank}: {why}")
