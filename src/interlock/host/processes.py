"""Processes: proof of exit by pidfd, and children whose whole tree can be ended and proven gone.

A child starts in a session of its own, but its descendants may leave it (setsid), and may outlive it. They are found by
four traces: the session or process group of the child, descent from it, and a mark in the environment that every
descendant inherits. What has lost its parents is adopted by us, once `become_subreaper` was called, and reaped here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from interlock.host.watch import ProcessWatch

PARENT_FD = "INTERLOCK_PARENT_FD"
"""Number of the descriptor that ends when the supervisor is gone."""
TREE_MARK = "INTERLOCK_TREE"
"""Path of marks, one a generation of `spawn`, so that a fleet inside a fleet still carries the outer mark."""
_PR_SET_CHILD_SUBREAPER = 36
_spawned: set[int] = set()
"""Children of ours that are not reaped yet; every other child of a subreaper was adopted."""
_subreaping = False


class Entry(NamedTuple):
    """One process as /proc/<pid>/stat shows it."""

    pid: int
    state: str
    parent: int
    group: int
    session: int


def list_processes() -> list[Entry]:
    """All that /proc shows now, without those that vanished while it was read."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The command's name is in parentheses and may hold anything, so the fields count from the last one.
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                found.append(Entry(int(name), fields[0], int(fields[1]), int(fields[2]), int(fields[3])))
    return found


def _marks(pid: int) -> list[str]:
    """The path of marks that `pid` was started with; empty when it cannot be told (gone, zombie, another user's)."""
    for variable in _environment(pid).split(b"\0"):
        if variable.startswith(TREE_MARK.encode() + b"="):
            return variable.partition(b"=")[2].decode(errors="replace").split("/")
    return []


def _environment(pid: int) -> bytes:
    """Each thread can tell it; once the first one has ended, whose file has the process's name, only the others can."""
    with contextlib.suppress(OSError):
        if environment := Path(f"/proc/{pid}/environ").read_bytes():
            return environment
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                if environment := Path(f"/proc/{pid}/task/{thread}/environ").read_bytes():
                    return environment
    return b""


def watch_living(entries: Sequence[Entry]) -> list[ProcessWatch]:
    """A watch, for the caller to close, of each process that has not exited whole.

    The state alone does not tell: a process whose first thread has ended is shown as a zombie, and cannot be reaped, for
    as long as another of its threads lives, be it only to die of the same SIGKILL.
    """
    living = []
    for entry in entries:
        with contextlib.suppress(ProcessLookupError):
            watch = ProcessWatch.of(entry.pid)
            if watch.exited:
                watch.close()
            else:
                living.append(watch)
    return living


async def all_exited(watches: Sequence[ProcessWatch]) -> None:
    """Waits for the exit of each, and closes the watches in any case."""
    try:
        for watch in watches:
            await watch.wait_exited()
    finally:
        for watch in watches:
            watch.close()


def find_tree(root: int, mark: str) -> list[Entry]:
    """Every process of the tree that `root` began, `root` itself included while it is a zombie or alive."""
    entries = list_processes()
    tree = {e.pid for e in entries if root in (e.pid, e.session, e.group)}
    tree |= {e.pid for e in entries if e.pid not in tree and mark in _marks(e.pid)}
    tree.discard(os.getpid())
    grew = True
    while grew:
        more = {e.pid for e in entries if e.parent in tree} - tree
        tree |= more
        grew = bool(more)
    return [e for e in entries if e.pid in tree]


class RealChild:
    """`Child` started by `spawn`.

    While other processes of its tree live, it is not reaped: its number, which names the session and the group, cannot
    be given to a stranger then. `wait` reaps it when it was the last one, `end_tree` in any case.
    """

    def __init__(self, process: subprocess.Popen[bytes], mark: str) -> None:
        self._process = process
        self._mark = mark
        self._watch = ProcessWatch.of(process.pid)
        self._status: int | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        if self._status is None and self._watch.exited:
            self._look()
        return self._status

    def _look(self) -> None:
        """Reads the status without reaping."""
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is not None:
            code = result.si_status
            self._status = code if result.si_code == os.CLD_EXITED else -code
            if len(find_tree(self.pid, self._mark)) <= 1:
                self._reap()

    def _reap(self) -> None:
        if self._process.returncode is None:
            self._process.wait()
            _spawned.discard(self.pid)

    async def wait(self) -> int:
        while (status := self.returncode) is None:
            await self._watch.wait_exited()
        return status

    def terminate(self) -> None:
        """SIGTERM to the child alone: ending the rest in order is its own work."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    async def end_tree(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while living := self._kill_all():
                    await all_exited(living)
                return True
        except TimeoutError:
            return False

    def _kill_all(self) -> list[ProcessWatch]:
        """One round: kills what lives, and says what that was. Empty: the tree is proven gone, and reaped."""
        entries = find_tree(self.pid, self._mark)
        living = watch_living(entries)
        for watch in living:
            watch.kill()
        if not living:
            for entry in entries:
                if entry.pid != self.pid and entry.parent == os.getpid():
                    _reap(entry.pid)
            if self._status is None:
                self._look()
            self._reap()
            reap_orphans()
        return living


def spawn_child(
    argv: Sequence[str], *, env: Mapping[str, str], log: Path | None, pass_fds: Sequence[int] = ()
) -> RealChild:
    """Raises `OSError` when the program cannot be started."""
    mark = secrets.token_hex(8)
    marked = {**env, TREE_MARK: "/".join(filter(None, [env.get(TREE_MARK), mark]))}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600) if log else None
    try:
        process = subprocess.Popen(
            list(argv),
            env=marked,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    finally:
        if output is not None:
            os.close(output)
    _spawned.add(process.pid)
    return RealChild(process, mark)


def become_subreaper() -> None:
    """From now on orphans among our descendants become our children: none of them leaves our sight."""
    global _subreaping
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    _subreaping = True


def reap_orphans() -> None:
    """Reaps dead children that we adopted as a subreaper: a zombie's mark cannot be read, so its tree is not known."""
    if _subreaping:
        for entry in list_processes():
            if entry.parent == os.getpid() and entry.state == "Z" and entry.pid not in _spawned:
                _reap(entry.pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def open_parent_pipe() -> tuple[int, int]:
    """(read end, write end). Children get the read end by `pass_fds` and its number in `PARENT_FD`; we keep the other."""
    return os.pipe()


async def parent_gone(env: Mapping[str, str] = os.environ) -> None:
    """Returns when the process that holds the write end of our parent pipe is gone; never, when we were given none.

    Raises `ValueError` when the variable names no descriptor of ours.
    """
    named = env.get(PARENT_FD)
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()
    if named is None:
        await gone
        return
    try:
        fd = int(named)
        os.set_blocking(fd, False)
    except (ValueError, OSError):
        raise ValueError(
            f"{PARENT_FD}={named!r} names no open descriptor; it is set by whoever starts this process"
        ) from None

    def readable() -> None:
        with contextlib.suppress(BlockingIOError):
            if not os.read(fd, 4096) and not gone.done():
                gone.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await gone
    finally:
        loop.remove_reader(fd)
