"""All that this process has of one peer, and the bounded table of them.

The table evicts by SIEVE (Zhang et al., NSDI 2024): a hand walks from the oldest to the newest, spares who was used since it came by, and takes
the first that was not and that nobody needs now. An endpoint that is opening or carries a transfer is never taken (Mooncake's store takes
any). A forgotten peer's next endpoint has a higher attempt than all before, for attempts are counted per process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from interlock.core.endpoint_state import Phase
from interlock.core.errors import LocalProtocolError
from interlock.host.threads import Lock
from interlock.transfer.endpoint import EndpointDriver
from interlock.transfer.link import PeerLink


class Peer:
    """What there is of one peer: its link, its endpoint, and who uses it."""

    def __init__(self, name: str, link: PeerLink, driver: EndpointDriver) -> None:
        self.name, self.link, self.driver = name, link, driver
        self.visited = False
        self._uses = 0
        self._lock = Lock()
        self.questions = 0
        """Of that peer, being answered."""
        self.next_tick_s = 0.0
        self.repeats = 0
        """Ticks of the handshake under way."""

    def begin_use(self) -> None:
        """A transfer, a write, a notification, a question: who uses it must not lose it. From any thread."""
        with self._lock:
            self._uses += 1

    def end_use(self) -> None:
        """From any thread, once for each `begin_use`."""
        with self._lock:
            self._uses -= 1

    @contextmanager
    def used(self) -> Iterator[None]:
        """Both of them, around a use."""
        self.begin_use()
        try:
            yield
        finally:
            self.end_use()

    @property
    def is_spare(self) -> bool:
        """May it be forgotten for another's sake?"""
        return not self._uses and self.driver.state.phase in (Phase.IDLE, Phase.CONNECTED)

    async def close(self) -> None:
        """Returns when its lanes are destroyed and its channels closed."""
        await self.driver.close()
        await self.link.close()


class PeerStore:
    """At most so many peers; who was not visited lately goes first (SIEVE)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._peers: dict[str, Peer] = {}
        self._hand: str | None = None

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, name: str) -> Peer | None:
        """That peer, which counts as a visit."""
        peer = self._peers.get(name)
        if peer is not None:
            peer.visited = True
        return peer

    def look(self, name: str) -> Peer | None:
        """As `get`, without counting as a use."""
        return self._peers.get(name)

    def add(self, peer: Peer) -> Peer | None:
        """The peer that had to go for it, if any; the caller closes it. Raises `LocalProtocolError` when all are in use."""
        victim = self._victim() if len(self._peers) >= self._most else None
        if victim is not None:
            del self._peers[victim.name]
        self._peers[peer.name] = peer
        return victim

    def _victim(self) -> Peer:
        names = list(self._peers)
        at = names.index(self._hand) if self._hand in self._peers else 0
        for _ in range(2 * len(names)):
            peer = self._peers[names[at]]
            at = (at + 1) % len(names)
            if peer.visited:
                peer.visited = False
            elif peer.is_spare:
                self._hand = names[at]
                return peer
        raise LocalProtocolError(
            f"{len(names)} endpoints are in use and no more are allowed",
            hint="wait for transfers to end, or raise the bound `endpoints`",
        )
