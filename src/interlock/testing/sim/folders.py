"""Directories by descriptor on a simulated disk: `Tree` and `Folder` of the seam, with everything that may go wrong with them.

A file's contents and each directory's names reach the medium separately: a power cut keeps what was synced, and of the rest any
part. Whoever holds a folder holds the directory itself, renamed or removed.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from interlock.host.base import DirectoryEntry
from interlock.host.disk import DirectoryBusy


class SimFile:
    def __init__(self) -> None:
        self.now = b""
        self.durable = b""


class SimFolderNode:
    def __init__(self) -> None:
        self.now: dict[str, SimFile | SimFolderNode] = {}
        self.durable: dict[str, SimFile | SimFolderNode] = {}
        self.is_removed = False


def _error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)


class SimStorage:
    """One disk. Faults: `full`, `failing` (share of calls that end with EIO), a power cut."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self.rng = rng or random.Random(0)
        self.top = SimFolderNode()
        self.full = False
        self.failing = 0.0
        self.owner: tuple[str, Callable[[], bool]] | None = None
        self._wall_ns = 1_000

    def next_wall_ns(self) -> int:
        self._wall_ns += self.rng.randrange(1, 100)
        return self._wall_ns

    def trouble(self, name: str) -> None:
        if self.failing and self.rng.random() < self.failing:
            raise _error(errno.EIO, name)

    def power_cut(self) -> None:
        self._cut(self.top)

    def _cut(self, folder: SimFolderNode) -> None:
        names = {}
        for name in sorted({*folder.now, *folder.durable}):
            now, durable = folder.now.get(name), folder.durable.get(name)
            kept = now if now is durable or self.rng.random() < 0.5 else durable
            if kept is not None:
                names[name] = kept
        folder.now, folder.durable = dict(names), names
        for node in names.values():
            if isinstance(node, SimFolderNode):
                self._cut(node)
            elif node.now != node.durable:
                node.now = node.durable if self.rng.random() < 0.5 else self._part(node.now)
                node.durable = node.now

    def _part(self, data: bytes) -> bytes:
        return data[: self.rng.randrange(len(data) + 1)]

    def files(self, name: str) -> list[str]:
        """Paths of all files below a directory, for checks."""
        return self._below(self.find(name), name)

    def _below(self, folder: SimFolderNode, path: str) -> list[str]:
        found = []
        for name, node in folder.now.items():
            inner = f"{path}/{name}"
            found += self._below(node, inner) if isinstance(node, SimFolderNode) else [inner]
        return found

    def find(self, path: str) -> SimFolderNode:
        node: SimFile | SimFolderNode = self.top
        for part in Path(path).parts:
            inner = node.now.get(part) if isinstance(node, SimFolderNode) else None
            if inner is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            node = inner
        if not isinstance(node, SimFolderNode):
            raise _error(errno.ENOTDIR, path)
        return node

    def parent(self, path: str) -> tuple[SimFolderNode, str]:
        return self.find(str(Path(path).parent)), Path(path).name


