"""A directory of directories that is ours while it is open, all reached by descriptors: what the snapshot store stands on.

A folder is made and opened in one go; whoever writes has its descriptor and no name. When the folder is renamed (erased),
writes through the descriptor go with it. All calls block. `ThreadHost` is what the store's threads ask of the machine; a
harness answers in its place to order them (`testing/sim/threads.py`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from interlock.host.base import DirectoryEntry
from interlock.host.direct import PAGE_BYTES, DirectOpener, plain_files, read_all, write_all
from interlock.host.disk import RealDirectory

EMPTY_ROUNDS_MAX = 16
"""How often a folder is listed again because a writer put something into it meanwhile (hazards x1d)."""
SMALL_BYTES_MAX = 1 << 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


class Folder(Protocol):
    """One open directory. It stays the same directory whatever it is called by now."""

    def write(self, name: str, data: memoryview) -> None:
        """A new file, durable when it returns: under another name first, fsync, rename, fsync of the folder."""
        ...

    def read(self, name: str, allocate: Callable[[int], memoryview]) -> memoryview:
        """The whole file in memory that `allocate(size)` gives. Raises `OSError`."""
        ...

    def list(self) -> Sequence[DirectoryEntry]:
        """Its plain files, by name."""
        ...

    def move(self, name: str, to: str) -> None:
        """Renames a file of this folder to `to`, a path in the tree."""
        ...

    def remove(self, name: str) -> None:
        """Nothing if there is no such file."""
        ...

    def close(self) -> None:
        """Gives the descriptor back; the directory stays. Idempotent."""
        ...


class Tree(Protocol):
    """The directory at the top. Paths are relative to it, without `..`."""

    def make_folder(self, name: str) -> None:
        """A folder of mode 0700; nothing if it is there."""
        ...

    def make_opened(self, name: str) -> Folder:
        """A new directory, open. Raises `FileExistsError`, `OSError`."""
        ...

    def open_folder(self, name: str) -> Folder:
        """Raises `FileNotFoundError`, `OSError` (a link is not followed)."""
        ...

    def folders(self, name: str) -> Sequence[str]:
        """Names of the directories in directory `name`."""
        ...

    def list(self, folder: str = ".") -> Sequence[DirectoryEntry]:
        """The plain files of a directory, by name."""
        ...

    def rename(self, name: str, to: str) -> None:
        """A file or a directory. Raises `FileNotFoundError`, `OSError`."""
        ...

    def remove(self, name: str) -> None:
        """A file; nothing if there is none."""
        ...

    def empty(self, name: str) -> bool:
        """Removes a directory with all that is in it; False if writers were quicker. True if there is none."""
        ...

    def usage(self, name: str) -> tuple[int, int]:
        """Files in a directory and below, and their bytes."""
        ...

    def sync_folder(self, name: str) -> None:
        """The names in that directory survive a power cut after this."""
        ...

    def read_small(self, name: str) -> bytes | None:
        """The first 64 KiB of a file; None if there is none."""
        ...

    def write_small(self, name: str, data: bytes) -> None:
        """Old or new after a crash, never half."""
        ...

    def close(self) -> None:
        """Lets another have the directory. Idempotent."""
        ...


class RunningThread(Protocol):
    """A thread that was started, as `threading.Thread` has it."""

    def is_alive(self) -> bool:
        """False once its function has returned or raised."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end, at most `timeout` seconds; `is_alive` says which it was."""
        ...


class Changes(Protocol):
    """A condition and its mutex. No file call is made while it is held."""

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def wait(self, timeout: float | None = None) -> bool:
        """Lets go of the mutex until somebody notifies; False after `timeout` seconds."""
        ...

    def notify_all(self) -> None:
        """Wakes whoever waits; the caller holds the mutex."""
        ...


class ThreadHost(Protocol):
    """Time, threads and a tree, for code that blocks in threads of its own."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never steps back; its zero means nothing."""
        ...

    def wall_ns(self) -> int:
        """Wall-clock time in nanoseconds since 1970; may step back."""
        ...

    def changes(self) -> Changes:
        """A new condition with a mutex of its own."""
        ...

    def start_thread(self, name: str, function: Callable[[], None]) -> RunningThread:
        """Runs `function` on a thread that keeps no process from leaving."""
        ...

    def open_tree(self, path: Path, owner: str) -> Tree:
        """Raises `DirectoryBusy` naming who has it, `PermissionError`, `OSError`."""
        ...


