"""The snapshot file: safetensors that the official library reads, with checksums and whatever is no tensor in its metadata.

    u64 LE header length | JSON header, padded with spaces | tensor bytes
A file is whole pages (it goes past the page cache), so the header ends on a page, and the last tensor, `interlock.pad`, fills
the last page: the format allows no bytes that belong to no tensor. Tensors stand by falling element size, so each is aligned.

Metadata: `interlock.snapshot` the version; `structure` and `labels` JSON; `checksums` JSON, tensor -> xxh3_64 over name, dtype,
shape and bytes; `seal` xxh3_64 over all the rest of it. Rule for versions: a new key that old readers may ignore changes
nothing; whatever an old reader would misread raises the version, and a reader refuses versions above its own by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from interlock.core.errors import InterlockError
from interlock.host.direct import PAGE_BYTES

VERSION = 1
PAD = "interlock.pad"
HEADER_BYTES_MAX = 1 << 24
"""Structure and names of a thousand layers take less than a tenth of it."""
SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_NO_SUM = "0" * 16


class SnapshotDamaged(InterlockError):  # noqa: N818 - says what is
    """A snapshot file is not what was written. `file` names it, `tensor` the tensor, where it is one."""

    def __init__(self, file: str, reason: str, tensor: str = "") -> None:
        what = f"tensor {tensor} of snapshot {file}" if tensor else f"snapshot {file}"
        super().__init__(f"{what} is damaged: {reason}", hint="it is not served; remove the file")
        self.file, self.tensor, self.reason = file, tensor, reason


class Entry(msgspec.Struct, frozen=True):
    """One tensor's place: bytes [start, stop) of the data, which begins after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Layout(msgspec.Struct, frozen=True):
    """Where everything of a file lies, before a byte of it is written."""

    entries: tuple[Entry, ...]
    structure: str
    labels: dict[str, str]
    header_bytes: int
    total_bytes: int


