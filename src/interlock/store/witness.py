"""Proof that a process is gone: the only thing, besides its own word, on which a slot is given to somebody else.

When a process attaches, the node keeps the channel's watch on it (a pidfd, which outlives the channel and which no pid used
again can deceive). Its exit, and nothing else, ends the quarantine of what that process was given and did not report on; the
exit of a scheduler ends the sessions of its engine's life. The end of a connection proves nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from interlock.core import limits
from interlock.host.base import Watch
from interlock.store.blocks import BlockStore
from interlock.store.refusal import Refusal
from interlock.store.roster import Roster
from interlock.wire.channel import Channel

_log = logging.getLogger(__name__)


class Witness:
    """The watches of one node. `spawn` runs a coroutine as a named task of the node."""

    def __init__(
        self,
        store: BlockStore,
        roster: Roster,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        *,
        end_frozen_writers: bool,
    ) -> None:
        self._store, self._roster, self._spawn = store, roster, spawn
        self._end_frozen_writers = end_frozen_writers
        self._watches: dict[int, Watch] = {}
        self._told_frozen: set[int] = set()

    def prove(self, channel: Channel) -> int:
        """The process at the other end, of whose exit we will have proof from now on. Raises `Refusal` without."""
        watch = channel.peer_process
        if watch is None or watch.exited:
            raise Refusal(
                "no_proof",
                "this node cannot prove the exit of the process that wants to attach, so it gets no slots",
                hint="connect over the node's Unix socket, from the same PID namespace",
            )
        known = self._watches.get(watch.pid)
        if known is not None and not known.exited:
            return watch.pid
        if known is not None:  # its pid was used again before the loop told us
            self._gone(known)
        self._watches[watch.pid] = watch
        self._spawn(self._await_exit(watch), f"exit of {watch.pid}")
        return watch.pid

    def end_frozen(self, now_s: float) -> None:
        """Asks the kernel to end those whose silence keeps more of the slab than may wait; their exit frees it."""
        frozen = self._store.writes.quarantine.frozen(now_s)
        self._store.counters["writers_frozen"] = len(frozen)
        for pid in sorted({pid for name in frozen if (pid := self._roster.pid_of(name)) is not None}):
            watch = self._watches.get(pid)
            if watch is None or pid in self._told_frozen:
                continue
            self._told_frozen.add(pid)
            names = ", ".join(sorted(name for name in frozen if self._roster.pid_of(name) == pid))
            _log.error(
                "%s keeps slots of ended sessions, neither reporting nor exiting, and more than %.0f%% of the slab waits: %s",
                names,
                limits.QUARANTINE_SHARE_MAX * 100,
                "it is ended" if self._end_frozen_writers else "end it, nothing is saved until then",
            )
            if self._end_frozen_writers:
                watch.kill()
                self._store.counters["writers_ended"] += 1

    def close(self) -> None:
        """Gives all watches back."""
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()

    async def _await_exit(self, watch: Watch) -> None:
        with contextlib.suppress(ConnectionError):
            await watch.wait_exited()
        if watch.exited:
            self._gone(watch)

    def _gone(self, watch: Watch) -> None:
        if self._watches.get(watch.pid) is not watch:
            return
        del self._watches[watch.pid]
        self._told_frozen.discard(watch.pid)
        for member in self._roster.exited(watch.pid):
            self._store.process_gone(member)
            if member.schedules:
                self._store.writer_gone(member.life)
        watch.close()
