"""The links of one front: one to each life of an engine in the membership, until that life is proven over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import msgspec

from interlock.fleet.engine_link import EngineLink, LinkOwner
from interlock.fleet.ledger import Life
from interlock.fleet.router import life_of, may_take_work
from interlock.host.base import Host
from interlock.wire.fleet_messages import EngineFacts, Membership
from interlock.wire.identity import Identity


class Links(Mapping[Life, EngineLink]):
    """By life. What they hear goes to `owner`."""

    def __init__(self, host: Host, me: Identity, owner: LinkOwner) -> None:
        self.over: dict[str, int] = {}
        """Name → highest life of it that is proven over: a late membership does not bring it back."""
        self._host, self._me, self._owner = host, me, owner
        self._links: dict[Life, EngineLink] = {}
        self._closings: set[asyncio.Task[None]] = set()

    def __getitem__(self, life: Life) -> EngineLink:
        return self._links[life]

    def __iter__(self) -> Iterator[Life]:
        return iter(self._links)

    def __len__(self) -> int:
        return len(self._links)

    def open(self, life: Life, facts: EngineFacts) -> None:
        """Unless there is one, or that life is over."""
        if life not in self._links and life.incarnation > self.over.get(life.name, 0):
            self._links[life] = EngineLink(self._host, self._me, life, facts, self._owner)

    def bury(self, link: EngineLink) -> bool:
        """Its life is proven over. False: that was known."""
        life = link.life
        if self._links.get(life) is not link:
            return False
        self.over[life.name] = max(self.over.get(life.name, 0), life.incarnation)
        self.drop(link)
        return True

    def drop(self, link: EngineLink) -> None:
        """Nobody knows of that life any more."""
        del self._links[link.life]
        closing = asyncio.create_task(link.close(), name=f"close {link.life}")
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._closings, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._links.clear()

    # --- as requests see them -------------------------------------------------------------------------------------

    def usable(self, life: Life, view: Membership) -> bool:
        """Whether that engine is reached, and was not just heard to refuse."""
        link = self._links.get(life)
        return link is not None and link.usable(view.epoch)

    def candidates(self, view: Membership, besides: Life | None = None) -> bool:
        """Whether any other engine may take work now."""
        return any(
            life_of(m) != besides and may_take_work(m, view) and self.usable(life_of(m), view)
            for m in view.members
        )

    def post(self, life: Life, body: msgspec.Struct) -> None:
        """Raises `LocalProtocolError` for what is longer than a frame."""
        link = self._links.get(life)
        if link is not None:
            link.post(body)
