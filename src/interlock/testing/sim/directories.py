"""`Directory` of the host seam on a simulated disk: bulk files, holes, mappings, and a lock that dies with its holder.

What a power cut leaves is the disk's matter (`disk.py`). Strict where file systems are kind: `sync` keeps the names of this
directory, not those in its folders, and a mapped page reaches the medium when the disk likes or never.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from interlock.host.base import DirectoryEntry, Piece
from interlock.host.disk import DirectoryBusy
from interlock.testing.sim.disk import PAGE_BYTES, Inode, SimDisk


class HasDisk(Protocol):
    """A machine."""

    @property
    def disk(self) -> SimDisk: ...


class Holder(Protocol):
    """As much of a process (`kernel.SimProcess`) as a directory asks for."""

    @property
    def die_at_disk(self) -> str | None: ...

    @property
    def dead(self) -> bool: ...

    @property
    def machine(self) -> HasDisk: ...

    def at_disk(self, call: str) -> None: ...


class SimMapping:
    """`FileMapping` of the seam."""

    def __init__(self, inode: Inode) -> None:
        self.view = memoryview(inode.map())

    def warm(self) -> None:
        """Everything is warm here."""

    def close(self) -> None:
        """Its pages stay the file's."""


class SimDirectory:
    """`Directory` of the seam, for one process."""

    def __init__(self, process: Holder, path: Path, owner: str) -> None:
        """Raises `DirectoryBusy` while another living process has it, `OSError` as the disk does."""
        self._process, self._disk, self.path = process, process.machine.disk, path
        self._disk.trouble()
        self._disk.make_directories(path)
        holder = self._disk.locks.get(str(path))
        if holder is not None and not holder.process.dead:
            raise DirectoryBusy(path, holder.owner)
        self._lock = self._disk.locks[str(path)] = Lock(process, owner)

    def list(self, folder: str = ".") -> list[DirectoryEntry]:
        self._read_from_disk()
        where = self._at(folder)
        if str(where) not in self._disk.directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
        return sorted(
            DirectoryEntry(Path(path).name, inode.size, inode.allocated_bytes)
            for path, inode in self._disk.names.items()
            if Path(path).parent == where
        )

    def make_folder(self, name: str) -> None:
        self._change("mkdir")
        self._disk.directories.setdefault(str(self._at(name)), None)

    def rename(self, name: str, to: str) -> None:
        self._inode(name)
        self._change("rename")
        self._disk.rename(str(self._at(name)), str(self._at(to)))

    def remove(self, name: str) -> None:
        self._change("unlink")
        if str(self._at(name)) in self._disk.names:
            self._disk.unlink(str(self._at(name)))

    def sync(self) -> None:
        self._change("fsync")
        self._disk.sync_directory(str(self.path))

    def size(self, name: str) -> int | None:
        self._read_from_disk()
        inode = self._disk.names.get(str(self._at(name)))
        return None if inode is None else inode.size

    def write_new(self, name: str, data: memoryview) -> None:
        if len(data) % PAGE_BYTES:
            raise OSError(errno.EINVAL, "data of a direct write is whole pages", name)
        if str(self._at(name)) in self._disk.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        self._change("open")
        self._fill(self._disk.create(str(self._at(name))), bytes(data))

    def append(self, name: str, data: bytes) -> None:
        self._change("open")
        inode = self._disk.names.get(str(self._at(name))) or self._disk.create(str(self._at(name)))
        self._fill(inode, data)

    def read(self, name: str, pieces: Sequence[Piece]) -> None:
        inode = self._inode(name)
        for piece in pieces:
            self._read_from_disk()
            data = inode.now[piece.offset : piece.offset + len(piece.into)]
            if len(data) < len(piece.into):
                raise EOFError(f"{name} ends before byte {piece.offset + len(piece.into)}")
            piece.into.cast("B")[:] = data

    def punch(self, name: str, offset: int, length: int) -> None:
        inode = self._inode(name)
        self._change("fallocate")
        inode.punch(offset, length)

    def map(self, name: str, size_bytes: int) -> SimMapping:
        self._change("open")
        inode = self._disk.names.get(str(self._at(name))) or self._disk.create(str(self._at(name)))
        if inode.size == 0:
            self._disk.check_room()
            inode.now = bytes(size_bytes)
        elif inode.size != size_bytes:
            raise ValueError(f"{name} has {inode.size} bytes, not {size_bytes}")
        return SimMapping(inode)

    def close(self) -> None:
        if self._disk.locks.get(str(self.path)) is self._lock:
            del self._disk.locks[str(self.path)]

    # --- the disk --------------------------------------------------------------------------------------------------

    def _at(self, name: str) -> Path:
        return self.path / name

    def _inode(self, name: str) -> Inode:
        inode = self._disk.names.get(str(self._at(name)))
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return inode

    def _read_from_disk(self) -> None:
        self._process.at_disk("read")
        self._disk.trouble()

    def _change(self, call: str) -> None:
        self._process.at_disk(call)
        self._disk.trouble()

    def _fill(self, inode: Inode, data: bytes) -> None:
        """Write and fsync: where the disk is full or the process dies, a part of it stands there."""
        part = self._disk.some_of(data)
        if self._disk.full:
            inode.now += part
            self._disk.check_room()
        if self._process.die_at_disk == "write":
            inode.now += part
        self._change("write")
        inode.now += data
        self._change("fsync")
        inode.durable = inode.now


class Lock:
    """Who has a directory."""

    def __init__(self, process: Holder, owner: str) -> None:
        self.process, self.owner = process, owner
