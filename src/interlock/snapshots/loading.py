"""Loading: from memory while a state is on its way to disk, from its file afterwards. What is not whole is a miss, and told."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from interlock.core.snapshot_events import Effect, LoadAsked, Loaded, LoadRead, ReadFile, ReadStaged
from interlock.core.snapshot_state import Item, scope_name
from interlock.host.trees import page_memory
from interlock.snapshots import format as file_format
from interlock.snapshots.desk import Desk, Image, SnapshotBusy
from interlock.snapshots.format import Snapshot, SnapshotDamaged


class Loader:
    """Every `load` of a store."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._next = 0

    def load(self, request: str, position: int) -> Snapshot | None:
        """As `SnapshotStore.load`."""
        name, desk = scope_name(request), self._desk
        with desk.changes:
            number, self._next = self._next, self._next + 1
            desk.counts["loads"] += 1
        with desk.scope(name):
            effects = desk.tell(name, LoadAsked(number, position))
            item, image = self._source(name, effects)
        if item is None:
            self._missed()
            return None
        snapshot: Snapshot | None = None
        try:
            snapshot = self._read_staged(image) if image is not None else self._read_file(item)
        finally:
            effects = self._end_load(name, LoadRead(number, is_good=snapshot is not None))
        if any(isinstance(e, Loaded) for e in effects):
            return snapshot
        self._missed()
        return None

    def _end_load(self, name: str, read: LoadRead) -> list[Effect]:
        try:
            with self._desk.scope(name):
                return self._desk.tell(name, read)
        except SnapshotBusy:
            self._desk.owed.append(
                (name, msgspec.structs.replace(read, is_good=True))
            )  # not damage: nobody asked in time
            raise

    def _source(self, name: str, effects: Sequence[Effect]) -> tuple[Item | None, Image | None]:
        for effect in effects:
            if isinstance(effect, ReadStaged):
                return effect.load.item, self._desk.staged[name, effect.load.item.number]
            if isinstance(effect, ReadFile):
                return effect.load.item, None
        return None, None

    def _missed(self) -> None:
        with self._desk.changes:
            self._desk.counts["misses"] += 1

    def _read_staged(self, image: Image) -> Snapshot:
        """Its header may be under way to being written: what it says is taken from the layout."""
        try:
            image.staging.wait()
            body = bytearray(image.buffer.view[image.layout.header_bytes :])
            tensors = {
                entry.name: file_format.Raw(
                    entry.dtype, entry.shape, memoryview(body)[entry.start : entry.stop]
                )
                for entry in image.layout.entries
                if entry.name != file_format.PAD
            }
            structure = msgspec.json.decode(image.layout.structure)
            return Snapshot(dict(image.layout.labels), structure, tensors)
        finally:
            with self._desk.changes:
                image.buffer.release()

    def _read_file(self, item: Item) -> Snapshot | None:
        name = f"{item.directory}/{item.file}"
        try:
            with self._desk.changes:
                folder = self._desk.handles[item.directory]
            data = folder.read(item.file, lambda size: page_memory(size)[:size])
            snapshot = file_format.read(name, data)
            expected = {"request": item.directory.scope, "position": str(item.position)}
            if not expected.items() <= snapshot.labels.items():
                raise SnapshotDamaged(name, "it is of another request or position")
            return snapshot
        except (OSError, EOFError, SnapshotDamaged) as error:
            self._desk.note_damage(item, str(error))
            return None
