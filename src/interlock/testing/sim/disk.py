"""A simulated disk: what was synced survives a power cut; what was not is lost, torn, or kept, in any mixture.

`SystemCalls` answers the calls that `interlock.host.files` makes of `os`, so that its code, unchanged, runs on this disk
(`files_on`): a missing fsync in it shows here. A crash of a process loses nothing; `power_cut` does. Directory entries and
file contents reach the medium separately and in any order, as POSIX allows.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import os
import random
import stat
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, Protocol

import interlock.host.files

FILE_FD_FIRST = 5_000_000
PAGE_BYTES = 4096


class Inode:
    """A file: `now` is what reads see, `durable` what a power cut leaves."""

    def __init__(self) -> None:
        self.durable = b""
        self._now = b""
        self._pages: bytearray | None = None
        self._holes: dict[int, None] = {}

    @property
    def now(self) -> bytes:
        return self._now if self._pages is None else bytes(self._pages)

    @now.setter
    def now(self, data: bytes) -> None:
        self._now, self._pages = data, None

    @property
    def size(self) -> int:
        return len(self._now if self._pages is None else self._pages)

    @property
    def allocated_bytes(self) -> int:
        return max(0, self.size - PAGE_BYTES * len(self._holes))

    def map(self) -> bytearray:
        """Its pages, for as long as nobody changes its length: what is stored there is in the file."""
        if self._pages is None:
            self._pages = bytearray(self._now)
        return self._pages

    def punch(self, offset: int, length: int) -> None:
        stop = min(offset + length, self.size)
        data = bytearray(self.now)
        data[offset:stop] = bytes(max(0, stop - offset))
        self.now = bytes(data)
        self._holes |= dict.fromkeys(range(-(-offset // PAGE_BYTES), stop // PAGE_BYTES))

    def after_power_cut(self, rng: random.Random) -> bytes:
        """What was synced, or some of what was not: torn at a byte where it grew, by pages where it was stored into."""
        if self.now == self.durable:
            return self.durable
        if rng.random() < 0.4:
            return self.durable
        if self.size != len(self.durable):
            return self.now[: rng.randrange(self.size + 1)]
        pages = range(0, self.size, PAGE_BYTES)
        kept = [(self.now if rng.random() < 0.5 else self.durable)[at : at + PAGE_BYTES] for at in pages]
        return b"".join(kept)


class Caller(Protocol):
    """The process that makes a system call."""

    @property
    def pid(self) -> int: ...

    def at_disk(self, call: str) -> None:
        """Before each call that changes something; may end the process here."""
        ...


class SimDisk:
    """One machine's disk. Paths are strings, directories a set."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.names: dict[str, Inode] = {}
        self.durable_names: dict[str, Inode] = {}
        self.directories: dict[str, None] = {"/": None}
        self.unsynced: list[tuple[str, str, str]] = []
        """Directory changes not on the medium: (operation, path, source)."""
        self.full = False
        self.failing = 0.0
        """Share of calls that end with EIO."""
        self.slow_s = 0.0
        """How long a call takes, on average."""
        self.open_files: dict[int, tuple[Inode, str]] = {}
        self.locks: dict[str, Any] = {}
        """Who has a directory (`directories.Lock`)."""
        self._next_fd = FILE_FD_FIRST

    def open_inode(self, inode: Inode, path: str) -> int:
        self._next_fd += 1
        self.open_files[self._next_fd] = (inode, path)
        return self._next_fd

    def trouble(self) -> None:
        """Raises EIO now and then while the disk is failing."""
        if self.failing and self._rng.random() < self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def check_room(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self, fd: int) -> None:
        inode, path = self.open_files[fd]
        self.trouble()
        inode.durable = inode.now
        if path in self.directories:
            self.sync_directory(path)

    def sync_file(self, path: str) -> None:
        """All of its bytes are on the medium, as the disk does by itself sooner or later."""
        self.names[path].durable = self.names[path].now

    def sync_directory(self, path: str) -> None:
        """Names made, changed and removed in it are on the medium."""
        kept = []
        for change in self.unsynced:
            if str(Path(change[1]).parent) == path:
                self._apply(change)
            else:
                kept.append(change)
        self.unsynced = kept

    def make_directories(self, path: Path) -> None:
        for directory in [path, *path.parents]:
            self.directories.setdefault(str(directory), None)

    def some_of(self, data: bytes) -> bytes:
        return data[: self._rng.randrange(len(data) + 1)]

    def rename(self, source: str, target: str) -> None:
        self.trouble()
        self.names[target] = self.names.pop(source)
        self.unsynced.append(("rename", target, source))

    def create(self, path: str) -> Inode:
        self.trouble()
        self.check_room()
        inode = self.names[path] = Inode()
        self.unsynced.append(("create", path, ""))
        return inode

    def unlink(self, path: str) -> None:
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        del self.names[path]
        self.unsynced.append(("unlink", path, ""))

    def power_cut(self) -> None:
        """What is not synced may be there, in part, or not at all, and not in the order it was done."""
        inodes = {id(inode): inode for inode in [*self.names.values(), *self.durable_names.values()]}
        torn = {}
        for inode in inodes.values():
            if inode.now != inode.durable:
                torn[id(inode)] = inode.after_power_cut(self._rng)
        renamed = dict(self.durable_names)
        live = dict(self.names)
        for operation, path, source in self.unsynced:
            if self._rng.random() < 0.5:
                continue
            if operation == "unlink":
                renamed.pop(path, None)
            elif (found := live.get(path)) is not None:
                renamed[path] = found
                if source:
                    renamed.pop(source, None)
        for each in inodes.values():
            each.now = each.durable = torn.get(id(each), each.durable)
        self.names, self.durable_names, self.unsynced = dict(renamed), renamed, []
        self.open_files.clear()

    def wipe(self, directory: str) -> None:
        """A state directory is lost."""
        for names in (self.names, self.durable_names):
            for path in [path for path in names if path.startswith(directory + "/")]:
                del names[path]
        self.directories.pop(directory, None)

    def flip_bit(self, path: str) -> bool:
        inode = self.names.get(path)
        if inode is None or not inode.size:
            return False
        data = bytearray(inode.now)
        data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        inode.now = inode.durable = bytes(data)
        return True

    def _apply(self, change: tuple[str, str, str]) -> None:
        operation, path, source = change
        if operation == "unlink":
            self.durable_names.pop(path, None)
        elif path in self.names:
            self.durable_names[path] = self.names[path]
            if source:
                self.durable_names.pop(source, None)


