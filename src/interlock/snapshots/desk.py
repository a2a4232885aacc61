"""Scopes, their locks, and the effects of core/snapshots turned into calls of the file system. It decides nothing.

Two locks. The *mutex* (`changes`) guards what is in memory and is never held over a file call. A *scope's lock* is held from an
event to the last effect of it, over single metadata calls (mkdir and open, rename), never over data; so a stalled writer, or a
read of a gigabyte, holds up nobody's erase.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from interlock.core.errors import InterlockError
from interlock.core.limits import SNAPSHOT_CALL_SECONDS_MAX, SNAPSHOT_NOTICES_MAX
from interlock.core.snapshot_book import SnapshotBook
from interlock.core.snapshot_events import (
    Accepted,
    CallDone,
    CallFailed,
    CloseDirectory,
    Durable,
    Effect,
    Effects,
    Erased,
    Event,
    Failed,
    LoadRead,
    MakeDirectory,
    MoveToStore,
    MoveToTrash,
    ReadStaged,
    Skip,
    WriteEnded,
)
from interlock.core.snapshot_state import Directory, Item
from interlock.host.trees import Folder, ThreadHost, Tree
from interlock.snapshots.buffers import Buffer, Buffers
from interlock.snapshots.format import Layout
from interlock.snapshots.tensors import Staging

LIVE, TRASH, KEPT = "live", "trash", "kept"


class SnapshotBusy(InterlockError):  # noqa: N818 - says what is
    """A metadata call of this request has not come back: the disk hangs. Nothing was changed; ask again."""


class SnapshotError(InterlockError):
    """An erase, promotion or close that could not be done, in words."""


class Notice(msgspec.Struct, frozen=True):
    """What became of a snapshot that was accepted, told to its owner in order."""

    kind: Literal["durable", "failed", "damaged"]
    request: str
    position: int
    reason: str = ""


class Image(msgspec.Struct, frozen=True, eq=False):
    """A snapshot in memory on its way to disk."""

    layout: Layout
    buffer: Buffer
    staging: Staging


class Job(msgspec.Struct, frozen=True, eq=False):
    """One file to be written, through a descriptor that stays open until its `WriteEnded`."""

    item: Item
    image: Image
    folder: Folder


class Desk:
    """What every thread of a store shares."""

    def __init__(
        self, host: ThreadHost, tree: Tree, book: SnapshotBook, deliver: Callable[[Notice], None]
    ) -> None:
        self.host, self.tree, self.book = host, tree, book
        self.changes = host.changes()
        self.buffers = Buffers()
        self.jobs: deque[Job] = deque()
        self.skipped: set[tuple[str, int]] = set()
        """Items that nobody wants any more and that are not written yet."""
        self.requests: dict[str, str] = {}
        """Scope -> request, for notices."""
        self.staged: dict[tuple[str, int], Image] = {}
        self.handles: dict[Directory, Folder] = {}
        self.owed: deque[tuple[str, LoadRead]] = deque()
        self.synced: set[Directory] = set()
        """Directories whose own names are known to outlive a power cut."""
        self.targets: dict[str, str] = {}
        """Scope -> where its promotion goes."""
        self.counts: dict[str, int] = dict.fromkeys(
            ("accepted", "refused", "durable", "failed", "damaged", "erased", "loads", "misses", "promoted"),
            0,
        )
        self.dropped_notices = 0
        self.failed_deliveries = 0
        self._held: set[str] = set()
        self._notices: deque[Notice] = deque()
        self._deliver = deliver
        self._is_delivering = False
        self.has_trash = False
        self.is_closing = False
        """No save is taken any more."""

    # --- a scope's lock --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, name: str, timeout_s: float = SNAPSHOT_CALL_SECONDS_MAX) -> Iterator[None]:
        """Raises `SnapshotBusy`."""
        deadline_s = self.host.monotonic_s() + timeout_s
        with self.changes:
            while name in self._held:
                left_s = deadline_s - self.host.monotonic_s()
                if left_s <= 0:
                    request = self.requests.get(name, name)
                    raise SnapshotBusy(
                        f"the snapshots of request {request} are held by a call to the disk that has not come back",
                        retryable=True,
                    )
                self.changes.wait(left_s)
            self._held.add(name)
        try:
            yield
        finally:
            with self.changes:
                self._held.discard(name)
                self.changes.notify_all()
        self.deliver()

    # --- events and effects ----------------------------------------------------------------------------------------

    def tell(self, name: str, event: Event, image: Image | None = None) -> list[Effect]:
        """Tells a scope whose lock is held, does what follows, and returns all of it."""
        return self.follow(name, lambda: self.book.handle(name, event), event, image)

    def follow(
        self,
        name: str,
        tell: Callable[[], Effects],
        event: Event | None = None,
        image: Image | None = None,
    ) -> list[Effect]:
        seen: list[Effect] = []
        todo = deque(self._told(name, tell, event, image))
        while todo:
            effect = todo.popleft()
            seen.append(effect)
            answer = self._call(name, effect)
            if answer is not None:
                told: CallDone | CallFailed = answer
                todo.extend(self._told(name, lambda told=told: self.book.handle(name, told), told, image))  # type: ignore[misc]
        return seen

    def tell_owed(self) -> None:
        """Ends of loads that found their scope held for too long: without them a descriptor would stay open for ever."""
        for _ in range(len(self.owed)):
            name, event = self.owed.popleft()
            try:
                with self.scope(name, 0.0):
                    self.tell(name, event)
            except SnapshotBusy:
                self.owed.append((name, event))

    def _told(
        self, name: str, tell: Callable[[], Effects], event: Event | None, image: Image | None
    ) -> Effects:
        """The book and what is in memory change together."""
        with self.changes:
            effects = tell()
            for effect in effects:
                self._remember(name, effect, image)
            if isinstance(event, WriteEnded):
                self.staged.pop((name, event.item)).buffer.release()
                self.skipped.discard((name, event.item))
            if self.book.get(name) is None:
                self.requests.pop(name, None)
            self.changes.notify_all()
        return effects

    def _remember(self, name: str, effect: Effect, image: Image | None) -> None:
        match effect:
            case Accepted(item, is_new=True):
                assert image is not None
                self.staged[name, item.number] = image
                self.jobs.append(Job(item, image, self.handles[item.directory]))
                self.counts["accepted"] += 1
            case Skip(item):
                self.skipped.add((name, item.number))
            case Durable(item):
                self._note("durable", item)
            case Failed(item, reason):
                self._note("failed", item, reason)
            case Erased():
                self.counts["erased"] += 1
            case ReadStaged(load):
                self.staged[name, load.item.number].buffer.hold()

    def to_trash(self, live: str, name: str) -> None:
        """Moves `live` out of the live root. A trash that somebody has removed is made anew. Raises `OSError`."""
        try:
            self.tree.rename(f"{LIVE}/{live}", f"{TRASH}/{name}")
        except FileNotFoundError:
            self.tree.make_folder(TRASH)
            self.tree.rename(f"{LIVE}/{live}", f"{TRASH}/{name}")

    def _call(self, name: str, effect: Effect) -> CallDone | CallFailed | None:
        """The metadata calls, under the scope's lock and outside the mutex."""
        try:
            match effect:
                case MakeDirectory(directory, root):
                    folder = self.tree.make_opened(f"{LIVE}/{root}/{directory}")
                    with self.changes:
                        self.handles[directory] = folder
                case MoveToTrash(directory, root):
                    self.to_trash(f"{root}/{directory}", str(directory))
                    self.wake_reaper()
                case MoveToStore(item):
                    self.handles[item.directory].move(item.file, self.targets[name])
                case CloseDirectory(directory):
                    with self.changes:
                        folder = self.handles.pop(directory)
                        self.synced.discard(directory)
                    folder.close()
                    return None
                case _:
                    return None
        except OSError as error:
            return None if isinstance(effect, CloseDirectory) else CallFailed(str(error))
        return CallDone()

    def wake_reaper(self) -> None:
        with self.changes:
            self.has_trash = True
            self.changes.notify_all()

    # --- notices ---------------------------------------------------------------------------------------------------

    def _note(self, kind: Literal["durable", "failed", "damaged"], item: Item, reason: str = "") -> None:
        self.counts[kind] += 1
        request = self.requests.get(item.directory.scope, item.directory.scope)
        self._notices.append(Notice(kind, request, item.position, reason))
        if len(self._notices) > SNAPSHOT_NOTICES_MAX:
            self._notices.popleft()
            self.dropped_notices += 1

    def note_damage(self, item: Item, reason: str) -> None:
        with self.changes:
            self._note("damaged", item, reason)

    def deliver(self) -> None:
        """Hands notices to the owner, one thread at a time and in order, under no lock."""
        while True:
            with self.changes:
                if self._is_delivering or not self._notices:
                    return
                self._is_delivering, notice = True, self._notices.popleft()
            try:
                self._deliver(notice)
            except Exception:  # the owner's defect must not end a writer; it shows in the counts
                self.failed_deliveries += 1
            finally:
                with self.changes:
                    self._is_delivering = False

    # --- what must hold --------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises `AssertionError`. Call it from a thread of none of the store's, between two calls of it."""
        with self.changes:
            self.book.check_integrity()
            writing = {(scope.name, item.number) for scope in self.book for item in scope.writing}
            assert set(self.staged) == writing, f"staged {set(self.staged)}, writing {writing}"
            if not self._held:
                is_open = {f.name for scope in self.book for f in scope.folders if f.is_open}
                assert set(self.handles) == is_open, f"open {set(self.handles)}, of folders {is_open}"
