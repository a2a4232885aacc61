"""What is done to the files of one directory of packs: written, read, evicted from, set aside. All of it blocks.

Order is what makes a crash harmless. A pack is written under a temporary name, synced, renamed, and then the directory is
synced: under its own name it is whole. Evictions are appended to the pack's sidecar and synced before a hole is punched: a
hole is never taken for corruption (hazards M5, x7). A pack's file goes, durably, before its sidecar does: one that comes back
after a power cut knows its holes. Temporary names carry the incarnation of their node; the directory's lock proves that
every other one's owner is gone, so they are swept on evidence, at start.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Sequence

import msgspec
import xxhash

from interlock.core.layouts import KVLayout
from interlock.core.limits import DISK_ASIDE_FILES_MAX, DISK_PACK_BLOCKS_MAX, SLOT_GRAIN_BYTES
from interlock.host.base import Directory, Piece, SharedMemory
from interlock.store.checksums import Binding, verify_block
from interlock.store.packs.format import (
    FOOT_BYTES,
    PAGE_BYTES,
    BadPackError,
    PackBlock,
    Toc,
    decode_foot,
    decode_header,
    encode_foot,
    encode_header,
    gone_name,
    header_room,
    pack_name,
    stride,
)
from interlock.store.packs.staging import Staging

ASIDE = "aside"
IDENTITY = "identity"
IDENTITY_BYTES = 16
_PACK = re.compile(r"(\d{10})\.safetensors")
_SIDECAR = re.compile(r"(\d{10})\.gone")
_TEMPORARY = re.compile(r".+\.\d+\.tmp")
_GONE = struct.Struct("<IIQ")
"""Ordinal of an evicted block, pack number, check over both."""


class SourceBlock(msgspec.Struct, frozen=True):
    """A published block in RAM, to be written. `binding` says where it stands."""

    binding: Binding
    parent: bytes
    checksums: tuple[int, ...]
    tenant: str = ""


class PackFile(msgspec.Struct):
    """A file that looks like a pack by its name."""

    number: int
    size_bytes: int
    allocated_bytes: int


class PackFiles:
    """The packs in `directory`. `incarnation` is this node's life. Methods may run in several threads, on different packs."""

    def __init__(self, directory: Directory, incarnation: int, staging: Staging) -> None:
        self._directory = directory
        self._incarnation = incarnation
        self._staging = staging
        self.identity = ""
        """Of this directory, whoever has it: made once, when it was first opened."""

    # --- the directory ---------------------------------------------------------------------------------------------

    def open(self) -> tuple[list[PackFile], list[str]]:
        """The packs by number, and the names of what was swept or set aside because it is none. Raises `OSError`."""
        self._directory.make_folder(ASIDE)
        self.identity = self._identify()
        packs, sidecars, cleared = [], [], []
        for entry in self._directory.list():
            if found := _PACK.fullmatch(entry.name):
                packs.append(PackFile(int(found[1]), entry.size_bytes, entry.allocated_bytes))
            elif found := _SIDECAR.fullmatch(entry.name):
                sidecars.append(int(found[1]))
            elif _TEMPORARY.fullmatch(entry.name):
                self._directory.remove(entry.name)
                cleared.append(entry.name)
            elif entry.name.endswith(".safetensors"):
                self._directory.rename(entry.name, f"{ASIDE}/{entry.name}")
                cleared.append(entry.name)
        here = {pack.number for pack in packs}
        for number in sidecars:
            if number not in here:
                self._directory.remove(gone_name(number))
        return packs, cleared

    def _identify(self) -> str:
        data = bytearray(IDENTITY_BYTES)
        if self._directory.size(IDENTITY) == IDENTITY_BYTES:
            self._directory.read(IDENTITY, [Piece(0, memoryview(data))])
        else:
            self._directory.remove(IDENTITY)
            data = bytearray(os.urandom(IDENTITY_BYTES))
            self._directory.append(IDENTITY, bytes(data))
            self._directory.sync()
        return data.hex()

    def packs(self) -> list[PackFile]:
        """All files that are packs by their names."""
        found = [(_PACK.fullmatch(entry.name), entry) for entry in self._directory.list()]
        return [
            PackFile(int(name[1]), entry.size_bytes, entry.allocated_bytes) for name, entry in found if name
        ]

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(
        self, number: int, layout: KVLayout, sources: Sequence[SourceBlock], slab: SharedMemory
    ) -> Toc | None:
        """A new pack of those blocks that are still what their checksums say. None: of none. Raises `OSError`.

        Reading is optimistic: a slot that was given to somebody else meanwhile fails its check and is left out.
        """
        assert 0 < len(sources) <= DISK_PACK_BLOCKS_MAX
        step = stride(layout)
        room = header_room(number, layout, [_placed(source, 0, 0) for source in sources])
        size = room + step * len(sources) + FOOT_BYTES
        with self._staging.take(size) as memory:
            blocks: list[PackBlock] = []
            for source in sources:
                offset = room + step * len(blocks)
                into = memory[offset : offset + step]
                slab.read_into(source.binding.slot * SLOT_GRAIN_BYTES, into[: layout.block_bytes])
                if verify_block(source.binding, layout, into[: layout.block_bytes], source.checksums):
                    into[layout.block_bytes :] = bytes(step - layout.block_bytes)
                    blocks.append(_placed(source, len(blocks), offset))
            if not blocks:
                return None
            size = room + step * len(blocks) + FOOT_BYTES
            header = encode_header(number, layout, blocks, room, size)
            memory[:room] = header
            memory[size - FOOT_BYTES : size] = encode_foot(number, size, header)
            self._publish(pack_name(number), memory[:size])
        return Toc(number, layout, tuple(blocks), room, size, xxhash.xxh3_128_digest(header))

    def _publish(self, name: str, data: memoryview) -> None:
        temporary = f"{name}.{self._incarnation}.tmp"
        try:
            self._directory.write_new(temporary, data)
            self._directory.rename(temporary, name)
        except BaseException:
            self._directory.remove(temporary)
            raise
        self._directory.sync()

    # --- reading ---------------------------------------------------------------------------------------------------

    def toc(self, number: int) -> tuple[Toc, frozenset[int]]:
        """What the pack holds, and the ordinals of what was evicted from it.

        Raises `BadPackError` when it is not a whole pack of ours, `FileNotFoundError`, `OSError`.
        """
        name = pack_name(number)
        size = self._directory.size(name)
        if size is None:
            raise FileNotFoundError(f"there is no {name}")
        if size < 2 * PAGE_BYTES or size % PAGE_BYTES:
            raise BadPackError(f"it has {size} bytes, which no pack has")
        with self._staging.take(PAGE_BYTES) as foot:
            self._read(name, size - FOOT_BYTES, foot)
            room, digest = decode_foot(number, size, foot)
        with self._staging.take(room) as header:
            self._read(name, 0, header)
            toc = decode_header(number, size, bytes(header), digest)
        return toc, self._gone(toc)

    def _read(self, name: str, offset: int, into: memoryview) -> None:
        try:
            self._directory.read(name, [Piece(offset, into)])
        except EOFError as error:
            raise BadPackError(str(error)) from error

    def _gone(self, toc: Toc) -> frozenset[int]:
        name = gone_name(toc.number)
        size = self._directory.size(name) or 0
        count = min(size // _GONE.size, 2 * DISK_PACK_BLOCKS_MAX)
        if not count:
            return frozenset()
        data = bytearray(count * _GONE.size)
        self._directory.read(name, [Piece(0, memoryview(data))])
        # A torn record was never synced, so nothing was punched for it; another pack's, of the same number, is not ours.
        return frozenset(
            ordinal
            for ordinal, pack, check in _GONE.iter_unpack(data)
            if pack == toc.number and check == _gone_check(ordinal, toc)
        )

    def read(self, toc: Toc, blocks: Sequence[PackBlock], into: memoryview) -> list[bool]:
        """Reads `blocks`, in file order, one `toc.stride` after the other; which of them are what was saved.

        Raises `OSError`, `EOFError`.
        """
        step, pieces, first = toc.stride, [], 0
        for i in range(1, len(blocks) + 1):
            if i == len(blocks) or blocks[i].offset != blocks[i - 1].offset + step:
                pieces.append(Piece(blocks[first].offset, into[first * step : i * step]))
                first = i
        self._directory.read(pack_name(toc.number), pieces)
        size = toc.layout.block_bytes
        return [
            verify_block(block.binding, toc.layout, into[i * step : i * step + size], block.checksums)
            for i, block in enumerate(blocks)
        ]

    # --- leaving ---------------------------------------------------------------------------------------------------

    def evict(self, toc: Toc, ordinals: Sequence[int]) -> bool:
        """Records durably that these blocks are gone, then gives their bytes back. Raises `OSError`.

        False: recorded, but this file system punches no holes; only whole packs give room back.
        """
        name = gone_name(toc.number)
        new = self._directory.size(name) is None
        records = (_GONE.pack(place, toc.number, _gone_check(place, toc)) for place in ordinals)
        self._directory.append(name, b"".join(records))
        if new:
            self._directory.sync()
        return self.punch(toc, ordinals)

    def punch(self, toc: Toc, ordinals: Collection[int]) -> bool:
        """Gives the bytes of blocks back that are recorded as gone. False where this file system punches no holes."""
        try:
            for start, count in _runs(sorted(ordinals)):
                offset = toc.data_offset + start * toc.stride
                self._directory.punch(pack_name(toc.number), offset, count * toc.stride)
        except OSError:
            return False
        return True

    def delete(self, number: int) -> None:
        """Removes a pack's file and then, when that is durable, its sidecar. Raises `OSError`."""
        self._directory.remove(pack_name(number))
        if self._directory.size(gone_name(number)) is not None:
            self._directory.sync()
            self._directory.remove(gone_name(number))

    def sync(self) -> None:
        """What was taken away so far does not come back with a power cut. Raises `OSError`."""
        self._directory.sync()

    def set_aside(self, number: int) -> None:
        """Out of the way, and kept for whoever wants to know what happened. Raises `OSError`."""
        for entry in self._directory.list(ASIDE)[: 1 - DISK_ASIDE_FILES_MAX]:
            self._directory.remove(f"{ASIDE}/{entry.name}")
        self._directory.rename(pack_name(number), f"{ASIDE}/{pack_name(number)}")
        self._directory.remove(gone_name(number))
        self._directory.sync()

    def probe(self) -> None:
        """Whether the disk takes a page. Raises `OSError`."""
        name = f"probe.{self._incarnation}.tmp"
        self._directory.remove(name)
        with self._staging.take(PAGE_BYTES) as page:
            self._directory.write_new(name, page)
        self._directory.remove(name)


def _placed(source: SourceBlock, ordinal: int, offset: int) -> PackBlock:
    return PackBlock(ordinal, offset, source.parent, source.binding, source.checksums, source.tenant)


def _gone_check(ordinal: int, toc: Toc) -> int:
    return xxhash.xxh3_64_intdigest(b"%d of %d is gone" % (ordinal, toc.number) + toc.digest)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Rows of neighbours as (first, how many)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
