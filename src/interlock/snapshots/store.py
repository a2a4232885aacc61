"""`SnapshotStore`: keep a request's state at a position, read it back, erase it, or keep it beyond the request. Thread-safe.

`save` copies the state once and returns; `erase` renames one directory and returns. Neither waits for a writer. What an accepted
snapshot becomes is told to `on_notice`: durable, failed, damaged. The rules are core/snapshots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.limits import (
    SNAPSHOT_CALL_SECONDS_MAX,
    SNAPSHOT_KEPT_BYTES_MAX,
    SNAPSHOT_SCOPES_MAX,
    SNAPSHOT_WRITE_SECONDS_MAX,
)
from interlock.core.snapshot_book import BUDGET, Amount
from interlock.core.snapshot_events import (
    Close,
    Effect,
    Erase,
    EraseFailed,
    NotPromoted,
    Promote,
    Promoted,
    RootMoved,
)
from interlock.core.snapshot_state import scope_name
from interlock.host.trees import RealThreadHost, ThreadHost, descriptor_room
from interlock.snapshots.desk import LIVE, Desk, Notice, SnapshotBusy, SnapshotError
from interlock.snapshots.format import Snapshot
from interlock.snapshots.kept import Kept
from interlock.snapshots.loading import Loader
from interlock.snapshots.reaper import Reaper, trash_of_root
from interlock.snapshots.saving import Saved, Saver
from interlock.snapshots.start import Claim, open_store
from interlock.snapshots.writers import Writers

CLOSE_SECONDS = 10.0


def _ignore(notice: Notice) -> None:
    """Nobody wants to know: the counts of `stats` remain."""


class Stats(msgspec.Struct, frozen=True):
    """A store at one moment."""

    counts: dict[str, int]
    used: Amount
    budget: Amount
    scopes: int
    queued: int
    hung_writers: int
    replaced_writers: int
    kept: int
    kept_bytes: int
    spare_bytes: int
    dropped_notices: int


class SnapshotStore:
    """One directory's snapshots; one store a directory, one process a store."""

    def __init__(
        self,
        path: Path,
        *,
        owner: str,
        claims: Sequence[Claim] = (),
        on_notice: Callable[[Notice], None] = _ignore,
        budget: Amount = BUDGET,
        kept_bytes_max: int = SNAPSHOT_KEPT_BYTES_MAX,
        write_seconds_max: float = SNAPSHOT_WRITE_SECONDS_MAX,
        host: ThreadHost | None = None,
    ) -> None:
        """`budget` bounds what requests have, `kept_bytes_max` what was promoted.

        Raises `DirectoryBusy` when a living process has `path`, `PermissionError`, `OSError`."""
        self._host = host or RealThreadHost()
        opened = open_store(self._host, path, owner, claims, budget, descriptor_room(SNAPSHOT_SCOPES_MAX))
        self._budget = budget
        self._desk = Desk(self._host, opened.tree, opened.book, on_notice)
        self._desk.handles.update(opened.adopted)
        self._desk.requests.update(opened.requests)
        self._desk.has_trash = bool(opened.found)
        self.kept = Kept(opened.tree, self._desk.changes, kept_bytes_max)
        self._writers = Writers(self._desk, write_seconds_max)
        self._reaper = Reaper(self._desk, self._writers, opened.found)
        self._saver = Saver(self._host, self._desk, budget, write_seconds_max)
        self._loader = Loader(self._desk)
        self._is_switching = False

    # --- saving and reading ----------------------------------------------------------------------------------------

    def save(
        self,
        request: str,
        position: int,
        tensors: Mapping[str, Any],
        structure: Any = None,
        labels: Mapping[str, str] = {},
    ) -> Saved:
        """Keeps a copy of `tensors` (torch, NumPy or `Raw`) and of `structure` (JSON) at `position`.

        Refused at once when it does not fit the budget, the store is closing, or the disk hangs in a call for this request.
        Raises `TypeError`, `ValueError` for what the format cannot hold.
        """
        return self._saver.save(request, position, tensors, structure, labels)

    def load(self, request: str, position: int) -> Snapshot | None:
        """The state as it was saved, in memory of its own, or None. Raises `SnapshotBusy`."""
        return self._loader.load(request, position)

    def has(self, request: str, position: int) -> bool:
        """Whether a load could find it now."""
        return position in self.boundaries(request)

    def boundaries(self, request: str) -> list[int]:
        """The positions at which a state is kept, ascending."""
        with self._desk.changes:
            scope = self._desk.book.get(scope_name(request))
            if scope is None:
                return []
            items = [i for i in scope.writing if i.directory == scope.directory and not i.overdue]
            return sorted({item.position for item in (*scope.durable, *items)})

    # --- erasing ---------------------------------------------------------------------------------------------------

    def erase(self, request: str) -> None:
        """Afterwards nothing of the request is read, and none of its files stands under the live root. Waits for no writer.

        Raises `SnapshotBusy`, or `SnapshotError` when a directory could not be renamed (nothing is readable; repeat it).
        """
        name = scope_name(request)
        with self._desk.scope(name):
            effects = self._desk.tell(name, Erase())
        _raise_failed(request, effects)

    def erase_all(self, timeout_s: float = SNAPSHOT_CALL_SECONDS_MAX) -> None:
        """`erase` for all, by one rename of the root they stand under. Saves meanwhile go to the new root."""
        desk = self._desk
        deadline_s = self._host.monotonic_s() + timeout_s
        with self._switching(deadline_s):
            with desk.changes:
                old = desk.book.root
            try:
                with contextlib.suppress(FileExistsError):
                    desk.tree.make_folder(f"{LIVE}/{old + 1}")
                with desk.changes:
                    root = desk.book.switch_root()
                    names = desk.book.below(root)
                for name in names:
                    with desk.scope(name, max(0.0, deadline_s - self._host.monotonic_s())):
                        if desk.book.get(name) is not None:
                            desk.tell(name, RootMoved(root))
                for left in self._roots_below(root):
                    desk.to_trash(str(left), trash_of_root(desk.book.incarnation, left))
            except OSError as error:
                raise SnapshotError(f"not all snapshots could be erased: {error}", retryable=True) from error
        desk.wake_reaper()

    def _roots_below(self, root: int) -> list[int]:
        """The root just left, and those of earlier calls that failed half way."""
        names = self._desk.tree.folders(LIVE)
        return sorted(int(name) for name in names if name.isdecimal() and int(name) < root)

    @contextlib.contextmanager
    def _switching(self, deadline_s: float) -> Any:
        desk = self._desk
        with desk.changes:
            while self._is_switching:
                if (left_s := deadline_s - self._host.monotonic_s()) <= 0:
                    raise SnapshotBusy(
                        "another call erases all snapshots and has not come back", retryable=True
                    )
                desk.changes.wait(left_s)
            self._is_switching = True
        try:
            yield
        finally:
            with desk.changes:
                self._is_switching = False
                desk.changes.notify_all()

    # --- keeping ---------------------------------------------------------------------------------------------------

    def promote(self, request: str, position: int, name: str) -> bool:
        """Moves a durable snapshot, without rewriting it, to where every request finds it as `kept.load(name)`.

        `name` is a hash in hexadecimal of what it is a state of. False when nothing durable is there (`flush` first) or the move
        failed. Raises `SnapshotBusy`, `ValueError`.
        """
        scope, desk = scope_name(request), self._desk
        path = Kept.path_of(name)
        with desk.scope(scope):
            desk.targets[scope] = path
            try:
                effects = desk.tell(scope, Promote(position))
            finally:
                desk.targets.pop(scope, None)
        promoted = next((e for e in effects if isinstance(e, Promoted)), None)
        if promoted is None:
            assert any(isinstance(e, NotPromoted) for e in effects)
            return False
        with desk.changes:
            desk.counts["promoted"] += 1
        self.kept.added(name, promoted.item.bytes)
        return True

    def claim(self, request: str) -> Claim | None:
        """What the next life of this store must be told to take the request's snapshots over; None if there are none."""
        with self._desk.changes:
            scope = self._desk.book.get(scope_name(request))
            if scope is None or scope.directory is None:
                return None
            return Claim(request, scope.directory.incarnation, scope.directory.epoch)

    # --- the end, and what is known --------------------------------------------------------------------------------

    def flush(self, request: str | None = None, timeout_s: float = SNAPSHOT_WRITE_SECONDS_MAX) -> bool:
        """Waits until what was accepted so far (of `request`) has an end; False when it has none in time."""
        desk = self._desk
        deadline_s = self._host.monotonic_s() + timeout_s
        name = None if request is None else scope_name(request)
        with desk.changes:
            waited = {
                (i.directory, i.number) for i in desk.book.unwritten() if name in (None, i.directory.scope)
            }
            while waited & {(item.directory, item.number) for item in desk.book.unwritten()}:
                if (left_s := deadline_s - self._host.monotonic_s()) <= 0:
                    return False
                desk.changes.wait(left_s)
        desk.deliver()
        return True

    def close(self, *, erase: bool, timeout_s: float = CLOSE_SECONDS) -> list[Notice]:
        """Refuses saves, then drains (or erases everything), then stops. Returns what was accepted and not written. Idempotent.

        A writer that hangs is left behind; the directory's lock is let go of only when none can write there any more.
        """
        desk = self._desk
        deadline_s = self._host.monotonic_s() + timeout_s
        with desk.changes:
            if desk.is_closing:
                return []
            desk.is_closing = True
        try:
            if erase:
                self.erase_all(timeout_s)
            else:
                self.flush(timeout_s=timeout_s)
        finally:
            with desk.changes:
                left = [
                    Notice(
                        "failed", desk.requests.get(i.directory.scope, ""), i.position, "the store was closed"
                    )
                    for i in desk.book.unwritten()
                ]
            self._stop(deadline_s)
        return left

    def _stop(self, deadline_s: float) -> None:
        desk = self._desk
        desk.tell_owed()
        for name in [scope.name for scope in desk.book]:
            with contextlib.suppress(SnapshotBusy), desk.scope(name, 0.1):
                if desk.book.get(name) is not None:
                    desk.tell(name, Close())
        self._writers.stop()
        is_over = self._writers.join(deadline_s)
        self._reaper.stop()
        is_over = self._reaper.join(deadline_s) and is_over
        desk.deliver()
        if is_over:
            self.kept.close()
            for folder in desk.handles.values():
                folder.close()
            desk.tree.close()

    def stats(self) -> Stats:
        desk = self._desk
        with desk.changes:
            return Stats(
                counts=dict(desk.counts),
                used=desk.book.used,
                budget=self._budget,
                scopes=len(desk.book),
                queued=len(desk.jobs),
                hung_writers=self._writers.hung,
                replaced_writers=self._writers.replaced,
                kept=len(self.kept),
                kept_bytes=self.kept.bytes,
                spare_bytes=desk.buffers.spare_bytes,
                dropped_notices=desk.dropped_notices,
            )

    def check_integrity(self) -> None:
        """Raises `AssertionError` unless memory, descriptors and room are what the scopes account for."""
        self._desk.check_integrity()


def _raise_failed(request: str, effects: Sequence[Effect]) -> None:
    for effect in effects:
        if isinstance(effect, EraseFailed):
            raise SnapshotError(
                f"files of request {request} are still under the live root: {effect.reason}",
                hint="nothing of them is readable; erase it again",
                retryable=True,
            )
