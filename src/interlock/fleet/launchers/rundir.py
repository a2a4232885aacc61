"""The run directory: everything that a fleet on this machine has in the file system, private, named by its port.

    <base>/<port>.lock      held by the supervisor: whoever holds it owns <port>/
    <base>/<port>/          mode 0700: sockets, logs, states of the processes
        children            held shared by each child: who can take it alone is the last one

The supervisor removes all of it when it ends. When it is killed its children leave, and the last of them removes it. When all
of them were killed the next fleet on that port does, after it has ended what still carries the old fleet's mark.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from interlock.host.base import Host
from interlock.host.sweep import FileLock, end_marked, remove_shared_memory

SWEEP_SECONDS_MAX = 10.0
MARK_FILE = "mark"
CHILDREN_FILE = "children"
LEAVE_FILE = "leave"
SHARED_MEMORY_SUFFIX = ".shm"
NAMES_BYTES_MAX = 1 << 16


class RunDirBusy(Exception):  # noqa: N818 - says what is, as the others do
    """Another fleet runs on this port; the message says so and what to do."""


def base_folder() -> Path:
    """`$XDG_RUNTIME_DIR/interlock`, else `interlock-<uid>` in the folder for temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "interlock"
    return Path(tempfile.gettempdir()) / f"interlock-{os.getuid()}"


def coordinator_address(port: int, base: Path | None = None) -> str:
    """Where the coordinator of the fleet on `port` listens, if there is one."""
    return f"unix:{(base or base_folder()) / str(port) / 'coordinator.sock'}"


def leave_file(port: int, base: Path | None = None) -> Path:
    """Whoever may write it tells the supervisor of a stopped fleet to end the rest, too."""
    return (base or base_folder()) / str(port) / LEAVE_FILE


class RunDir:
    """One fleet's directory; made by `claim`, ended by `remove`."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    async def claim(cls, host: Host, port: int, mark: str, base: Path | None = None) -> RunDir:
        """An empty run directory for this port, after whatever a dead predecessor left was ended and removed.

        Raises `RunDirBusy`, and `OSError` when the base folder cannot be used.
        """
        base = base or base_folder()
        host.files.make_private_dir(base)
        lock = FileLock.take(base / f"{port}.lock")
        if lock is None:
            raise RunDirBusy(
                f"a fleet of yours already runs on port {port}; end it with `interlock ctl stop --end --port {port}`, "
                "or choose another --port"
            )
        run = cls(base / str(port), lock)
        try:
            await run._sweep(host)
            host.files.make_private_dir(run.path)
            host.files.write_durably(run.path / MARK_FILE, mark.encode())
        except BaseException:
            lock.release()
            raise
        return run

    async def _sweep(self, host: Host) -> None:
        if not self.path.exists():
            return
        mark = host.files.read(self.path / MARK_FILE, 256)
        if mark and not await end_marked(mark.decode(), SWEEP_SECONDS_MAX):
            raise RunDirBusy(
                f"processes of a fleet that has died still run in {self.path} and could not be ended; "
                "end them, or choose another --port"
            )
        remove_tree(self.path)

    def remove(self) -> None:
        """Takes everything away, the lock last."""
        remove_tree(self.path)
        self._lock.release(remove=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


class ChildMark:
    """Held by each child of the fleet, so that the last one knows it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lock = FileLock.take(path / CHILDREN_FILE, shared=True)
        if lock is None:
            raise RunDirBusy(f"{path} is being removed")
        self._lock = lock

    def leave(self, *, supervisor_gone: bool) -> None:
        """Before exit. With the supervisor gone, and no child and no new fleet there, removes the run directory."""
        self._lock.release()
        if not supervisor_gone or not self._path.exists():
            return
        with contextlib.suppress(OSError):  # another of the last ones was faster
            self._remove_as_last()

    def _remove_as_last(self) -> None:
        """The kernel closes a dying supervisor's pipe before its lock: whoever was woken by the one waits for the other."""
        if not self._no_child():
            return
        owner = FileLock.take(
            self._path.parent / f"{self._path.name}.lock", within_s=SUPERVISOR_EXIT_SECONDS_MAX
        )
        if owner is None:
            return  # a new fleet has it
        if self._path.exists() and self._no_child():
            RunDir(self._path, owner).remove()
        else:
            owner.release(remove=not self._path.exists())

    def _no_child(self) -> bool:
        lock = FileLock.take(self._path / CHILDREN_FILE)
        if lock is not None:
            lock.release()
        return lock is not None


SUPERVISOR_EXIT_SECONDS_MAX = 1.0
REMOVE_TRIES = 50


def remove_tree(path: Path) -> None:
    """The directory, and the shared memory that its processes are on record to have used. They must be gone."""
    for record in path.glob(f"*{SHARED_MEMORY_SUFFIX}"):
        forget_shared_memory(record)
    for _ in range(
        REMOVE_TRIES
    ):  # one that has said it leaves may still write its last file into a folder that was just emptied
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return


def forget_shared_memory(record: Path) -> None:
    """Removes the shared memory named in `record`, one name a line, and the record."""
    with contextlib.suppress(OSError):
        remove_shared_memory(record.read_bytes()[:NAMES_BYTES_MAX].decode().split())
        record.unlink()
