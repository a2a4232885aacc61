"""The store for commands and metrics: an asynchronous client that reads no memory and writes no blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import msgspec

from interlock.core.errors import RemoteProtocolError
from interlock.core.limits import (
    BLOCKS_LISTED_MAX,
    BLOCKS_PER_CALL_MAX,
    CHANGES_PER_CALL_MAX,
    STORE_ATTACH_SECONDS_MAX,
)
from interlock.host.base import Host
from interlock.wire.channel import Channel, connect_channel
from interlock.wire.identity import Identity
from interlock.wire.locations import Location
from interlock.wire.store_messages import (
    BlockPage,
    Changes,
    Clear,
    Done,
    GetStats,
    GetTenants,
    ListBlocks,
    Listed,
    Match,
    Matched,
    NodeMessage,
    Remove,
    Stats,
    Tenants,
    TenantUse,
    Verified,
    VerifyBlocks,
    WatchChanges,
)

ROLE = "store-control"
SWEEP_SECONDS_MAX = 300.0
"""For verbs that look at every slot, in slices."""
Answer = TypeVar("Answer", Done, Matched, Stats, BlockPage, Verified, Changes, Tenants)


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
        self.last_missed: list[str] = []
        self._host, self._address, self._me = host, address, me
        self._token, self._timeout_s = token, timeout_s
        self._channel: Channel | None = None
        self._connecting = asyncio.Lock()

    async def stats(self) -> dict[str, float]:
        """The node's counters and gauges by metric name."""
        return dict((await self._ask(GetStats(), Stats)).values)

    async def clear(self) -> int:
        """Forgets every published block; how many that were. An administrator's verb."""
        return (await self._ask(Clear(), Done, SWEEP_SECONDS_MAX)).count

    async def remove(self, keys: Sequence[bytes] = (), *, tenant: str | None = None, prefix: str = "") -> int:
        """Forgets these blocks, or all of a tenant, or all whose key begins with these hex digits; how many there were.

        `last_missed` names the nodes that have not carried it out yet; nothing of it comes back from them, and they will.
        """
        done = await self._ask(Remove(tenant, prefix, list(keys)), Done, SWEEP_SECONDS_MAX)
        self.last_missed = done.missed
        return done.count

    async def tenants(self) -> list[TenantUse]:
        """Named tenants with what they use and may use."""
        return (await self._ask(GetTenants(), Tenants)).tenants

    async def page(
        self, cursor: int = 0, *, limit: int = BLOCKS_LISTED_MAX, tenant: str | None = None, prefix: str = ""
    ) -> BlockPage:
        """The blocks in the next `limit` slots from `cursor` on, those that are asked for."""
        return await self._ask(ListBlocks(cursor, limit, tenant, prefix), BlockPage)

    async def blocks(self, *, tenant: str | None = None, prefix: str = "") -> AsyncIterator[Listed]:
        """Every block that stays while we look; what comes or goes meanwhile may be told of or not."""
        cursor: int | None = 0
        while cursor is not None:
            page = await self.page(cursor, tenant=tenant, prefix=prefix)
            for block in page.blocks:
                yield block
            cursor = page.next

    async def verify(self) -> AsyncIterator[Verified]:
        """Checks the bytes of every block, page by page; what fails its check is forgotten by the node."""
        cursor: int | None = 0
        while cursor is not None:
            page = await self._ask(VerifyBlocks(cursor), Verified, SWEEP_SECONDS_MAX)
            yield page
            cursor = page.next

    async def watch(self, slab: int, after: int, wait_s: float) -> Changes:
        """What changed in that slab after number `after`; see `store/mirror.py` for how to follow."""
        return await self._ask(
            WatchChanges(slab, after, CHANGES_PER_CALL_MAX, wait_s), Changes, self._timeout_s + wait_s
        )

    async def match(self, keys: Sequence[bytes]) -> Sequence[Location]:
        """Where the longest prefix of `keys` stands now."""
        return (await self._ask(Match(list(keys[:BLOCKS_PER_CALL_MAX])), Matched)).locations

    async def close(self) -> None:
        """Ends the connection. Idempotent."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _ask(self, body: msgspec.Struct, kind: type[Answer], timeout_s: float | None = None) -> Answer:
        channel = await self._connected()
        answer = await channel.request(body, timeout_s or self._timeout_s)
        if not isinstance(answer, kind):
            raise RemoteProtocolError(
                f"the store answered {type(body).__name__} with {type(answer).__name__}"
            )
        return answer

    async def _connected(self) -> Channel:
        """One connection, also for those that ask first at once."""
        async with self._connecting:
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
            return self._channel
