"""How a store node's process meets other nodes: which engine listens where, whom it asks, and with whose certificates."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from interlock.host.base import Host
from interlock.host.bulk_tls import TlsFiles
from interlock.host.sockets import parse_address
from interlock.membership.directory import Directory, StaticDirectory
from interlock.membership.embedded import CoordinatorDirectory
from interlock.transfer.engine import LaneOptions, TransferEngine
from interlock.wire.identity import Identity

EVERYWHERE = ("0.0.0.0", "::", "*")


class PeersConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a store node needs to know of other nodes. Whoever has `token` can read every block of this node's slab, whoever's it is."""

    address: str
    """Where this node's engine listens, and is dialled by peers: `tcp:HOST:PORT`, or `unix:/PATH` for nodes of one machine."""
    peers: dict[str, str] = {}
    """Whose blocks are read: where they are by name. Empty addresses where the coordinator knows them."""
    coordinator: str = ""
    """Whose directory is asked where peers are, and told where this node is; empty: the addresses above."""
    token: bytes = b""
    """The fleet's, without which nobody gets an answer over TCP."""
    tls: TlsFiles | None = None
    """For the lanes over which bytes go; None: plain."""

    def check(self, me: str) -> None:
        """Raises `ValueError` in words when node `me` cannot do that."""
        addresses = [self.address, *self.peers.values(), self.coordinator]
        for address in filter(None, addresses):
            if parse_address(address)[0] == "tcp" and not self.token:
                raise ValueError(f"{address} needs the fleet's token: over TCP nobody is heard without it")
        kind, name, port = parse_address(self.address)
        if kind == "tcp" and name in EVERYWHERE:
            raise ValueError(
                f"{self.address} is nowhere that a peer could dial; name this host's own address"
            )
        if kind == "tcp" and not port and not self.coordinator:
            raise ValueError(f"{self.address} leaves the port open, which no peer would know; choose one")
        if me in self.peers:
            raise ValueError(f"{me} is this node's own name; give each node another")
        for peer, address in self.peers.items():
            if not address and not self.coordinator:
                raise ValueError(f"where is {peer}? Give its address, or a coordinator that knows it")
            if address and self.coordinator:
                raise ValueError(
                    f"leave out the address of {peer}, or the coordinator: one of them must be right"
                )
        for path in (self.tls.certificate, self.tls.key, self.tls.authority) if self.tls is not None else ():
            if not Path(path).is_file():
                raise ValueError(f"{path}, named for TLS, is no file")


@contextlib.asynccontextmanager
async def peer_links(
    host: Host, me: Identity, config: PeersConfig
) -> AsyncIterator[tuple[TransferEngine, list[str]]]:
    """A started engine, and whom to follow, as `Node` takes them. Raises `ValueError`, `OSError`."""
    config.check(me.name)
    directory: Directory = StaticDirectory(config.peers)
    asked = None
    if config.coordinator:
        directory = asked = CoordinatorDirectory(
            host, me, config.coordinator, lambda: engine.address, config.token
        )
    engine = TransferEngine(
        host, me, config.address, directory=directory, token=config.token, lanes=LaneOptions(tls=config.tls)
    )
    await engine.start()
    try:
        if asked is not None:
            await asked.start()
        yield engine, list(config.peers)
    finally:
        if asked is not None:
            await asked.close()
        await engine.close()
