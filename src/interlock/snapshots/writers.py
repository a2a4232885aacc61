"""The threads that write: one at work, and one for each that was given up as hung and may still come back.

A writer that hangs in a call cannot be ended; it is replaced, its item is reported failed (`Tick`), and its memory stays charged
until it lets go. A writer that dies of anything is replaced at once; its item is reported failed, not lost.
"""

from __future__ import annotations

import contextlib

import msgspec

from interlock.core.limits import SNAPSHOT_HUNG_WRITERS_MAX, SNAPSHOT_TICK_SECONDS
from interlock.core.snapshot_events import Tick, WriteEnded
from interlock.core.snapshot_state import Directory
from interlock.host.trees import RunningThread
from interlock.snapshots import format as file_format
from interlock.snapshots.desk import LIVE, Desk, Job, SnapshotBusy


class Writer(msgspec.Struct, eq=False):
    """One thread and what it is at."""

    number: int
    thread: RunningThread | None = None
    job: Job | None = None
    since_s: float = 0.0
    is_given_up: bool = False
    """Its place was taken: when it comes back it ends its item and leaves."""


class Writers:
    """Starts with its first thread; `stop` and `join` end them."""

    def __init__(self, desk: Desk, write_seconds_max: float) -> None:
        self._desk, self._write_seconds_max = desk, write_seconds_max
        self._writers: list[Writer] = []
        self._next = 0
        self.replaced = 0
        self._is_stopping = False
        self._start()

    def _start(self) -> None:
        with self._desk.changes:
            writer = Writer(self._next)
            self._next += 1
            self._writers.append(writer)
        writer.thread = self._desk.host.start_thread(
            f"snapshot-writer-{writer.number}", lambda: self._run(writer)
        )

    @property
    def hung(self) -> int:
        return sum(writer.is_given_up for writer in self._writers)

    # --- a writer's life -------------------------------------------------------------------------------------------

    def _run(self, writer: Writer) -> None:
        try:
            while self._take(writer):
                self._work(writer)
        finally:
            with self._desk.changes:
                self._writers.remove(writer)
                self._desk.changes.notify_all()

    def _take(self, writer: Writer) -> bool:
        desk = self._desk
        with desk.changes:
            while not desk.jobs and not self._is_stopping and not writer.is_given_up:
                desk.changes.wait()
            if writer.is_given_up or not desk.jobs:
                return False
            writer.job, writer.since_s = desk.jobs.popleft(), desk.host.monotonic_s()
            return True

    def _work(self, writer: Writer) -> None:
        job = writer.job
        assert job is not None
        ended = WriteEnded(job.item.number, is_written=False, reason="its writer died", left_behind=True)
        try:
            ended = self._write(job)
        finally:
            # However the write ended, also when this thread is dying of it: the item has an end.
            self._end(job, ended)
            with self._desk.changes:
                writer.job = None

    def _write(self, job: Job) -> WriteEnded:
        item, image = job.item, job.image
        with self._desk.changes:
            is_skipped = (item.directory.scope, item.number) in self._desk.skipped
        if is_skipped:
            return WriteEnded(item.number, is_written=False, reason="erased before it was written")
        data = image.buffer.view
        try:
            image.staging.wait()
            file_format.seal(image.layout, data)
            job.folder.write(item.file, data)
            self._sync_name(item.directory)
        except Exception as error:
            return WriteEnded(
                item.number, is_written=False, reason=str(error), left_behind=not self._cleaned(job)
            )
        return WriteEnded(item.number, is_written=True)

    def _sync_name(self, directory: Directory) -> None:
        """A file in a directory whose own name a power cut takes away is not durable."""
        with self._desk.changes:
            if directory in self._desk.synced:
                return
            scope = self._desk.book.get(directory.scope)
            root = scope.folder_of(directory).root if scope is not None else None
        with contextlib.suppress(FileNotFoundError):  # the root was erased, and this with it
            self._desk.tree.sync_folder(f"{LIVE}/{root}")
        with self._desk.changes:
            if directory in self._desk.handles:
                self._desk.synced.add(directory)

    def _cleaned(self, job: Job) -> bool:
        """Whether nothing of a failed write is left; in an erased directory that is gone there is nothing."""
        try:
            job.folder.remove(f"{job.item.file}.tmp")
            job.folder.remove(job.item.file)
        except OSError:
            return False
        return True

    def _end(self, job: Job, ended: WriteEnded) -> None:
        name = job.item.directory.scope
        while True:
            try:
                with self._desk.scope(name):
                    self._desk.tell(name, ended)
                return
            except SnapshotBusy:
                continue  # it must be told; this thread has nothing else to do, and nobody waits for it

    # --- seen from outside -----------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Reports late items and replaces writers that hang or died. For the keeper's thread, now and then."""
        desk = self._desk
        desk.tell_owed()
        now_s = desk.host.monotonic_s()
        with desk.changes:
            late = {
                scope.name
                for scope in desk.book
                for item in scope.writing
                if item.directory == scope.directory and not item.overdue and now_s >= item.deadline_s
            }
        for name in sorted(late):
            try:
                with desk.scope(name, SNAPSHOT_TICK_SECONDS):
                    with desk.changes:
                        is_here = desk.book.get(name) is not None
                    if is_here:
                        desk.tell(name, Tick(now_s))
            except SnapshotBusy:
                continue  # next time
        self._replace(now_s)

    def _replace(self, now_s: float) -> None:
        with self._desk.changes:
            for writer in self._writers:
                is_hung = writer.job is not None and now_s - writer.since_s >= self._write_seconds_max
                if is_hung and not writer.is_given_up and self.hung < SNAPSHOT_HUNG_WRITERS_MAX:
                    writer.is_given_up = True
            wanted = not self._is_stopping and all(writer.is_given_up for writer in self._writers)
            wanted = wanted and len(self._writers) <= SNAPSHOT_HUNG_WRITERS_MAX
        if wanted:
            self.replaced += 1
            self._start()

    def stop(self) -> None:
        """Writers end when nothing is queued."""
        with self._desk.changes:
            self._is_stopping = True
            self._desk.changes.notify_all()

    def join(self, deadline_s: float) -> bool:
        """Whether all of them are gone."""
        desk = self._desk
        with desk.changes:
            while self._writers and (left_s := deadline_s - desk.host.monotonic_s()) > 0:
                desk.changes.wait(left_s)
            return not self._writers
