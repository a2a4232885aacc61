"""The disk tier of one node: opened behind its start, told of what is published, asked for what RAM has not.

The node serves from RAM before the disk is open, while it is away, and after it failed. Opening maps the index and lists the
directory; that is all a restart needs to hit again. Behind it the scan reads every pack's table of contents, in slices: it puts
back what the index lost, drops what names packs that are gone, sets aside what is no pack, and counts what hangs on what.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from interlock.core import limits
from interlock.core.prefixes import Block
from interlock.host.base import Directory, Host, SharedMemory
from interlock.host.disk import DirectoryBusy
from interlock.store.blocks import BlockStore
from interlock.store.changes import Change, ChangeLog
from interlock.store.packs.books import Books
from interlock.store.packs.files import PackFile, PackFiles
from interlock.store.packs.growth import IndexFile
from interlock.store.packs.index import PackIndex
from interlock.store.packs.reader import Promoter
from interlock.store.packs.scan import Scan
from interlock.store.packs.staging import Staging
from interlock.store.packs.state import Condemned, DiskState, Emit
from interlock.store.packs.writer import Writer

STAGING_BYTES = 2 * limits.DISK_PACK_BYTES * limits.DISK_WRITES_AT_ONCE_MAX + (
    2 * limits.DISK_READ_BYTES * limits.DISK_READS_AT_ONCE_MAX
)
_log = logging.getLogger(__name__)


def _to_nobody(name: str, **fields: Any) -> None:
    """Events that nobody keeps."""


class DiskTier:
    """One directory of packs under one `BlockStore`."""

    def __init__(
        self,
        host: Host,
        path: Path,
        bytes_max: int,
        store: BlockStore,
        slab: SharedMemory,
        *,
        owner: str,
        emit: Emit | None = None,
        records_min: int = limits.DISK_INDEX_RECORDS_MIN,
        changes: ChangeLog | None = None,
    ) -> None:
        """`changes`: told which blocks come to the disk and leave it, from its opening on (`listing` tells the others)."""
        self._host, self._path, self._bytes_max = host, path, bytes_max
        self._store, self._slab, self._owner, self._emit = store, slab, owner, emit or _to_nobody
        self._records_min = records_min
        self._changes = changes
        self._staging = Staging(STAGING_BYTES)
        self._directory: Directory | None = None
        self._index_file: IndexFile | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.state: DiskState | None = None
        self.writer: Writer | None = None
        self.promoter: Promoter | None = None
        self.on_open: Callable[[str, bool], None] = lambda *_: None
        """Told, before anything comes up from it, which directory was opened (its identity) and whether it had no packs."""
        self.error = "not opened yet"
        self.scan: Scan | None = None

    @property
    def path(self) -> Path:
        """The directory of packs."""
        return self._path

    @property
    def is_open(self) -> bool:
        """Whether blocks can be asked for; reading and writing may fail nevertheless (`stats`)."""
        return self.state is not None

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises `DirectoryBusy`, `PermissionError` or `ValueError`: mistakes. A disk that fails is tried again behind."""
        opening = asyncio.create_task(self._open(), name="disk tier opens")
        done, _ = await asyncio.wait({opening}, timeout=limits.DISK_OPEN_SECONDS_MAX)
        if not done:
            self._degraded(TimeoutError(f"not open after {limits.DISK_OPEN_SECONDS_MAX:.0f} s"))
            self._spawn("disk tier opens late", self._open_later, opening)
            return
        try:
            opening.result()
        except (DirectoryBusy, PermissionError):
            raise
        except OSError as error:
            self._degraded(error)
            self._spawn("disk tier opens late", self._open_later, None)

    async def _open_later(self, opening: asyncio.Task[None] | None) -> None:
        if opening is not None:
            try:
                await opening
            except Exception as error:
                self._degraded(error)
        pause_s = limits.DISK_RETRY_SECONDS_MIN
        while self.state is None:
            await self._host.clock.sleep_s(pause_s)
            pause_s = min(2 * pause_s, limits.DISK_RETRY_SECONDS_MAX)
            try:
                await self._open()
            except Exception as error:  # whatever it is, RAM serves on and it is tried again
                self._degraded(error)

    def _degraded(self, error: Exception) -> None:
        if str(error) != self.error:
            _log.warning("the disk tier at %s is away, blocks stay in RAM alone: %s", self._path, error)
            self._emit("store.disk.degraded", doing="opening", error=str(error))
        self.error = str(error)

    async def _open(self) -> None:
        directory, index_file, index, files, found, cleared = await self._host.in_thread(self._open_files)
        self._directory, self._index_file = directory, index_file
        books = Books(index, self._changes)
        books.adopt(found)
        self.on_open(files.identity, not found)
        state = DiskState(self._host, files, books, index_file, self._store, self._slab, self._emit)
        self.state, self.error = state, ""
        self.promoter = Promoter(state, self._staging)
        self.writer = Writer(state, self._bytes_max)
        if cleared:
            state.counters["swept"] += len(cleared)
            state.tell(
                "swept", f"{len(cleared)} files of dead owners or strangers were cleared", names=cleared
            )
        for number in range(limits.DISK_READS_AT_ONCE_MAX):
            self._spawn(f"disk reader {number}", self.promoter.run)
        self.scan = Scan(state, self.writer, self._begin_writing)
        self._spawn("disk scan", self.scan.run)
        self._store.on_publish = self._on_publish

    def _open_files(self) -> tuple[Directory, IndexFile, PackIndex, PackFiles, list[PackFile], list[str]]:
        directory = self._host.open_directory(self._path, self._owner)
        try:
            incarnation = self._store.slab.node_incarnation
            files = PackFiles(directory, incarnation, self._staging)
            found, cleared = files.open()
            index_file = IndexFile(self._host, directory, incarnation, self._records_min)
            return directory, index_file, index_file.open(), files, found, cleared
        except BaseException:
            directory.close()
            raise

    async def close(self) -> None:
        """Writes what waits, within `limits.DISK_CLOSE_SECONDS_MAX`, and lets go of the directory. Idempotent."""
        self._store.on_publish = _ignore
        if self.writer is not None and self.state is not None:
            try:
                async with asyncio.timeout(limits.DISK_CLOSE_SECONDS_MAX):
                    await self.writer.flush(limits.DISK_CLOSE_SECONDS_MAX)
                    await self._delete(self.state)
            except TimeoutError:
                _log.warning("%d files of packs were not taken away in time", len(self.state.condemned))
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.state is not None:
            self.state.books.index.release()
        if self._index_file is not None:
            self._index_file.close()
            self._index_file = None
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    def _spawn(self, name: str, work: Callable[..., Awaitable[None]], *args: Any) -> asyncio.Task[None]:
        self._tasks = [task for task in self._tasks if not task.done()]
        task = asyncio.create_task(self._watched(name, work, *args), name=name)
        self._tasks.append(task)
        return task

    async def _watched(self, name: str, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """A task that fails is a defect of ours: it is counted and said, and begun again after a while."""
        pause_s = limits.DISK_RETRY_SECONDS_MIN
        while True:
            try:
                return await work(*args)
            except Exception as error:
                self._store.counters["internal_errors"] += 1
                self.error = f"{name} failed: {error}"
                _log.exception("the task %r of the disk tier failed", name)
                await self._host.clock.sleep_s(pause_s)
                pause_s = min(2 * pause_s, limits.DISK_RETRY_SECONDS_MAX)

    # --- what the node asks ----------------------------------------------------------------------------------------

    def _on_publish(self, block: Block) -> None:
        assert self.writer is not None
        self.writer.offer(block)

    def promote(self, keys: Sequence[bytes]) -> int:
        """How many of the first `keys`, which follow what RAM has of a prefix, are on their way up now."""
        return self.promoter.ask(keys) if self.promoter is not None else 0

    async def clear(self) -> bool:
        """Forgets everything on the disk, and what was on its way there or from there, at once; returns when the files are
        gone, or the disk fails (they are tried again). A caller that stops waiting stops nothing. False: it is not open."""
        state = self.state
        if state is None or self.writer is None or self.promoter is None:
            return False
        state.epoch += 1
        self.writer.clear()
        self.promoter.clear()
        for number in state.books.clear():
            state.condemned.setdefault(number, Condemned(0, aside=False))
        await asyncio.shield(self._spawn("disk clear", self._delete, state))
        return True

    async def _delete(self, state: DiskState) -> None:
        await self._discard_condemned(state)
        await self._all_gone(state)

    async def _discard_condemned(self, state: DiskState) -> None:
        for number, condemned in list(state.condemned.items()):
            await state.discard(number, condemned)

    async def _all_gone(self, state: DiskState) -> bool:
        """Whether no file that had to go is there any more, nor comes back with a power cut."""
        try:
            await self._host.in_thread(state.files.sync)
        except OSError as error:
            state.failed(state.writes, "writing", error)
            return False
        return not state.condemned

    async def sweep(self, wanted: Callable[[Any], bool]) -> tuple[int, bool]:
        """Takes the blocks off the disk whose key and tenant are `wanted`, durably; how many, and whether none is left.

        Reads every pack's contents. What is on its way to or from the disk is waited for, so that nothing of it comes back
        afterwards. Some may be left where the disk is not open, or a file of it cannot be read or taken away now.
        """
        state = self.state
        if state is None or self.writer is None or self.promoter is None:
            return 0, False
        removed, whole = 0, True
        self.writer.queue.drop_all(wanted)
        await self.writer.settled()
        for number in state.books.packs.numbers():
            contents = await state.contents(number)
            if contents is not None:
                chosen = [block.ordinal for block in contents.toc.blocks if wanted(block)]
                removed += len([place for place in chosen if place not in contents.gone])
                if chosen:
                    await state.expel(contents, chosen)
            else:
                whole &= number not in state.books.packs
        await self.promoter.settled()
        await self._discard_condemned(state)
        return removed, whole and await self._all_gone(state)

    async def remove(self, keys: Sequence[bytes]) -> tuple[int, bool]:
        """Takes these blocks off the disk, durably; how many were there, and whether none is left."""
        state = self.state
        if state is None or self.writer is None:
            return 0, False
        for key in keys:
            self.writer.queue.drop(key)
        _, numbers = state.books.where(keys)
        removed, whole = 0, True
        for number in sorted({number for number in numbers if number}):
            contents = await state.contents(number)
            if contents is None:
                whole &= number not in state.books.packs
                continue
            wanted = (contents.by_key.get(key) for key, at in zip(keys, numbers, strict=True) if at == number)
            chosen = [block.ordinal for block in wanted if block is not None]
            removed += len([place for place in chosen if place not in contents.gone])
            await state.expel(contents, chosen)
        return removed, whole and await self._all_gone(state)

    async def listing(self) -> AsyncIterator[list[Change]]:
        """All blocks that stay while we look, a pack at a time; those that come or go meanwhile are told of as changes."""
        state = self.state
        for number in state.books.packs.numbers() if state is not None else []:
            assert state is not None
            contents = await state.contents(number)
            if contents is not None and number in state.books.packs:
                yield state.books.listed(contents)

    async def flush(self, timeout_s: float) -> bool:
        """Whether all that was published so far is on the disk, or given up, within `timeout_s`."""
        return self.writer is not None and await self.writer.flush(timeout_s)

    def _begin_writing(self) -> None:
        assert self.writer is not None
        for number in range(limits.DISK_WRITES_AT_ONCE_MAX):
            self._spawn(f"disk writer {number}", self.writer.run)

    # --- seen from outside -----------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Gauges and counters by metric name."""
        state = self.state
        if state is None or self.writer is None or self.promoter is None:
            return {"interlock_store_disk_up_number": 0.0}
        counters = state.counters
        skipped = sum(value for name, value in counters.items() if name.startswith("skipped_"))
        values = {
            "up_number": float(state.reads.state == "ok" and state.writes.state == "ok"),
            "bytes": state.books.packs.bytes + state.books.index.size_bytes,
            "limit_bytes": self._bytes_max,
            "packs_number": len(state.books.packs),
            "queued_blocks": len(self.writer.queue),
            "queued_bytes": self.writer.queue.bytes,
            "promoting_blocks": len(self.promoter),
            "staging_bytes": self._staging.bytes_held,
            "scanned_number": self.scan is not None and self.scan.done.is_set(),
            "written_blocks_total": counters["written"],
            "written_bytes_total": counters["written_bytes"],
            "packs_written_total": counters["packs_written"],
            "skipped_blocks_total": skipped,
            "promoted_blocks_total": counters["promoted"],
            "promotions_failed_blocks_total": counters["promotions_failed"],
            "evicted_blocks_total": counters["evicted"],
            "bad_blocks_total": counters["blocks_bad"],
            "packs_aside_total": counters["packs_aside"],
            "read_errors_total": counters["reading_errors"],
            "write_errors_total": counters["writing_errors"],
            "repaired_blocks_total": counters["repaired"],
        }
        return {f"interlock_store_disk_{name}": float(value) for name, value in values.items()}

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the books of the disk do not balance. Looks at all that is in memory, at no file."""
        if self.state is not None and self.writer is not None:
            self.state.books.check_integrity()
            self.writer.queue.check_integrity()

    async def check_files(self) -> None:
        """The books against the directory, when nothing is being changed. Raises `AssertionError`, `OSError`."""
        state = self.state
        if state is None:
            return
        files = {file.number: file for file in await self._host.in_thread(state.files.packs)}
        assert set(files) == set(state.books.packs.numbers()), (set(files), state.books.packs.numbers())
        for number, file in files.items():
            pack = state.books.packs.get(number)
            assert pack is not None
            assert pack.size_bytes == file.size_bytes, number
            if pack.scanned:
                assert file.allocated_bytes <= pack.bytes + 2 * 4096, (number, file, pack)


def _ignore(block: Block) -> None:
    """Nobody is told of what is published."""
