"""Promoted snapshots: files moved out of a request's directory, found by a name of their content, the longest unused dropped first.

A name is the hash of what the state is a state of (tokens, model, layout), so any request may load it; a file that is damaged or
gone is a miss.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict

from interlock.core.limits import SNAPSHOT_KEPT_BYTES_MAX
from interlock.host.trees import Changes, Folder, Tree, page_memory
from interlock.snapshots import format as file_format
from interlock.snapshots.desk import KEPT
from interlock.snapshots.format import Snapshot, SnapshotDamaged

_NAME = re.compile(r"[0-9a-f]{16,128}")


class Kept:
    """Opened with what is in the folder. Thread-safe."""

    def __init__(self, tree: Tree, changes: Changes, bytes_max: int = SNAPSHOT_KEPT_BYTES_MAX) -> None:
        self._folder: Folder = tree.open_folder(KEPT)
        self._changes, self._bytes_max = changes, bytes_max
        found = [file for file in self._folder.list() if _NAME.fullmatch(file.name)]
        self._files: OrderedDict[str, int] = OrderedDict((file.name, file.size_bytes) for file in found)
        self._bytes = sum(self._files.values())
        self.dropped = self.failed_reads = 0
        self._fit()  # an earlier life may have been allowed more

    def __contains__(self, name: object) -> bool:
        with self._changes:
            return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    @property
    def bytes(self) -> int:
        return self._bytes

    @staticmethod
    def path_of(name: str) -> str:
        """Where a promotion puts it. Raises `ValueError` for what is no hash in hexadecimal."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a kept snapshot: it is no hash in hexadecimal")
        return f"{KEPT}/{name}"

    def added(self, name: str, size_bytes: int) -> None:
        """Its file was moved there. What no longer fits is removed, the longest unused first."""
        with self._changes:
            self._bytes += size_bytes - self._files.pop(name, 0)
            self._files[name] = size_bytes
        self._fit()

    def _fit(self) -> None:
        dropped = []
        with self._changes:
            while self._bytes > self._bytes_max and self._files:
                oldest, size = self._files.popitem(last=False)
                self._bytes -= size
                dropped.append(oldest)
            self.dropped += len(dropped)
        for oldest in dropped:
            self._unlink(oldest)

    def load(self, name: str) -> Snapshot | None:
        """None if there is none, it cannot be read, or it is damaged: then it is removed. Never raises into the engine."""
        with self._changes:
            if name not in self._files:
                return None
            self._files.move_to_end(name)
        try:
            return file_format.read(f"{KEPT}/{name}", self._folder.read(name, page_memory_exact))
        except FileNotFoundError:
            self._forget(name)
        except (EOFError, SnapshotDamaged):
            self.remove(name)
        except OSError:
            self.failed_reads += 1  # perhaps only now; the file stays
        return None

    def remove(self, name: str) -> None:
        self._forget(name)
        if _NAME.fullmatch(name):
            self._unlink(name)

    def _forget(self, name: str) -> None:
        with self._changes:
            self._bytes -= self._files.pop(name, 0)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):  # the next start finds it again, and counts it
            self._folder.remove(name)

    def close(self) -> None:
        self._folder.close()


def page_memory_exact(size_bytes: int) -> memoryview:
    """Memory that begins at a page, of exactly so many bytes."""
    return page_memory(size_bytes)[:size_bytes]
