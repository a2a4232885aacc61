"""The front's requests on disk while the fleet is suspended (decision 017).

    target SUSPENDED ─► nothing is taken from engines any more ─► written, synced ─► told: kept at this epoch
    target RUNNING   ─► the file is emptied ─► engines are asked for what was not taken, and work goes out again

The file is true as long as nothing is delivered; so nothing is, from the moment it is written until it is emptied. What an
engine says meanwhile is not lost: it keeps every token until the end is acknowledged, and says it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from interlock.core.identity import Epoch
from interlock.core.limits import FACT_CHARS_MAX, KEEP_RETRY_SECONDS, KEPT_REQUESTS_BYTES_MAX
from interlock.core.targets import State
from interlock.fleet.kept_requests import KeptRequest
from interlock.host.base import Host
from interlock.host.state_file import StateFile
from interlock.telemetry.events import EventLog
from interlock.wire.fleet_messages import Membership

_log = logging.getLogger(__name__)

FILE = "requests.bin"


class Keepable(Protocol):
    """Whose requests these are (`fleet.requests`)."""

    changes: int
    """Grows whenever what `kept` returns would be another list."""

    def kept(self) -> list[KeptRequest]: ...


class RequestsKeeper:
    """One a front. `hear` each membership, `run` in a task."""

    def __init__(
        self,
        host: Host,
        state_dir: Path,
        name: str,
        requests: Keepable,
        events: EventLog,
        *,
        on_word: Callable[[], None],
        on_released: Callable[[], None],
    ) -> None:
        """`on_word`: `kept_at` or `trouble` has changed. `on_released`: work goes on."""
        kind = f"requests of front {name}"
        self._host, self._requests, self._events = host, requests, events
        self._file = StateFile(host.files, state_dir / FILE, kind, KEPT_REQUESTS_BYTES_MAX)
        self._on_word, self._on_released = on_word, on_released
        self.holding = False
        """Nothing is taken from engines, nothing goes out to them: what is on disk is what is."""
        self.kept_at: Epoch | None = None
        self.trouble = ""
        self.trouble_at: Epoch | None = None
        """The epoch at which `trouble` was met."""
        self._on_disk = False
        self._saved_changes, self._saved_s = -1, 0.0
        self._target: tuple[Epoch, str] | None = None
        self._wake = asyncio.Event()

    def load(self) -> list[KeptRequest]:
        """Of the last life, at the start. Raises `OSError` where the disk fails: nothing is lost yet."""
        try:
            body = self._file.load()
            kept = [] if body is None else msgspec.msgpack.decode(body, type=list[KeptRequest])
        except (ValueError, msgspec.MsgspecError) as error:
            aside = self._file.set_aside()
            self._events.emit("kept_requests_unreadable", reason=str(error), aside=str(aside))
            _log.error("the requests of this front's last life are lost: %s; it is now %s", error, aside)
            return []
        self.holding = self._on_disk = bool(kept)
        return kept

    def hear(self, view: Membership) -> None:
        """A new word of the coordinator. Never waits."""
        if view.target == State.SUSPENDED:
            self.holding = True  # from here on, so that what is written next stays true
        if self._target != (view.epoch, view.target):
            self._target = view.epoch, view.target
            self._wake.set()

    def look(self) -> None:
        """To be called now and then: requests came and went while the fleet was suspended."""
        late = self._host.clock.monotonic_s() - self._saved_s >= KEEP_RETRY_SECONDS
        if self.kept_at is not None and late and self._saved_changes != self._requests.changes:
            self._wake.set()

    async def run(self) -> None:
        """Writes, empties and tells, for ever. A failing disk is told and tried again."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._turn()
            except OSError as error:
                if str(error) != self.trouble:
                    self._events.emit("requests_not_kept", reason=str(error))
                self._say(None, str(error)[:FACT_CHARS_MAX])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KEEP_RETRY_SECONDS):
                        await self._wake.wait()
                self._wake.set()

    def _say(self, kept_at: Epoch | None, trouble: str) -> None:
        at = self._target[0] if trouble and self._target is not None else None
        changed = (self.kept_at, self.trouble, self.trouble_at) != (kept_at, trouble, at)
        self.kept_at, self.trouble, self.trouble_at = kept_at, trouble, at
        if changed:
            self._on_word()

    async def _turn(self) -> None:
        if self._target is None:
            return
        epoch, target = self._target
        if target == State.SUSPENDED:
            await self._save()
            self._say(epoch, "")
        elif target == State.PAUSED:
            self._say(None, "")
        else:
            self._say(None, "")
            await self._release()

    async def _save(self) -> None:
        changes = self._requests.changes
        if changes == self._saved_changes:
            return  # nothing was delivered since, or the file would be empty
        kept = self._requests.kept()
        if kept or self._on_disk:
            self._on_disk = True
            await self._host.in_thread(lambda: self._file.save(msgspec.msgpack.encode(kept)))
        self._saved_changes, self._saved_s = changes, self._host.clock.monotonic_s()

    async def _release(self) -> None:
        if not self.holding:
            return
        self._saved_changes = -1  # what was saved is there no more, also where SUSPENDED is heard meanwhile
        if self._on_disk:
            await self._host.in_thread(self._file.empty)
            self._on_disk = False
        if self._target is not None and self._target[1] != State.SUSPENDED:
            self.holding = False
            self._on_released()
