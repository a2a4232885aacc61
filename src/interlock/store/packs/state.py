"""What the parts of the disk tier share: files, books, health, and how trouble is told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from interlock.core import limits
from interlock.host.base import Host, SharedMemory
from interlock.store.blocks import BlockStore
from interlock.store.packs.books import Books, Contents
from interlock.store.packs.files import PackFiles
from interlock.store.packs.format import BadPackError
from interlock.store.packs.growth import IndexFile
from interlock.store.packs.health import Health
from interlock.store.packs.staging import StagingFull

log = logging.getLogger(__name__)
Emit = Callable[..., object]
"""An event log's `emit`."""


class Condemned(msgspec.Struct, frozen=True):
    """A file that has to go: removed, or set aside."""

    bytes: int
    aside: bool


class DiskState:
    """One open directory of packs, and the blocks in RAM above it."""

    def __init__(
        self,
        host: Host,
        files: PackFiles,
        books: Books,
        index_file: IndexFile,
        store: BlockStore,
        slab: SharedMemory,
        emit: Emit,
    ) -> None:
        self.host, self.files, self.books, self.store, self.slab = host, files, books, store, slab
        self.index_file = index_file
        self.emit = emit
        self.reads = Health(limits.DISK_FAILURES_MAX)
        self.writes = Health()
        self.counters: Counter[str] = books.counters
        self.epoch = 0
        """Raised by `clear`: what was begun before it changes nothing any more."""
        self.condemned: dict[int, Condemned] = {}
        """Files that are no pack of ours any more, and could not be taken away yet."""

    def now_s(self) -> float:
        return self.host.clock.monotonic_s()

    def tell(self, name: str, message: str, **fields: Any) -> None:
        """An event, and a line for eyes."""
        self.emit(f"store.disk.{name}", **fields)
        log.warning("disk tier: %s", message)

    def failed(self, health: Health, doing: str, error: OSError) -> None:
        """An error while reading or writing: counted, and said when it is news."""
        self.counters[f"{doing}_errors"] += 1
        if health.failed(error, self.now_s()):
            self.tell(
                "degraded",
                f"{doing} is {health.state} ({error}); blocks stay in RAM alone until it works again",
                doing=doing,
                state=health.state,
                error=str(error),
            )

    def worked(self, health: Health, doing: str) -> None:
        """It worked: said when it had not before."""
        if health.worked():
            self.tell("recovered", f"{doing} works again", doing=doing)

    # --- contents --------------------------------------------------------------------------------------------------

    async def contents(self, number: int) -> Contents | None:
        """What the pack holds; None when it is gone, cannot be read now, or was no pack and is set aside."""
        known = self.books.contents(number)
        if known is not None:
            return known
        epoch = self.epoch
        try:
            toc, gone = await self.host.in_thread(self.files.toc, number)
        except BadPackError as error:
            await self.set_aside(number, str(error))
            return None
        except FileNotFoundError:
            if number in self.books.packs:
                self.books.forget_pack(number)
                self.tell("lost", f"pack {number} is not there any more", pack=number)
            return None
        except StagingFull:
            return None
        except OSError as error:
            self.failed(self.reads, "reading", error)
            return None
        await self.index_file.make_room(self.books, len(toc.blocks))
        if epoch != self.epoch or number not in self.books.packs:
            return None
        # Somebody else may have read it meanwhile, and evicted from it.
        known = self.books.contents(number)
        if known is None:
            known = Contents.of(toc, gone)
            self.books.keep(known)
            self.books.scanned(known)
            await self._punch_again(known)
        return known

    async def _punch_again(self, contents: Contents) -> None:
        """The last life may have recorded evictions and ended before it punched; from here on its bytes are counted.

        By what is recorded, not by what the disk says: holes whose sidecar was lost are live blocks until they are evicted.
        """
        toc = contents.toc
        pack = self.books.packs.get(toc.number)
        if pack is None:
            return
        async with contents.changing:
            size = toc.size_bytes - toc.stride * len(contents.gone)
            if pack.bytes > size + toc.stride - 1:
                if await self.host.in_thread(self.files.punch, toc, sorted(contents.gone)):
                    self.books.packs.resize(pack, size)
            else:
                self.books.packs.resize(pack, size)

    async def set_aside(self, number: int, reason: str) -> None:
        """The pack is none of ours any more; its file is kept for whoever wants to look."""
        pack = self.books.packs.get(number)
        if pack is None:
            return
        self.books.forget_pack(number)
        self.counters["packs_aside"] += 1
        self.tell("aside", f"pack {number} is set aside: {reason}", pack=number, reason=reason)
        await self.discard(number, Condemned(pack.bytes, aside=True))

    async def discard(self, number: int, condemned: Condemned) -> None:
        """Takes a file away that the books do not know any more; if that fails, the scan tries again."""
        self.condemned[number] = condemned
        try:
            await self.host.in_thread(self.files.set_aside if condemned.aside else self.files.delete, number)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.failed(self.writes, "writing", error)
            return
        self.condemned.pop(number, None)

    async def blocks_bad(self, contents: Contents, ordinals: list[int]) -> None:
        """Blocks that are not what was saved: they are lost, and too many of them are their pack's fault."""
        fresh = [ordinal for ordinal in ordinals if ordinal not in contents.gone]
        number = contents.toc.number
        pack = self.books.packs.get(number)
        if pack is None or not fresh:  # evicted while they were read
            return
        self.counters["blocks_bad"] += len(fresh)
        pack.bad += len(fresh)
        self.tell("bad_block", f"{len(fresh)} blocks of pack {number} are not what was saved", pack=number)
        if pack.bad >= limits.DISK_BAD_BLOCKS_MAX:
            self.books.leave(contents, contents.live())
            await self.set_aside(number, f"{pack.bad} of its blocks are not what was saved")
        else:
            await self.evict(contents, fresh)

    # --- eviction --------------------------------------------------------------------------------------------------

    async def expel(self, contents: Contents, ordinals: list[int]) -> None:
        """These blocks leave the disk and must not be found by the next life: where that cannot be recorded, the whole pack goes."""
        chosen = [place for place in ordinals if place not in contents.gone or place in contents.unrecorded]
        await self.evict(contents, chosen)
        number = contents.toc.number
        pack = self.books.packs.get(number)
        if pack is not None and not contents.unrecorded.isdisjoint(chosen):
            self.books.leave(contents, contents.live())
            self.books.forget_pack(number)
            await self.discard(number, Condemned(pack.bytes, aside=False))

    async def evict(self, contents: Contents, ordinals: list[int]) -> None:
        """These blocks leave the disk; with the last of them goes the pack."""
        number, toc = contents.toc.number, contents.toc
        async with contents.changing:
            pack = self.books.packs.get(number)
            fresh = [
                place for place in ordinals if place not in contents.gone or place in contents.unrecorded
            ]
            if pack is None or not (fresh or pack.live == 0):
                return
            self.books.leave(contents, fresh)
            if pack.live == 0:
                self.books.forget_pack(number)
                await self.discard(number, Condemned(pack.bytes, aside=False))
                return
            contents.unrecorded.update(fresh)
            try:
                punched = await self.host.in_thread(self.files.evict, toc, fresh)
            except OSError as error:
                self.failed(self.writes, "writing", error)
                return
            contents.unrecorded.difference_update(fresh)
            if punched and number in self.books.packs:
                self.books.packs.resize(pack, pack.bytes - toc.stride * len(fresh))
