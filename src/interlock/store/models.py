"""Which weights an engine runs, by content: the part of every block key that keeps two models apart.

A path says nothing (yesterday's fine-tune stood there too), a hub's branch moves. So a local checkpoint is named by the
digest of its weights and configuration, wherever it stands: engines on two hosts share blocks, and an overwritten
checkpoint shares none. Digests are kept by (path, size, mtime, inode), so that only the first start reads the files.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from interlock.core.errors import InterlockError
from interlock.host.base import Files
from interlock.host.digests import FileStamp, sha256_of, stamp_of

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"}
CONFIG_NAMES = {
    "config.json",
    "params.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "adapter_config.json",
}
CODE_SUFFIXES = {".py"}
"""Remote code decides what the weights mean."""
COMMIT = re.compile(r"[0-9a-f]{40}")
CACHE_FILE_BYTES_MAX = 4 * 1024 * 1024
CACHE_ENTRIES_MAX = 4096


class UnknownModelError(InterlockError):
    """What these weights are cannot be told, so nothing computed with them may be shared."""


class _Known(msgspec.Struct, frozen=True, array_like=True):
    stamp: FileStamp
    digest: str


def model_identity(model: str, revision: str | None, *, files: Files, cache: Path) -> str:
    """A name that equal weights and configurations share and others do not.

    `model` is a checkpoint directory or file, or a hub id whose `revision` is a full commit hash. `cache` is the file
    that remembers digests. Raises `UnknownModelError` when neither is the case.
    """
    path = Path(model).expanduser()
    if path.exists():
        return "sha256:" + checkpoint_digest(path, files=files, cache=cache)
    if revision is not None and COMMIT.fullmatch(revision):
        return f"hub:{model}@{revision}"
    raise UnknownModelError(
        f"{model} is no local checkpoint and has no fixed revision (got {revision!r}), so its weights cannot be told "
        "from others of that name",
        hint="pass --revision with the 40-digit commit, a local directory, or model_id in the connector's extra config",
        model=model,
    )


def checkpoint_digest(path: Path, *, files: Files, cache: Path) -> str:
    """Digest over weights, configuration and code of a checkpoint, by relative name and content.

    Raises `UnknownModelError` when no file with weights is there.
    """
    root = path if path.is_dir() else path.parent
    chosen = sorted(p for p in path.rglob("*") if _matters(p, root)) if path.is_dir() else [path]
    if not any(p.suffix in WEIGHT_SUFFIXES for p in chosen):
        raise UnknownModelError(
            f"{path} holds no weights ({', '.join(sorted(WEIGHT_SUFFIXES))})",
            hint="name the checkpoint's own directory, or pass model_id in the connector's extra config",
            path=str(path),
        )
    known = _read_cache(files, cache)
    fresh: dict[str, _Known] = {}
    whole = hashlib.sha256()
    for file in chosen:
        real = file.resolve()
        stamp = stamp_of(real)
        entry = known.get(str(real))
        if entry is None or entry.stamp != stamp:
            entry = fresh[str(real)] = _Known(stamp, sha256_of(real))
        name = str(file.relative_to(root)).encode()
        whole.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(entry.digest))
    if fresh:
        _write_cache(files, cache, fresh)
    return whole.hexdigest()


def _matters(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    wanted = path.suffix in WEIGHT_SUFFIXES | CODE_SUFFIXES or path.name in CONFIG_NAMES
    return wanted and not hidden and path.is_file()


def _read_cache(files: Files, cache: Path) -> dict[str, _Known]:
    """What is remembered; nothing, where the file is absent or damaged: then it is read again."""
    try:
        data = files.read(cache, CACHE_FILE_BYTES_MAX)
        return msgspec.json.decode(data, type=dict[str, _Known]) if data else {}
    except (msgspec.DecodeError, ValueError, OSError):
        return {}


def _write_cache(files: Files, cache: Path, fresh: dict[str, _Known]) -> None:
    """Best effort: two engines that start at once may each forget the other's entries, and read again next time."""
    entries = _read_cache(files, cache) | fresh
    newest = dict(list(entries.items())[-CACHE_ENTRIES_MAX:])
    try:
        files.write_durably(cache, msgspec.json.encode(newest))
    except OSError:
        return
