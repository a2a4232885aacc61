"""The synchronous twin of `Pause`: what a block of `BlockingFleetClient.paused` is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from interlock.core.limits import COMMAND_SECONDS_DEFAULT
from interlock.fleet.client import OnProgress
from interlock.fleet.pausing import Pause, Weights
from interlock.wire.fleet_messages import CommandProgress, MemberProgress


class BlockingPause:
    """`Pause`, waiting in the calling thread."""

    def __init__(self, pause: Pause, run: Callable[[Callable[[], Awaitable[Any]]], Any]) -> None:
        self._pause, self._run = pause, run
        self.owner, self.progress = pause.owner, pause.progress

    @property
    def ok(self) -> bool:
        return self.progress.ok

    @property
    def members(self) -> list[MemberProgress]:
        return self.progress.members

    def held(self) -> bool:
        """See `Pause.held`."""
        held: bool = self._run(self._pause.held)
        return held

    def update_weights(
        self,
        version: str,
        weights: Weights,
        *,
        kv: str = "recompute",
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `Pause.update_weights`. A function among `weights` is called in this thread, outside any event loop."""
        where = weights() if callable(weights) else weights

        def ask() -> Awaitable[CommandProgress]:
            return self._pause.update_weights(
                version, lambda: where, kv=kv, timeout_s=timeout_s, on_progress=on_progress
            )

        progress: CommandProgress = self._run(ask)
        return progress

    def suspend(
        self, *, timeout_s: float = COMMAND_SECONDS_DEFAULT, on_progress: OnProgress | None = None
    ) -> CommandProgress:
        """See `Pause.suspend`."""
        progress: CommandProgress = self._run(
            lambda: self._pause.suspend(timeout_s=timeout_s, on_progress=on_progress)
        )
        return progress

    def resume(
        self, *, timeout_s: float = COMMAND_SECONDS_DEFAULT, on_progress: OnProgress | None = None
    ) -> CommandProgress:
        """See `Pause.resume`."""
        progress: CommandProgress = self._run(
            lambda: self._pause.resume(timeout_s=timeout_s, on_progress=on_progress)
        )
        return progress
