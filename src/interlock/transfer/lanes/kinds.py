"""Which kinds of lanes an engine has, and how they are set up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.host.base import Host
from interlock.host.bulk_pool import BulkPool
from interlock.host.bulk_tls import TlsFiles
from interlock.host.sockets import parse_address
from interlock.host.stream_tls import secure
from interlock.transfer.lanes.shm import ShmKind
from interlock.transfer.lanes.tcp import TcpKind
from interlock.transfer.segments import SegmentTable
from interlock.wire.channel import Secure

if TYPE_CHECKING:
    from interlock.transfer.lanes.base import LaneKind
    from interlock.transfer.lanes.sockets import Admission

KINDS = ("shm", "tcp", "nixl")


class LaneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`kinds`: which are offered, of "shm", "tcp", "nixl"."""

    kinds: tuple[str, ...] = ("shm", "tcp")
    host: str = ""
    """What TCP lanes listen on; empty: the host of the control address, 127.0.0.1 for a Unix one."""
    reachable: str = ""
    """What peers dial for TCP lanes, where that is not `host`."""
    port: int = 0
    connections: int = 2
    """Of one TCP lane; the second comes with the first large transfer."""
    tls: TlsFiles | None = None
    """Certificates for TCP lanes, and for control channels over TCP; None: plain."""
    directory: str = ""
    """Private directory for the shm lanes' Unix sockets; empty: that of a Unix control address; a TCP one has none then."""
    nixl_backend: str = "UCX"
    map_segments: bool = True
    read_processes: bool = True
    """Whether shm lanes may map shared memory, and read processes' memory by process_vm_readv."""

    def why_not(self, kind: str) -> str:
        if kind == "shm" and kind in self.kinds:
            return "no directory for its sockets was given"
        return "it is switched off" if kind in KINDS else "it is not known"


def control_tls(files: TlsFiles | None) -> tuple[Secure | None, Secure | None]:
    """For control channels over TCP, (that we dial, that are dialled here), with the lanes' certificates; None: plain.

    Raises `OSError` for files that cannot be read.
    """
    if files is None:
        return None, None
    dials, listens = files.contexts()
    return (
        lambda stream: secure(stream, dials, listens=False),
        lambda stream: secure(stream, listens, listens=True),
    )


def make_kinds(
    options: LaneOptions,
    host: Host,
    me: str,
    pool: BulkPool,
    segments: SegmentTable,
    admission: Admission,
    address: str,
) -> dict[str, LaneKind]:
    """Raises `LocalProtocolError` for an unknown kind, or none."""
    unknown = set(options.kinds) - set(KINDS)
    if unknown or not options.kinds:
        raise LocalProtocolError(
            f"there is no lane of kind {', '.join(sorted(unknown)) or '(none)'}; {', '.join(KINDS)} are"
        )
    scheme, name, _ = parse_address(address)
    made: dict[str, LaneKind] = {}
    directory = options.directory or (str(Path(name).parent) if scheme == "unix" else "")
    if "shm" in options.kinds and directory:
        made["shm"] = ShmKind(
            host.clock,
            me,
            pool,
            segments,
            admission,
            host=host,
            directory=Path(directory),
            maps=options.map_segments,
            reads_processes=options.read_processes,
        )
    if "tcp" in options.kinds:
        listen_on = options.host or (name if scheme == "tcp" else "127.0.0.1")
        made["tcp"] = TcpKind(
            host.clock,
            me,
            pool,
            segments,
            admission,
            connections=options.connections,
            host=listen_on,
            reachable=options.reachable,
            port=options.port,
            tls=options.tls,
        )
    if "nixl" in options.kinds:
        from interlock.transfer.lanes.nixl import NixlKind

        made["nixl"] = NixlKind(
            host.clock,
            me,
            pool,
            segments,
            admission,
            machine=host,
            host=options.host or (name if scheme == "tcp" else "127.0.0.1"),
            reachable=options.reachable,
            tls=options.tls,
            backend=options.nixl_backend,
        )
    return made