class SimFolder:
    """`Folder` of the seam."""

    def __init__(self, tree: SimTree, node: SimFolderNode) -> None:
        self._tree, self.node = tree, node
        self._is_open = True

    def _before(self, call: str, name: str) -> None:
        if not self._is_open:
            raise _error(errno.EBADF, name)
        self._tree.before(call, name)
        if not self._is_open:
            raise _error(errno.EBADF, name)

    def write(self, name: str, data: memoryview) -> None:
        storage, temporary = self._tree.storage, f"{name}.tmp"
        self._before("open", temporary)
        if self.node.is_removed:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if temporary in self.node.now:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        file = SimFile()
        self.node.now[temporary] = file
        self._before("write", temporary)
        if storage.full:
            file.now = storage._part(bytes(data))
            raise _error(errno.ENOSPC, name)
        file.now = bytes(data)
        self._before("fsync", temporary)
        file.durable = file.now
        self._before("rename", name)
        if self.node.now.get(temporary) is not file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self.node.now[name] = self.node.now.pop(temporary)
        self._before("fsync", "folder")
        self.node.durable = dict(self.node.now)

    def read(self, name: str, allocate: Callable[[int], memoryview]) -> memoryview:
        self._before("open for reading", name)
        file = self.node.now.get(name)
        if not isinstance(file, SimFile):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self._before("read", name)
        into = allocate(len(file.now))
        into[:] = file.now
        return into

    def list(self) -> list[DirectoryEntry]:
        self._before("list", "folder")
        return _entries(self.node)

    def move(self, name: str, to: str) -> None:
        self._before("move", to)
        file = self.node.now.get(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        target, last = self._tree.storage.parent(to)
        del self.node.now[name]
        target.now[last] = file

    def remove(self, name: str) -> None:
        self._before("unlink", name)
        self.node.now.pop(name, None)

    def close(self) -> None:
        self._is_open = False


class SimTree:
    """`Tree` of the seam. `park` is called before each call; it may end the process."""

    def __init__(
        self, storage: SimStorage, park: Callable[[str], None], owner: str, is_dead: Callable[[], bool]
    ) -> None:
        self.storage, self._park = storage, park
        if storage.owner is not None and not storage.owner[1]():
            raise DirectoryBusy(Path("simulated"), storage.owner[0])
        storage.owner = (owner, is_dead)

    def before(self, call: str, name: str) -> None:
        self._park(f"{call} {name}")
        self.storage.trouble(name)

    def make_folder(self, name: str) -> None:
        self.before("mkdir", name)
        parent, last = self.storage.parent(name)
        parent.now.setdefault(last, SimFolderNode())

    def make_opened(self, name: str) -> SimFolder:
        self.before("mkdir", name)
        parent, last = self.storage.parent(name)
        if last in parent.now:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        node = parent.now[last] = SimFolderNode()
        return SimFolder(self, node)

    def open_folder(self, name: str) -> SimFolder:
        self.before("open folder", name)
        return SimFolder(self, self.storage.find(name))

    def folders(self, name: str) -> list[str]:
        self.before("list", name)
        found = self.storage.find(name).now
        return sorted(inner for inner, node in found.items() if isinstance(node, SimFolderNode))

    def list(self, folder: str = ".") -> list[DirectoryEntry]:
        self.before("list", folder)
        return _entries(self.storage.find(folder))

    def rename(self, name: str, to: str) -> None:
        self.before("rename", f"{name} {to}")
        parent, last = self.storage.parent(name)
        if last not in parent.now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        target, new = self.storage.parent(to)
        target.now[new] = parent.now.pop(last)

    def remove(self, name: str) -> None:
        self.before("unlink", name)
        parent, last = self.storage.parent(name)
        parent.now.pop(last, None)

    def empty(self, name: str) -> bool:
        self.before("empty", name)
        try:
            node = self.storage.find(name)
        except FileNotFoundError:
            return True
        for inner in list(node.now):
            self.before("unlink", f"{name}/{inner}")
            if isinstance(node.now.get(inner), SimFolderNode):
                if not self.empty(f"{name}/{inner}"):
                    return False
            else:
                node.now.pop(inner, None)
        self.before("rmdir", name)
        if node.now:
            return False
        node.is_removed = True
        parent, last = self.storage.parent(name)
        parent.now.pop(last, None)
        return True

    def usage(self, name: str) -> tuple[int, int]:
        self.before("list", name)
        files = self.storage.files(name)
        sizes = [len(f.now) for path in files if isinstance(f := self._node(path), SimFile)]
        return len(files), sum(sizes)

    def _node(self, path: str) -> SimFile | SimFolderNode:
        parent, last = self.storage.parent(path)
        return parent.now[last]

    def sync_folder(self, name: str) -> None:
        self.before("fsync", name)
        node = self.storage.find(name)
        node.durable = dict(node.now)

    def read_small(self, name: str) -> bytes | None:
        self.before("read", name)
        node = self.storage.top.now.get(name)
        return node.now if isinstance(node, SimFile) else None

    def write_small(self, name: str, data: bytes) -> None:
        self.before("write", name)
        file = SimFile()
        file.now = file.durable = data
        self.storage.top.now[name] = self.storage.top.durable[name] = file

    def close(self) -> None:
        self.storage.owner = None


def _entries(node: SimFolderNode) -> list[DirectoryEntry]:
    return sorted(
        DirectoryEntry(name, len(file.now), len(file.now))
        for name, file in node.now.items()
        if isinstance(file, SimFile)
    )
