"""A pack: blocks that left RAM together, in one file that the safetensors library can read.

    8 bytes           length of the header, little-endian (safetensors)
    header            JSON, padded with blanks to a whole page: tensors by name, `__metadata__` with a line for each block
    blocks            one after the other, each on a page of its own; what a block leaves of its last page is a tensor `pad.n`
    foot              one page, a tensor `foot`: magic, pack number, file size, checksum of the header, its own checksum

A tensor's name is the block's key in hex, its shape the canonical layout `[heads, layers, tokens, content]`. Its line says
what its bytes are *for*: parent, and the slot, node incarnation and slab that the writing ranks' checksums are bound to,
and those checksums. So what comes back from disk is verified against what a rank read out of its KV tensor, and nothing on
the way there or back can bless wrong bytes (hazards W3). There is no checksum over the file: one bad block is one lost
block (hazards M5). The foot is written last and says how long the file is: a torn, truncated or foreign file is seen
without reading its blocks. Number and name must agree, so a file that was renamed or copied is not ours either.

Reference: https://github.com/huggingface/safetensors#format (no gaps between tensors, hence the pads).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import msgspec
import xxhash

from interlock.core.layouts import ITEM_BYTES, KVLayout
from interlock.core.limits import DISK_PACK_BLOCKS_MAX, DISK_PACK_HEADER_BYTES_MAX
from interlock.core.prefixes import KEY_BYTES
from interlock.store.checksums import Binding

PAGE_BYTES = 4096
FOOT_BYTES = PAGE_BYTES
VERSION = "interlock-pack-1"
_MAGIC = b"INTERLOCKPACK1\x00\x00"
_FOOT = struct.Struct("<16sQQQ16s")
_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "uint8": "U8", "int8": "I8",
}  # fmt: skip


class BadPackError(Exception):
    """Not a whole pack of ours; the sentence says what is wrong with it."""


class PackBlock(msgspec.Struct, frozen=True):
    """One block in a pack: the `ordinal`-th place, `offset` bytes into the file. `binding` and `checksums` are those of the
    writing ranks."""

    ordinal: int
    offset: int
    parent: bytes
    binding: Binding
    checksums: tuple[int, ...]
    tenant: str = ""

    @property
    def key(self) -> bytes:
        return self.binding.key


class Toc(msgspec.Struct, frozen=True, eq=False):
    """The table of contents of one pack."""

    number: int
    layout: KVLayout
    blocks: tuple[PackBlock, ...]
    data_offset: int
    size_bytes: int
    digest: bytes
    """Of the header: what a sidecar is bound to."""

    @property
    def stride(self) -> int:
        """Bytes that one block takes in the file."""
        return stride(self.layout)


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def pack_name(number: int) -> str:
    """The name of that pack's file."""
    return f"{number:010d}.safetensors"


def gone_name(number: int) -> str:
    """The sidecar that names the blocks of a pack that were evicted."""
    return f"{number:010d}.gone"


