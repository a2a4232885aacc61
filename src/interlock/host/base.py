"""What a driver may ask of the machine. `real.RealHost` answers on Linux; a simulated host answers in tests.

Conventions. Seconds are floats on the monotonic clock, wall time is integer nanoseconds. Addresses are
`unix:/path` or `tcp:host:port`. Whatever waits is awaitable, and its caller bounds it with `asyncio.timeout`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

T = TypeVar("T")


class Peer(msgspec.Struct, frozen=True):
    """Who is at the other end of a connection, in the kernel's words (SO_PEERCRED for Unix sockets)."""

    address: str
    pid: int | None = None
    uid: int | None = None


class Clock(Protocol):
    """Time, as this host has it. Nobody else asks the machine for it."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never steps back; its zero means nothing."""
        ...

    def wall_ns(self) -> int:
        """Wall-clock time in nanoseconds since 1970; may step back."""
        ...

    async def sleep_s(self, seconds: float) -> None:
        """For so many seconds of `monotonic_s`; 0 or less lets others run once."""
        ...


class Watch(Protocol):
    """Proof of one process's exit, held by pidfd: no pid that was reused can be mistaken for it."""

    @property
    def pid(self) -> int:
        """What its process id is, or was: after the exit the number may be somebody else's."""
        ...

    @property
    def exited(self) -> bool:
        """Whether it has ended. Asks the kernel, never waits; a zombie that nobody reaped has ended."""
        ...

    async def wait_exited(self) -> None:
        """Returns once it has ended. Raises `ConnectionAbortedError` when the watch is closed before."""
        ...

    def kill(self) -> None:
        """SIGKILL to exactly that process; nothing if it is gone."""
        ...

    def close(self) -> None:
        """Gives the descriptor back. Idempotent."""
        ...


class Stream(Protocol):
    """One connected byte stream. One task reads at a time; writes of several tasks do not interleave."""

    @property
    def peer(self) -> Peer:
        """Who is at the other end; `pid` and `uid` over Unix sockets only."""
        ...

    async def send(self, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()) -> None:
        """All of `data`, with descriptors attached to its first byte. Raises `ConnectionError` once the stream is broken."""
        ...

    async def receive_exactly(self, count: int) -> bytes:
        """`count` bytes; raises `EOFError` when the peer closed first, `ConnectionError` when the stream broke."""
        ...

    def take_fds(self) -> list[int]:
        """Descriptors received so far, owned by the caller from now on."""
        ...

    def watch_peer(self) -> Watch | None:
        """Proof of exit of the process at the other end (SO_PEERPIDFD, else pidfd_open); None where it has no pid here."""
        ...

    def close(self) -> None:
        """Ends the stream now; a blocked reader or writer gets `ConnectionError`. Idempotent."""
        ...


class Listener(Protocol):
    """A socket that is being listened on, until `close`."""

    @property
    def address(self) -> str:
        """Where it listens, as `unix:/path` or `tcp:host:port`; the port is the real one where 0 was asked for."""
        ...

    async def close(self) -> None:
        """Stops accepting, ends the connection handlers still running and removes a Unix socket's file."""
        ...


class Child(Protocol):
    """A process we started, in a session and process group of its own."""

    @property
    def pid(self) -> int:
        """Its process id; it stays this child's until `wait` or `end_tree` has reaped it."""
        ...

    @property
    def returncode(self) -> int | None:
        """Exit status, negative signal number, or None while it runs."""
        ...

    async def wait(self) -> int:
        """The exit status, or the negative number of the signal that ended it."""
        ...

    def terminate(self) -> None:
        """SIGTERM to the child alone; nothing if it has ended. Does not wait."""
        ...

    async def end_tree(self, timeout_s: float) -> bool:
        """SIGKILL to its whole process group and to every descendant that left it, until none is seen.

        True when proven gone within `timeout_s`.
        """
        ...


