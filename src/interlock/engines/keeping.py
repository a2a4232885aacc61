"""What an engine's runner puts on disk before it reports SUSPENDED, and what its next life begins with.

A suspended engine has no process that could not be killed: its runner may die, the machine may be switched off. So every
request (as it was dispatched, with all its tokens and the front's note) is on disk, synced, before SUSPENDED is reported; a disk
that does not take it fails the step, and the engine stays PAUSED as it was.

The file is true until the engine steps again. It is emptied before that, never after: a file that lags behind what a front was
told would be a lie, and no file at all is a case that everybody knows (the engine is gone, requests go on from the front's
ledger). What cannot be read is set aside by name, and the engine begins without it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from interlock.core.limits import KEPT_REQUESTS_BYTES_MAX
from interlock.engines.base import RequestState
from interlock.host.base import Host
from interlock.host.state_file import StateFile
from interlock.wire.engine_messages import Dispatch, TokenLogprobs

_log = logging.getLogger(__name__)

FILE = "requests.bin"


class KeepFailed(Exception):  # noqa: N818 - says what is, as the others do
    """The requests could not be put on disk; nothing has changed. The message says why and what to do."""


class KeptStream(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at one request of one front, at the moment of the suspension."""

    front: str
    front_life: int
    dispatch: Dispatch
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    cached_tokens: int = 0
    finish: str = ""
    detail: str = ""
    versions: list[tuple[int, str]] = []
    state: RequestState | None = None
    """The engine's own, where tokens do not carry all; its caches are left out."""


class RequestsFile:
    """One engine's file. `holds`: there is something in it that the next step would make untrue."""

    def __init__(self, host: Host, state_dir: Path, name: str) -> None:
        kind = f"requests of engine {name}"
        self._host = host
        self._file = StateFile(host.files, state_dir / FILE, kind, KEPT_REQUESTS_BYTES_MAX)
        self.holds = False

    def load(self) -> list[KeptStream]:
        """At the start of a life. Raises `OSError` where the disk fails: nothing is lost yet."""
        try:
            body = self._file.load()
            kept = [] if body is None else msgspec.msgpack.decode(body, type=list[KeptStream])
        except (ValueError, msgspec.MsgspecError) as error:
            aside = self._file.set_aside()
            _log.error("the requests of this engine's last life are lost: %s; it is now %s", error, aside)
            return []
        self.holds = bool(kept)
        return kept

    async def save(self, streams: list[KeptStream]) -> None:
        """Raises `KeepFailed`."""

        def write() -> None:
            self._file.save(msgspec.msgpack.encode(streams))

        if not streams and not self.holds:
            return
        self.holds = True
        try:
            await self._host.in_thread(write)
        except OSError as error:
            raise KeepFailed(
                f"{len(streams)} requests could not be put on disk, so memory is not given back: {error}; "
                "make room there: it is tried again by itself, and RESUME calls it off"
            ) from error

    async def empty(self) -> None:
        """Raises `KeepFailed`: then the engine must not step."""
        if not self.holds:
            return
        try:
            await self._host.in_thread(self._file.empty)
        except OSError as error:
            raise KeepFailed(
                f"what was kept of the requests cannot be taken back before they go on: {error}"
            ) from error
        self.holds = False