class RealThreadHost:
    """`ThreadHost` on Linux. Threads are daemons: a hung disk keeps no process from leaving."""

    monotonic_s = staticmethod(time.monotonic)
    wall_ns = staticmethod(time.time_ns)

    def changes(self) -> Changes:
        return threading.Condition()

    def start_thread(self, name: str, function: Callable[[], None]) -> RunningThread:
        thread = threading.Thread(target=function, name=name, daemon=True)
        thread.start()
        return thread

    def open_tree(self, path: Path, owner: str) -> RealTree:
        return RealTree(path, owner)


class RealFolder:
    """`Folder` by descriptor."""

    def __init__(self, fd: int, top: RealTree) -> None:
        self._fd: int | None = fd
        self._top = top
        self._opener = DirectOpener()

    @property
    def at(self) -> int:
        """The descriptor. Raises `ValueError` after `close`."""
        if self._fd is None:
            raise ValueError("this folder is closed here")
        return self._fd

    def write(self, name: str, data: memoryview) -> None:
        temporary = f"{name}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fd = self._opener.open(temporary, flags, self.at, aligned=len(data) % PAGE_BYTES == 0)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=self.at, dst_dir_fd=self.at)
        os.fsync(self.at)

    def read(self, name: str, allocate: Callable[[int], memoryview]) -> memoryview:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.at)
        try:
            size = os.fstat(fd).st_size
            into = allocate(size)
            read_all(fd, into[:size], 0, name)
            return into
        finally:
            os.close(fd)

    def list(self) -> list[DirectoryEntry]:
        return plain_files(self.at)

    def move(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self.at, dst_dir_fd=self._top.at)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.at)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class RealTree(RealDirectory):
    """`Tree` by descriptor; the lock on it dies with its holder."""

    @property
    def at(self) -> int:
        """The descriptor of the directory at the top."""
        return self._at

    def make_opened(self, name: str) -> RealFolder:
        os.mkdir(name, 0o700, dir_fd=self._at)
        try:
            return self.open_folder(name)
        except BaseException:
            os.rmdir(name, dir_fd=self._at)
            raise

    def open_folder(self, name: str) -> RealFolder:
        return RealFolder(os.open(name, _DIRECTORY, dir_fd=self._at), self)

    def folders(self, name: str) -> list[str]:
        fd = os.open(name, _DIRECTORY, dir_fd=self._at)
        try:
            with os.scandir(fd) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        finally:
            os.close(fd)

    def empty(self, name: str) -> bool:
        for _ in range(EMPTY_ROUNDS_MAX):
            try:
                self._empty_once(name)
                return True
            except FileNotFoundError:
                return True
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        return False

    def _empty_once(self, name: str) -> None:
        fd = os.open(name, _DIRECTORY, dir_fd=self._at)
        try:
            with os.scandir(fd) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for inner, is_folder in found:
                if is_folder:
                    self._empty_once(f"{name}/{inner}")
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(inner, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=self._at)

    def usage(self, name: str) -> tuple[int, int]:
        files = self.list(name)
        items, size = len(files), sum(file.size_bytes for file in files)
        for inner in self.folders(name):
            below = self.usage(f"{name}/{inner}")
            items, size = items + below[0], size + below[1]
        return items, size

    def sync_folder(self, name: str) -> None:
        fd = os.open(name, _DIRECTORY, dir_fd=self._at)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def read_small(self, name: str) -> bytes | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._at)
        except FileNotFoundError:
            return None
        try:
            return os.pread(fd, SMALL_BYTES_MAX, 0)
        finally:
            os.close(fd)

    def write_small(self, name: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(f"{name}.tmp", flags, 0o600, dir_fd=self._at)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            os.fsync(fd)
        finally:
            os.close(fd)
        self.rename(f"{name}.tmp", name)
        self.sync()


def page_memory(size_bytes: int) -> memoryview:
    """Page-aligned memory of whole pages, which can go to the disk past the page cache."""
    return memoryview(mmap.mmap(-1, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES or PAGE_BYTES))


def descriptor_room(wanted: int) -> int:
    """How many of `wanted` descriptors this process may hold beside its others; raises the soft limit towards the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, wanted * 4)
    if soft < min(hard, wanted * 2):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted * 2), hard))
            soft = min(hard, wanted * 2)
    return max(1, min(wanted, soft // 2))
