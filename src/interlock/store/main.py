"""The store node as a process: its slab, its identity, and when it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

import msgspec

from interlock.core.limits import DISK_BYTES_MIN, REMOVALS_FILE_BYTES_MAX, SLAB_BYTES_MAX, SLOT_GRAIN_BYTES
from interlock.host.base import Host
from interlock.host.leaving import first_of, signalled
from interlock.host.processes import parent_gone
from interlock.host.publisher import Publisher
from interlock.host.state_file import StateFile
from interlock.store.node import DiskConfig, Node
from interlock.store.peer_links import PeersConfig, peer_links
from interlock.store.removals import FILE, KIND
from interlock.telemetry.events import EventLog
from interlock.wire.identity import load_identity

log = logging.getLogger(__name__)


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a store node needs to know."""

    address: str
    """Where it listens, `unix:/path`."""
    state_dir: Path
    """A private directory of its own; its incarnation is kept there."""
    slab_bytes: int
    """Memory for KV blocks, allocated at start. Rounded down to whole pages."""
    disk: Path | None = None
    """A directory of its own for blocks that leave RAM; None: they are lost."""
    disk_bytes: int = 0
    """What may lie there."""
    name: str = "store"
    token: bytes = b""
    quotas: dict[str, int] = {}
    """Bytes of the slab by tenant; "*" for every other that has a name."""
    end_frozen_writers: bool = False
    """Whether a process that keeps slots of ended sessions from everybody else is ended (SIGKILL by its pidfd). Where the
    supervisor restarts what ends."""
    kv_events: str | None = None
    """Where changes of the index are published as vLLM's KV events: `tcp://127.0.0.1:PORT` or `ipc:///PATH`."""
    kv_events_tokens: bool = False
    """Whether those events carry the tokens of what engines save, as readers that name blocks by tokens need; whoever
    reads them reads the prompts."""
    kv_events_replay: str | None = None
    """Where missed events can be asked for."""
    peers: PeersConfig | None = None
    """Other nodes, whose blocks come up from there, and where they find this one; None: it is alone."""


def slab_number(name: str, incarnation: int) -> int:
    """A number that no other slab has, of whatever node and life: a client cannot take one mapping for another."""
    data = f"{name}@{incarnation}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


async def run_node(host: Host, config: StoreConfig) -> None:
    """Serves until SIGTERM or SIGINT, or until the supervisor is gone (`INTERLOCK_PARENT_FD`); removes its socket.

    Raises `MemoryError` or `ValueError` when the slab cannot be had, `OSError` when an address is taken, `InterlockError`
    when its identity is another's.
    """
    size = config.slab_bytes // SLOT_GRAIN_BYTES * SLOT_GRAIN_BYTES
    if not 0 < size <= SLAB_BYTES_MAX:
        raise ValueError(
            f"a slab of {config.slab_bytes} bytes is impossible; 1 page to {SLAB_BYTES_MAX} bytes are"
        )
    disk = None
    if config.disk is not None:
        if config.disk_bytes < DISK_BYTES_MIN:
            raise ValueError(
                f"{config.disk_bytes} bytes of disk are too few; give it at least {DISK_BYTES_MIN}"
            )
        disk = DiskConfig(config.disk, config.disk_bytes)
    if config.peers is not None:
        config.peers.check(config.name)
    host.files.make_private_dir(config.state_dir)
    publisher = None
    if config.kv_events is not None:
        publisher = Publisher(config.kv_events, config.kv_events_replay)
    me = load_identity(host, config.state_dir, config.name)
    async with contextlib.AsyncExitStack() as stack:
        peers = None
        if config.peers is not None:
            # What is in a slab is sealed under this life: who is told by a peer that a newer one is known must end, not rise above it.
            me.mark_accepted()
            peers = await stack.enter_async_context(peer_links(host, me, config.peers))
        memory = await host.in_thread(host.create_memory, "interlock-kv", size)
        node = Node(
            host,
            me,
            memory,
            slab_number(me.name, me.incarnation),
            token=config.token,
            disk=disk,
            emit=EventLog(host.clock).emit,
            quotas=config.quotas,
            end_frozen_writers=config.end_frozen_writers,
            publisher=publisher,
            publish_tokens=config.kv_events_tokens,
            peers=peers,
            removals=StateFile(host.files, config.state_dir / FILE, KIND, REMOVALS_FILE_BYTES_MAX),
        )
        await _serve(node, config)


async def _serve(node: Node, config: StoreConfig) -> None:
    try:
        with signalled() as stop:
            await node.start(config.address)
            log.info("store %s holds %.2f GiB at %s", config.name, config.slab_bytes / 2**30, config.address)
            await first_of(stop.wait(), parent_gone())
    finally:
        await node.close()