class Files(Protocol):
    """Small state files. Bulk data does not pass here."""

    def read(self, path: Path, limit_bytes: int) -> bytes | None:
        """The whole file, or None if there is none. Raises `ValueError` when it is longer than `limit_bytes`."""
        ...

    def write_durably(self, path: Path, data: bytes) -> None:
        """Temporary file, fsync, rename, fsync of the directory: after return a crash leaves old or new, never half."""
        ...

    def write_in_place(self, path: Path, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Overwrites bytes that the file has, each piece at its offset; on the medium when it returns, by one fdatasync.

        A crash meanwhile leaves any mixture of old and new bytes: who writes so knows by checksums which are whole. Raises
        `FileNotFoundError`, `OSError`: then nobody knows what of it will be read.
        """
        ...

    def set_aside(self, path: Path) -> Path:
        """Renames a file that cannot be used to a name of its own beside it, durably; returns that name."""
        ...

    def remove(self, path: Path) -> None:
        """Removes a file or an empty directory; nothing if there is none."""
        ...

    def make_private_dir(self, path: Path) -> None:
        """A directory of mode 0700 that we own; raises `PermissionError` if it exists and is anything else."""
        ...


class DirectoryEntry(msgspec.Struct, frozen=True, order=True):
    """A file of a directory. `allocated_bytes` is less than its size where holes were punched."""

    name: str
    size_bytes: int
    allocated_bytes: int


class Piece(msgspec.Struct, frozen=True, eq=False):
    """Where in a file to read what fills `into`. Page-aligned offset, length and memory go past the page cache."""

    offset: int
    into: memoryview


class FileMapping(Protocol):
    """A mapped file. `view` is writable; what is stored there survives this process, and perhaps a power cut."""

    @property
    def view(self) -> memoryview:
        """All bytes of the file, writable; not to be used after `close`."""
        ...

    def warm(self) -> None:
        """Asks the kernel to read the file ahead; returns at once."""
        ...

    def close(self) -> None:
        """Unmaps it once nobody looks into the view any more. Idempotent."""
        ...


class Directory(Protocol):
    """One directory of large files that is ours while it is open (`host/disk.py`). All calls block: make them in a thread."""

    def list(self, folder: str = ".") -> list[DirectoryEntry]:
        """The plain files of this directory, or of a folder in it, by name."""
        ...

    def make_folder(self, name: str) -> None:
        """A folder of mode 0700; nothing if it is there."""
        ...

    def rename(self, name: str, to: str) -> None:
        """Replaces a file called `to`. It survives a power cut after `sync`. Raises `FileNotFoundError`, `OSError`."""
        ...

    def remove(self, name: str) -> None:
        """Nothing if there is no such file."""
        ...

    def sync(self) -> None:
        """Names made, changed and removed so far survive a power cut after this."""
        ...

    def size(self, name: str) -> int | None:
        """In bytes; None if there is no such file."""
        ...

    def write_new(self, name: str, data: memoryview) -> None:
        """A new file with `data`: page-aligned memory of whole pages. Raises `FileExistsError`, `OSError` (disk full)."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Durable when it returns (a new file needs `sync` as well). Raises `OSError`."""
        ...

    def read(self, name: str, pieces: Sequence[Piece]) -> None:
        """Fills each piece's buffer from its offset. Raises `EOFError` when the file ends before, `OSError`."""
        ...

    def punch(self, name: str, offset: int, length: int) -> None:
        """Gives that range, in bytes, back to the file system; it reads as zeros afterwards. Raises `OSError` where it cannot."""
        ...

    def map(self, name: str, size_bytes: int) -> FileMapping:
        """Maps a file, made with that size if there is none. Raises `ValueError` when it has another size."""
        ...

    def close(self) -> None:
        """Lets another have the directory. Idempotent."""
        ...


class SharedMemory(Protocol):
    """A memfd that is allocated, sealed against SHRINK, GROW and SEAL, and mapped MADV_DONTFORK."""

    @property
    def size_bytes(self) -> int:
        """What was asked for, whole pages or not."""
        ...

    @property
    def view(self) -> memoryview:
        """All of it as unsigned bytes; not to be used after `close`."""
        ...

    @property
    def fd(self) -> int:
        """Read-write descriptor, to be handed to writers."""
        ...

    def read_into(self, offset: int, into: memoryview) -> None:
        """Copies bytes out by a system call: unlike a touch of `view` it maps nothing into this process. Blocks."""
        ...

    def write_at(self, offset: int, data: memoryview) -> None:
        """Copies bytes in by a system call, as `read_into` copies them out. Blocks. Raises `ValueError` outside of it."""
        ...

    def open_read_only(self) -> int:
        """A read-only descriptor of the same memory, to be handed to readers and closed by the caller."""
        ...

    def close(self) -> None:
        """Closes the descriptor; other holders keep theirs. Idempotent."""
        ...


class Host(Protocol):
    """One machine, as one process sees it."""

    @property
    def clock(self) -> Clock:
        """The only clock that drivers read."""
        ...

    @property
    def files(self) -> Files:
        """Small state files; calls block for as long as the disk does."""
        ...

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a blocking function off the loop, in a pool of bounded size."""
        ...

    async def listen(self, address: str, serve: Callable[[Stream], Awaitable[None]]) -> Listener:
        """Serves each connection in a task of its own. Unix sockets are made mode 0600, over a dead predecessor's file."""
        ...

    async def connect(self, address: str) -> Stream:
        """Raises `ConnectionError` (refused, absent); bounded by the caller's `asyncio.timeout`."""
        ...

    def open_directory(self, path: Path, owner: str) -> Directory:
        """Blocks. Raises `DirectoryBusy` naming the process that has it, `OSError` when it cannot be had."""
        ...

    def create_memory(self, name: str, size_bytes: int) -> SharedMemory:
        """Raises `MemoryError` with the size in words when the machine cannot back all of it now."""
        ...

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path | None,
        pass_fds: Sequence[int] = (),
    ) -> Child:
        """Starts a child in a session of its own; output goes to `log`, or is inherited when None."""
        ...

    def watch(self, pid: int) -> Watch:
        """Raises `ProcessLookupError` when there is no such process."""
        ...
