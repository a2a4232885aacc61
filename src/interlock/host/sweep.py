"""Evidence about what a dead process has left: locks that die with their holder, marks that its descendants still carry.

A pid file proves nothing, a name in a process list less. A file lock is held exactly as long as a process of ours lives; a
mark in the environment is inherited by every descendant, whatever session it moved to (host/processes.py sets them).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import select
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from interlock.host.processes import (
    PARENT_FD,
    TREE_MARK,
    all_exited,
    find_tree,
    list_processes,
    reap_orphans,
    watch_living,
)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel shows it, not a place for files
_MAPPED = re.compile(rb"^\S+ \S+ \S+ \S+ (\d+)\s+/dev/shm/", re.MULTILINE)
_MADE_BY_LIBRARIES = ("psm_", "sem.mp-", "torch_", "vllm_")
"""What Python, torch and vLLM make under names of their own; other names there may be anybody's."""


LOCK_POLL_SECONDS = 0.01


class FileLock:
    """An advisory lock on a file of its own, until `release` or the end of this process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd

    @classmethod
    def take(cls, path: Path, *, shared: bool = False, within_s: float = 0.0) -> FileLock | None:
        """None when somebody else holds it in a way that excludes ours, for `within_s` seconds.

        A holder may remove the file; then the lock was on a file that nobody finds any more, and it is taken anew.
        """
        until_s = time.monotonic() + within_s
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if _same_file(fd, path):
                    return cls(path, fd)
            except BlockingIOError:
                os.close(fd)
                if time.monotonic() >= until_s:
                    return None
                time.sleep(LOCK_POLL_SECONDS)
                continue
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def release(self, *, remove: bool = False) -> None:
        """`remove` takes the file away as well; only for the holder of the whole lock. Idempotent."""
        if self._fd is None:
            return
        if remove:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(self._fd)
        self._fd = None


def _same_file(fd: int, path: Path) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), found)


def own_mark(env: Mapping[str, str] = os.environ) -> str | None:
    """The mark that all our descendants carry, if whoever started us gave us one."""
    return env.get(TREE_MARK, "").rpartition("/")[2] or None


async def end_marked(mark: str, timeout_s: float) -> bool:
    """SIGKILL to every process that carries `mark`, but this one, and to its descendants. True when proven gone."""
    try:
        async with asyncio.timeout(timeout_s):
            while living := watch_living(find_tree(-1, mark)):
                for watch in living:
                    watch.kill()
                await all_exited(living)
            reap_orphans()
            return True
    except TimeoutError:
        return False


def descendants(pid: int) -> set[int]:
    """Living and dead ones that have not been reaped, without `pid` itself."""
    entries = list_processes()
    found, grew = {pid}, True
    while grew:
        more = {e.pid for e in entries if e.parent in found} - found
        found |= more
        grew = bool(more)
    return found - {pid}


def shared_memory_of(root: int) -> set[str]:
    """Names under /dev/shm that `root` and its descendants have mapped now: what would stay behind if they were killed."""
    inodes: set[int] = set()
    for pid in descendants(root) | {root}:
        with contextlib.suppress(OSError):
            inodes |= {int(inode) for inode in _MAPPED.findall(Path(f"/proc/{pid}/maps").read_bytes())}
    # By inode: a semaphore is mapped under a temporary name and linked to its own afterwards.
    with contextlib.suppress(OSError):
        return {
            entry.name
            for entry in os.scandir(SHARED_MEMORY)
            if entry.inode() in inodes and entry.name.startswith(_MADE_BY_LIBRARIES)
        }
    return set()


def remove_shared_memory(names: Iterable[str]) -> None:
    """Names under /dev/shm; what is gone already, or is another user's, is passed over."""
    for name in names:
        if "/" not in name and name not in (".", ".."):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                os.unlink(SHARED_MEMORY / name)


def end_marked_now(mark: str) -> None:
    """SIGKILL to every process that carries `mark` but this one, without waiting: for a process that must leave now."""
    for entry in find_tree(-1, mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(entry.pid, signal.SIGKILL)


def parent_pipe_ended(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the process that holds the write end of our parent pipe is gone; False when we were given none."""
    named = env.get(PARENT_FD, "")
    if not named.isdecimal():
        return False
    poll = select.poll()
    try:
        poll.register(int(named), 0)  # POLLHUP is reported unasked
        return any(event & select.POLLHUP for _, event in poll.poll(0))
    except OSError:
        return False


def wait_parent_pipe_ended(env: Mapping[str, str] = os.environ) -> None:
    """Blocks until the supervisor is gone; for a thread. Never returns when we were given no pipe."""
    named = env.get(PARENT_FD, "")
    poll = select.poll()
    if named.isdecimal():
        poll.register(int(named), 0)
    while not any(event & (select.POLLHUP | select.POLLNVAL) for _, event in poll.poll()):
        pass
