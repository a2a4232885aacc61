"""Saving: one copy of a state into memory of the store's own, offered to core/snapshots. It waits for no writer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from interlock.core.snapshot_book import Amount
from interlock.core.snapshot_events import Accepted, Effect, Refused
from interlock.core.snapshot_state import scope_name
from interlock.host.trees import ThreadHost
from interlock.snapshots import format as file_format
from interlock.snapshots.desk import Desk, Image, SnapshotBusy
from interlock.snapshots.tensors import Staging, describe


class Saved(msgspec.Struct, frozen=True):
    """Accepted: readable at once, then durable or reported failed. Else nothing was kept, for `reason`."""

    accepted: bool
    reason: str = ""


class Saver:
    """Every `save` of a store."""

    def __init__(self, host: ThreadHost, desk: Desk, budget: Amount, write_seconds_max: float) -> None:
        self._host, self._desk = host, desk
        self._budget, self._write_seconds_max = budget, write_seconds_max
        self._staging_bytes = 0

    def save(
        self,
        request: str,
        position: int,
        tensors: Mapping[str, Any],
        structure: Any = None,
        labels: Mapping[str, str] = {},
    ) -> Saved:
        """As `SnapshotStore.save`."""
        told = {"request": scope_name(request), "position": str(position), **labels}
        layout = file_format.lay_out(
            {name: describe(value) for name, value in tensors.items()}, structure, told
        )
        if (reason := self._reserve(layout.total_bytes)) is not None:
            return self._refused(reason)
        image = None
        try:
            image = self._stage(layout, tensors)
            return self._offer(request, position, image)
        except SnapshotBusy as error:
            self._drop(image)
            return self._refused(str(error))
        except BaseException:
            self._drop(image)
            raise
        finally:
            with self._desk.changes:
                self._staging_bytes -= layout.total_bytes

    def _reserve(self, size_bytes: int) -> str | None:
        """Before the copy, so that what does not fit costs nothing."""
        with self._desk.changes:
            coming = self._staging_bytes + size_bytes
            if self._desk.is_closing:
                return "the snapshot store is closed"
            if not (self._desk.book.used + Amount(1, coming, coming)).fits(self._budget):
                return "the snapshot budget is used up"
            self._staging_bytes = coming
        return None

    def _stage(self, layout: file_format.Layout, tensors: Mapping[str, Any]) -> Image:
        buffer = self._desk.buffers.take(self._desk.changes, layout.total_bytes)
        staging = Staging()
        body = buffer.view[layout.header_bytes :]
        for entry in layout.entries:
            if entry.name in tensors:
                staging.copy(tensors[entry.name], body[entry.start : entry.stop])
        return Image(layout, buffer, staging)

    def _offer(self, request: str, position: int, image: Image) -> Saved:
        name, desk = scope_name(request), self._desk
        deadline_s = self._host.monotonic_s() + self._write_seconds_max
        with desk.scope(name):
            with desk.changes:
                desk.requests[name] = request

            def tell() -> tuple[Effect, ...]:
                if desk.is_closing:
                    return (Refused(position, "the snapshot store is closed"),)
                return desk.book.save(
                    name, position=position, bytes=image.layout.total_bytes, deadline_s=deadline_s
                )

            effects = desk.follow(name, tell, None, image)
        accepted = next((e for e in effects if isinstance(e, Accepted)), None)
        if accepted is None or not accepted.is_new:
            self._drop(image)
        if accepted is not None:
            return Saved(True)
        return self._refused(next(e.reason for e in effects if isinstance(e, Refused)))

    def _drop(self, image: Image | None) -> None:
        if image is not None:
            image.staging.wait()
            with self._desk.changes:
                image.buffer.release()

    def _refused(self, reason: str) -> Saved:
        with self._desk.changes:
            self._desk.counts["refused"] += 1
        return Saved(False, reason)