class _File(io.RawIOBase):
    """What `open` gives on this disk: whole-file reads, or writes to the end."""

    def __init__(self, calls: SystemCalls, fd: int, *, owns: bool) -> None:
        super().__init__()
        self._calls, self._fd, self._owns = calls, fd, owns
        self._at = 0

    def fileno(self) -> int:
        return self._fd

    def read(self, size: int = -1) -> bytes:
        inode, _ = self._calls.disk.open_files[self._fd]
        self._calls.disk.trouble()
        stop = len(inode.now) if size < 0 else self._at + size
        data = inode.now[self._at : stop]
        self._at += len(data)
        return data

    def write(self, data: Any) -> int:
        self._calls.write(self._fd, bytes(data))
        return len(data)

    def close(self) -> None:
        if not self.closed and self._owns:
            self._calls.close(self._fd)
        super().close()


class SystemCalls:
    """The `os` of one simulated process, as far as `host/files.py` uses it."""

    def __init__(self, disk: SimDisk, caller: Caller, entropy: Callable[[int], bytes]) -> None:
        self.disk, self._caller = disk, caller
        self.urandom = entropy
        for name in ("O_WRONLY", "O_CREAT", "O_EXCL", "O_CLOEXEC", "O_RDONLY", "O_DIRECTORY", "O_APPEND"):
            setattr(self, name, getattr(os, name))
        self.geteuid = os.geteuid
        self.strerror = os.strerror

    def getpid(self) -> int:
        return self._caller.pid

    def open(self, path: str | Path, flags: int, mode: int = 0) -> int:
        del mode
        name = str(path)
        if flags & os.O_DIRECTORY:
            self._need_directory(name)
            return self.disk.open_inode(Inode(), name)
        self._need_directory(str(Path(name).parent))
        self._caller.at_disk("open")
        inode = self.disk.names.get(name)
        if inode is not None and flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        if inode is None and not flags & os.O_CREAT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if inode is None:
            inode = self.disk.create(name)
        return self.disk.open_inode(inode, name)

    def open_file(self, what: str | Path | int, mode: str) -> _File:
        if isinstance(what, int):
            return _File(self, what, owns=True)
        assert mode == "rb", "state files are written through descriptors"
        inode = self.disk.names.get(str(what))
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(what))
        self.disk.trouble()
        return _File(self, self.disk.open_inode(inode, str(what)), owns=True)

    def write(self, fd: int, data: bytes) -> int:
        self._caller.at_disk("write")
        self.disk.trouble()
        self.disk.check_room()
        inode, _ = self.disk.open_files[fd]
        inode.now += data
        return len(data)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Of bytes that the file has: they need no room. Whoever dies in it leaves some of them."""
        inode, _ = self.disk.open_files[fd]
        assert offset + len(data) <= inode.size, "a write in place does not grow a file"
        old, new = inode.now, bytes(data)
        try:
            self._caller.at_disk("write")
            self.disk.trouble()
        except BaseException:
            new = self.disk.some_of(new)
            raise
        finally:
            inode.now = old[:offset] + new + old[offset + len(new) :]
        return len(new)

    def fsync(self, fd: int) -> None:
        self._caller.at_disk("fsync")
        self.disk.sync(fd)

    fdatasync = fsync

    def rename(self, source: str | Path, target: str | Path) -> None:
        self._caller.at_disk("rename")
        self.disk.rename(str(source), str(target))

    def unlink(self, path: str | Path) -> None:
        self.disk.unlink(str(path))

    def rmdir(self, path: str | Path) -> None:
        self.disk.directories.pop(str(path), None)

    def mkdir(self, path: str | Path, mode: int) -> None:
        del mode
        if str(path) in self.disk.directories:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self.disk.trouble()
        self.disk.directories[str(path)] = None

    def makedirs(self, path: str | Path, exist_ok: bool = False) -> None:
        del exist_ok
        self.disk.make_directories(Path(path))

    def lstat(self, path: str | Path) -> Any:
        self._need_directory(str(path))
        return SimpleNamespace(st_mode=stat.S_IFDIR | 0o700, st_uid=os.geteuid())

    def close(self, fd: int) -> None:
        if self.disk.open_files.pop(fd, None) is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _need_directory(self, path: str) -> None:
        if path not in self.disk.directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class _Loader(SourceFileLoader):
    """Compiles once, however many processes begin."""

    _code: CodeType | None = None

    def get_code(self, fullname: str) -> CodeType | None:
        if self._code is None:
            self._code = super().get_code(fullname)
        return self._code


@functools.cache
def _files_module() -> ModuleSpec:
    found = importlib.util.find_spec("interlock.host.files")
    assert found is not None
    assert found.origin is not None
    loader = _Loader(found.name, found.origin)
    specification = importlib.util.spec_from_loader(found.name, loader)
    assert specification is not None
    return specification


def files_on(calls: SystemCalls) -> interlock.host.files.RealFiles:
    """`RealFiles`, its own code, on these system calls: a second copy of its module whose `os` and `open` are ours."""
    specification = _files_module()
    assert specification.loader is not None
    copy: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copy)
    copy.os, copy.open = calls, calls.open_file
    files: interlock.host.files.RealFiles = copy.RealFiles()
    return files
