"""Empties the trash, and looks after the writers meanwhile: the two threads that nobody waits for.

The reaper may hang on the disk as a writer may; so late writes are watched from a thread of their own, the keeper.
"""

from __future__ import annotations

from collections.abc import Sequence

from interlock.core.limits import SNAPSHOT_TICK_SECONDS
from interlock.core.snapshot_events import Reaped
from interlock.core.snapshot_state import Directory, Folder
from interlock.host.trees import RunningThread
from interlock.snapshots.desk import LIVE, TRASH, Desk, SnapshotBusy
from interlock.snapshots.writers import Writers

ROOT = "root."
RETRY_SECONDS = 1.0


def trash_of_root(incarnation: int, root: int) -> str:
    """What live/<root> of this life is called in the trash."""
    return f"{ROOT}{incarnation}.{root}"


def root_of(name: str) -> int | None:
    """The number of the root of which this is the name in the trash, or None."""
    number = name.rpartition(".")[2]
    return int(number) if name.startswith(ROOT) and number.isdecimal() else None


def directory_of(name: str) -> Directory | None:
    """The directory of which this is the name, or None."""
    scope, _, rest = name.partition(".")
    incarnation, _, epoch = rest.partition(".")
    if not (scope and incarnation.isdecimal() and epoch.isdecimal()):
        return None
    return Directory(scope, int(incarnation), int(epoch))


class Reaper:
    """`found`: what lay in the trash at start -> (items, bytes), charged until it is gone."""

    def __init__(self, desk: Desk, writers: Writers, found: dict[str, tuple[int, int]]) -> None:
        self._desk, self._writers, self._found = desk, writers, found
        self._is_stopping = False
        self.troubles = 0
        self._threads: list[RunningThread] = [
            desk.host.start_thread("snapshot-reaper", self._reap),
            desk.host.start_thread("snapshot-keeper", self._keep),
        ]

    def _keep(self) -> None:
        while True:
            with self._desk.changes:
                if not self._is_stopping:
                    self._desk.changes.wait(SNAPSHOT_TICK_SECONDS)
                if self._is_stopping:
                    return
            self._writers.watch()
            self._desk.deliver()

    def _reap(self) -> None:
        while True:
            with self._desk.changes:
                while not self._desk.has_trash and not self._is_stopping:
                    self._desk.changes.wait()
                if self._is_stopping and not self._desk.has_trash:
                    return
                self._desk.has_trash = False
            if self.empty_once():
                continue
            with self._desk.changes:  # what could not be removed now is tried again later
                if self._is_stopping:
                    return
                self._desk.changes.wait(RETRY_SECONDS)
                self._desk.has_trash = True

    def empty_once(self) -> bool:
        """Whether nothing that was there is left."""
        all_gone = True
        trashed = self._trashed()
        try:
            # A root that moves meanwhile is seen here or in the trash, which is looked at later.
            live = self._desk.tree.folders(LIVE)
            names = self._names()
            self._taken_by_others(trashed, live, names)
        except OSError:
            self.troubles += 1
            return False
        for name in names:
            try:
                is_gone = self._desk.tree.empty(f"{TRASH}/{name}")
            except OSError:
                self.troubles += 1
                is_gone = False
            if is_gone:
                self._gone(name)
            all_gone = all_gone and is_gone
        return all_gone

    def _names(self) -> Sequence[str]:
        """Of what is in the trash, which is made anew where somebody has removed it. Raises `OSError`."""
        try:
            return self._desk.tree.folders(TRASH)
        except FileNotFoundError:
            self._desk.tree.make_folder(TRASH)
            return ()

    def _trashed(self) -> list[Folder]:
        with self._desk.changes:
            return [f for s in self._desk.book for f in s.folders if f.trashed and not f.reaped]

    def _taken_by_others(self, trashed: Sequence[Folder], live: Sequence[str], names: Sequence[str]) -> None:
        """What somebody else removed from the trash takes no room any more. Looked at in the order of the arguments."""
        roots = [root for name in names if name not in self._found and (root := root_of(name)) is not None]
        with self._desk.changes:
            current = self._desk.book.root
        for folder in trashed:
            waits = folder.root != current and str(folder.root) in live  # for its root's move
            if not waits and str(folder.name) not in names and not any(folder.root <= root for root in roots):
                self._tell(folder.name)
        for name in [each for each in self._found if each not in names]:
            self._gone(name)

    def _gone(self, name: str) -> None:
        if name in self._found:
            items, size = self._found.pop(name)
            with self._desk.changes:
                self._desk.book.trash_found(-items, -size)
                self._desk.changes.notify_all()
        elif (root := root_of(name)) is not None:
            with self._desk.changes:
                gone = [f.name for s in self._desk.book for f in s.folders if f.root <= root and f.trashed]
            for directory in gone:
                self._tell(directory)
        elif (directory_ := directory_of(name)) is not None:
            self._tell(directory_)

    def _tell(self, directory: Directory) -> None:
        while True:
            try:
                with self._desk.scope(directory.scope):
                    with self._desk.changes:
                        scope = self._desk.book.get(directory.scope)
                        folder = (
                            next((f for f in scope.folders if f.name == directory), None) if scope else None
                        )
                    if folder is not None and folder.trashed and not folder.reaped:
                        self._desk.tell(directory.scope, Reaped(directory))
                return
            except SnapshotBusy:
                continue  # its room must come back

    def stop(self) -> None:
        with self._desk.changes:
            self._is_stopping = True
            self._desk.changes.notify_all()

    def join(self, deadline_s: float) -> bool:
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - self._desk.host.monotonic_s()))
        return not any(thread.is_alive() for thread in self._threads)
