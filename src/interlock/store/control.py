"""The store for commands and metrics: an asynchronous client that reads no memory and writes no blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import BLOCKS_PER_CALL_MAX, STORE_ATTACH_SECONDS_MAX
from interlock.host.base import Host
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.identity import Identity
from interlock.wire.store_messages import Clear, Done, GetStats, Location, Match, Matched, NodeMessage, Stats

ROLE = "store-control"
Answer = TypeVar("Answer", Done, Matched, Stats)


class AsyncStoreClient:
    """Connects when it is first asked, and again after the connection broke.

    Every method raises `ConnectionError` when the node is not there, `TimeoutError`, `ChannelFault` when it refuses.
    """

    def __init__(
        self,
        host: Host,
        address: str,
        me: Identity,
        *,
        token: bytes = b"",
        timeout_s: float = STORE_ATTACH_SECONDS_MAX,
    ) -> None:
        self._host, self._address, self._me = host, address, me
        self._token, self._timeout_s = token, timeout_s
        self._channel: Channel | None = None

    async def stats(self) -> dict[str, float]:
        """The node's counters and gauges by metric name."""
        return dict((await self._ask(GetStats(), Stats)).values)

    async def clear(self) -> int:
        """Forgets every published block; how many that were. An administrator's verb."""
        return (await self._ask(Clear(), Done)).count

    async def match(self, keys: Sequence[bytes]) -> list[Location]:
        """Where the longest prefix of `keys` stands now."""
        return (await self._ask(Match(list(keys[:BLOCKS_PER_CALL_MAX])), Matched)).locations

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _ask(self, body: GetStats | Clear | Match, kind: type[Answer]) -> Answer:
        if self._channel is None or self._channel.closed is not None:
            self._channel = await connect_channel(
                self._host,
                self._address,
                me=self._me,
                role=ROLE,
                accept=NodeMessage,
                deadline_s=self._timeout_s,
                token=self._token,
            )
        answer = await self._channel.request(body, self._timeout_s)
        if not isinstance(answer, kind):
            raise RemoteProtocolError(
                f"the store answered {type(body).__name__} with {type(answer).__name__}"
            )
        return answer
