"""Where a peer is: from addresses that were given, or from the coordinator's directory. Nothing learnt here is kept for ever.

Mooncake caches a peer's address once and never again looks (mooncake.md R8): after a restart elsewhere every transfer to it fails. Here who
could not be reached, or was somebody else, is looked up anew, and watchers hear of each change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from interlock.core.errors import InterlockError


class UnknownPeer(InterlockError):  # noqa: N818
    """The directory has no such peer (now)."""


class Directory(Protocol):
    """Where peers are reached."""

    async def address_of(self, peer: str) -> str:
        """Where to dial. Raises `UnknownPeer`; bounded by the caller."""
        ...

    def invalidate(self, peer: str, address: str) -> None:
        """Nobody, or somebody else, was there: do not answer from memory next time."""
        ...

    def watch(self, changed: Callable[[str], None]) -> None:
        """`changed(peer)` is called on the loop when a peer's address is another than before."""
        ...


class StaticDirectory:
    """Addresses that were given. `update` changes them while engines run."""

    def __init__(self, addresses: Mapping[str, str] | None = None) -> None:
        self._addresses = dict(addresses or {})
        self._watchers: list[Callable[[str], None]] = []

    async def address_of(self, peer: str) -> str:
        """Raises `UnknownPeer`."""
        address = self._addresses.get(peer)
        if address is None:
            raise UnknownPeer(
                f"no address of {peer} was given", peer=peer, hint="add it to the addresses of this engine"
            )
        return address

    def invalidate(self, peer: str, address: str) -> None:
        """What was given stands until it is changed."""

    def watch(self, changed: Callable[[str], None]) -> None:
        """`changed` is called with the name of a peer whose address is another one."""
        self._watchers.append(changed)

    def update(self, peer: str, address: str) -> None:
        """Where `peer` is from now on; watchers hear of it when it was somewhere else."""
        before = self._addresses.get(peer)
        self._addresses[peer] = address
        if before is not None and before != address:
            for changed in self._watchers:
                changed(peer)

    def peers(self) -> list[str]:
        """Their names, sorted."""
        return sorted(self._addresses)