def stride(layout: KVLayout) -> int:
    """From one block of a pack to the next, in bytes: whole pages."""
    return -(-layout.block_bytes // PAGE_BYTES) * PAGE_BYTES


def header_room(number: int, layout: KVLayout, blocks: Sequence[PackBlock]) -> int:
    """Bytes to keep free before the data: enough for the header of these blocks or some of them, wherever they lie."""
    far = 1 << 44
    there = [msgspec.structs.replace(block, offset=far * (i + 2)) for i, block in enumerate(blocks)]
    text = _header(number, layout, there, far, far * (len(blocks) + 3))
    return -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES


def encode_header(number: int, layout: KVLayout, blocks: Sequence[PackBlock], room: int, size: int) -> bytes:
    """Length word and header, `room` bytes. `blocks` in file order; places without a block become pads."""
    text = _header(number, layout, blocks, room, size)
    if len(text) + 8 > room:
        raise ValueError(f"the header of pack {number} takes {len(text) + 8} bytes, {room} were kept for it")
    return (room - 8).to_bytes(8, "little") + text.ljust(room - 8)


def _header(number: int, layout: KVLayout, blocks: Sequence[PackBlock], room: int, size: int) -> bytes:
    tensors: dict[str, object] = {}
    lines = {"format": VERSION, "pack": str(number), "layout": msgspec.json.encode(layout).decode()}
    dtype, shape = _tensor_of(layout)
    at, pads = 0, 0
    for block in [*blocks, None]:
        start = size - FOOT_BYTES - room if block is None else block.offset - room
        if start > at:  # the rest of the last block's page, or a place left empty
            tensors[f"pad.{pads}"] = _Tensor("U8", [start - at], (at, start))
            pads += 1
        if block is not None:
            at = start + layout.block_bytes
            name = block.key.hex()
            tensors[name] = _Tensor(dtype, shape, (start, at))
            lines[name] = _line(block)
    tensors["foot"] = _Tensor("U8", [FOOT_BYTES], (start, start + FOOT_BYTES))
    return msgspec.json.encode({"__metadata__": lines} | tensors)


def encode_foot(number: int, size: int, header: bytes) -> bytes:
    """The last page of a pack: its number, size and header's checksum, with a checksum of its own. `decode_foot` reads it."""
    words = _FOOT.pack(_MAGIC, number, size, len(header), xxhash.xxh3_128_digest(header))
    return (words + xxhash.xxh3_64_digest(words)).ljust(FOOT_BYTES, b"\x00")


def decode_foot(number: int, size: int, foot: memoryview) -> tuple[int, bytes]:
    """(bytes before the data, checksum of the header). Raises `BadPackError`."""
    words = bytes(foot[: _FOOT.size])
    if xxhash.xxh3_64_digest(words) != bytes(foot[_FOOT.size : _FOOT.size + 8]):
        raise BadPackError("its last page is not the foot of a pack: torn, truncated or foreign")
    magic, found, length, room, digest = _FOOT.unpack(words)
    if magic != _MAGIC or length != size:
        raise BadPackError(f"it has {size} bytes and its foot says {length}")
    if found != number:
        raise BadPackError(f"it calls itself pack {found}: a copy, or renamed")
    if room % PAGE_BYTES or not PAGE_BYTES <= room <= min(size, DISK_PACK_HEADER_BYTES_MAX):
        raise BadPackError(f"its foot names a header of {room} bytes")
    return room, digest


def decode_header(number: int, size: int, header: bytes, digest: bytes) -> Toc:
    """Raises `BadPackError`."""
    if xxhash.xxh3_128_digest(header) != digest:
        raise BadPackError("its header is not the one that was written: bits have changed")
    room = len(header)
    try:
        words = msgspec.json.decode(memoryview(header)[8:], type=dict[str, msgspec.Raw])
        lines = msgspec.json.decode(words["__metadata__"], type=dict[str, str])
        if lines.get("format") != VERSION:
            raise BadPackError(f"its format is {lines.get('format')!r}, this version reads {VERSION}")
        layout = msgspec.json.decode(lines["layout"], type=KVLayout)
        blocks = []
        for name, line in lines.items():
            if len(name) == 2 * KEY_BYTES:
                tensor = msgspec.json.decode(words[name], type=_Tensor)
                blocks.append(_block(bytes.fromhex(name), line, room, tensor, layout, size))
    except (KeyError, ValueError, msgspec.MsgspecError) as error:
        raise BadPackError(f"its header cannot be understood: {error}") from error
    if len(blocks) > DISK_PACK_BLOCKS_MAX:
        raise BadPackError(f"it lists {len(blocks)} blocks; at most {DISK_PACK_BLOCKS_MAX} are read")
    blocks.sort(key=lambda block: block.offset)
    return Toc(number, layout, tuple(blocks), room, size, digest)


def _tensor_of(layout: KVLayout) -> tuple[str, list[int]]:
    """How other programs see a block; one that carries more than its elements (scales) is bytes to them."""
    shape = [layout.heads, layout.layers, layout.block_tokens, layout.content]
    if math.prod(shape) * ITEM_BYTES[layout.dtype] != layout.block_bytes:
        return "U8", [layout.block_bytes]
    return _DTYPES[layout.dtype], shape


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the metadata says of one block."""

    slot: int
    node: int
    slab: int
    sums: str
    parent: str = ""
    tenant: str = ""


def _line(block: PackBlock) -> str:
    binding = block.binding
    sums = " ".join(f"{value:x}" for value in block.checksums)
    line = _Line(binding.slot, binding.node_incarnation, binding.slab, sums, block.parent.hex(), block.tenant)
    return msgspec.json.encode(line).decode()


def _block(key: bytes, line: str, room: int, tensor: _Tensor, layout: KVLayout, size: int) -> PackBlock:
    words = msgspec.json.decode(line, type=_Line)
    start, stop = tensor.data_offsets
    if start % PAGE_BYTES or stop - start != layout.block_bytes or room + stop > size - FOOT_BYTES:
        raise BadPackError(f"block {key.hex()[:12]} lies at {start} to {stop}, where no block can lie")
    binding = Binding(key, words.slot, words.node, words.slab)
    checksums = tuple(int(word, 16) for word in words.sums.split())
    parent = bytes.fromhex(words.parent)
    return PackBlock(start // stride(layout), room + start, parent, binding, checksums, words.tenant)