class Raw(msgspec.Struct, frozen=True, eq=False):
    """A tensor as bytes. `data` lies in the memory that the file was read into."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Snapshot(msgspec.Struct, frozen=True, eq=False):
    """What a file held."""

    labels: dict[str, str]
    structure: Any
    tensors: dict[str, Raw]


def lay_out(
    tensors: Mapping[str, tuple[str, Sequence[int]]], structure: Any = None, labels: Mapping[str, str] = {}
) -> Layout:
    """`tensors`: name -> (dtype, shape). Raises `ValueError` for a dtype that the format has not, or a reserved name."""
    entries, at = [], 0
    for name, (dtype, _) in tensors.items():
        if dtype not in SIZES or name in (PAD, "__metadata__"):
            raise ValueError(f"tensor {name!r} of dtype {dtype} cannot be kept in a snapshot")
    for name in sorted(tensors, key=lambda n: (-SIZES[tensors[n][0]], n)):
        dtype, shape = tensors[name]
        stop = at + SIZES[dtype] * math.prod(shape)
        entries.append(Entry(name, dtype, tuple(shape), at, stop))
        at = stop
    if at % PAGE_BYTES:
        stop = -(-at // PAGE_BYTES) * PAGE_BYTES
        entries.append(Entry(PAD, "U8", (stop - at,), at, stop))
        at = stop
    words = msgspec.json.encode(structure, order="deterministic").decode()
    draft = Layout(tuple(entries), words, dict(labels), 0, 0)
    header = 8 + len(_header(draft, {entry.name: _NO_SUM for entry in entries}, _NO_SUM))
    header = -(-header // PAGE_BYTES) * PAGE_BYTES
    if header > HEADER_BYTES_MAX:
        raise ValueError(
            f"names and structure of this snapshot take {header} bytes, more than {HEADER_BYTES_MAX}"
        )
    return msgspec.structs.replace(draft, header_bytes=header, total_bytes=header + at)


def _header(layout: Layout, sums: Mapping[str, str], seal: str) -> bytes:
    metadata = {
        "interlock.snapshot": str(VERSION),
        "structure": layout.structure,
        "labels": msgspec.json.encode(layout.labels, order="deterministic").decode(),
        "checksums": msgspec.json.encode(dict(sums), order="deterministic").decode(),
        "seal": seal,
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    for entry in layout.entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [entry.start, entry.stop],
        }
    return msgspec.json.encode(header)


def _seal_of(metadata: Mapping[str, str]) -> str:
    kept = {key: metadata.get(key, "") for key in ("interlock.snapshot", "structure", "labels", "checksums")}
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(kept, order="deterministic"))


def _sum_of(name: str, dtype: str, shape: Sequence[int], data: memoryview) -> str:
    digest = xxhash.xxh3_64(msgspec.json.encode([name, dtype, list(shape)]))
    digest.update(data)
    return digest.hexdigest()


def seal(layout: Layout, into: memoryview) -> None:
    """Writes the header in front of the tensor bytes that stand in `into`. Takes the time of reading them once."""
    data = into[layout.header_bytes : layout.total_bytes]
    last = layout.entries[-1] if layout.entries else None
    if last is not None and last.name == PAD:
        data[last.start : last.stop] = bytes(last.stop - last.start)
    sums = {e.name: _sum_of(e.name, e.dtype, e.shape, data[e.start : e.stop]) for e in layout.entries}
    draft = msgspec.json.decode(_header(layout, sums, _NO_SUM))["__metadata__"]
    header = _header(layout, sums, _seal_of(draft)).ljust(layout.header_bytes - 8)
    into[:8] = len(header).to_bytes(8, "little")
    into[8 : layout.header_bytes] = header


def read(file: str, data: memoryview, *, check: bool = True) -> Snapshot:
    """What `data`, the bytes of `file`, hold. Raises `SnapshotDamaged` naming the file, and the tensor if it is one."""
    header, metadata, at = _parse(file, data)
    raws: dict[str, Raw] = {}
    expected = 0
    body = data[at:]
    sums = _decoded(file, metadata.get("checksums", ""), dict[str, str], "its checksums")
    for name, told in sorted(header.items(), key=lambda each: each[1].data_offsets):
        start, stop = told.data_offsets
        size = SIZES.get(told.dtype)
        if size is None or min(told.shape, default=0) < 0 or stop - start != size * math.prod(told.shape):
            raise SnapshotDamaged(
                file, f"{told.dtype} of shape {told.shape} is not {stop - start} bytes", name
            )
        if start != expected or stop > len(body):
            raise SnapshotDamaged(file, f"it lies at [{start}, {stop}) of {len(body)} bytes", name)
        expected = stop
        raws[name] = Raw(told.dtype, tuple(told.shape), body[start:stop])
        if check and sums.get(name) != _sum_of(name, told.dtype, told.shape, body[start:stop]):
            raise SnapshotDamaged(file, "its bytes are not those that were written", name)
    if expected != len(body):
        raise SnapshotDamaged(file, f"{len(body) - expected} bytes belong to no tensor")
    labels = _decoded(file, metadata.get("labels", ""), dict[str, str], "its labels")
    structure = _decoded(file, metadata.get("structure", ""), Any, "its structure")
    raws.pop(PAD, None)
    return Snapshot(labels, structure, raws)


class _Told(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _parse(file: str, data: memoryview) -> tuple[dict[str, _Told], dict[str, str], int]:
    if len(data) < 8:
        raise SnapshotDamaged(file, f"it has {len(data)} bytes, no header")
    length = int.from_bytes(data[:8], "little")
    if length > min(HEADER_BYTES_MAX, len(data) - 8):
        raise SnapshotDamaged(file, f"its header says {length} bytes, the file has {len(data)}")
    header = _decoded(file, bytes(data[8 : 8 + length]), dict[str, msgspec.Raw], "its header")
    metadata = _decoded(file, bytes(header.pop("__metadata__", b"{}")), dict[str, str], "its metadata")
    version = metadata.get("interlock.snapshot", "")
    if not version.isdecimal():
        raise SnapshotDamaged(file, "it is no snapshot of ours: it names no version")
    if int(version) > VERSION:
        raise SnapshotDamaged(file, f"it has format version {version}, this program reads up to {VERSION}")
    if metadata.get("seal") != _seal_of(metadata):
        raise SnapshotDamaged(file, "its header is not the one that was written")
    told = {name: _decoded(file, bytes(raw), _Told, f"tensor {name}") for name, raw in header.items()}
    return told, metadata, 8 + length


def _decoded(file: str, words: str | bytes, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(words, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotDamaged(file, f"{what} cannot be read: {error}") from None


Fill = Callable[[memoryview], None]
"""Puts one tensor's bytes into the place that they have in the file."""
