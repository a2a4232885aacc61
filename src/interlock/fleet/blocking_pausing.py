"""The synchronous twin of `Pause`: what a block of `BlockingFleetClient.paused` is given."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from interlock.core.limits import COMMAND_SECONDS_DEFAULT
from interlock.fleet.client import OnProgress
from interlock.fleet.pausing import Pause, Weights
from interlock.wire.fleet_messages import CommandProgress, MemberProgress

P = ParamSpec("P")
T = TypeVar("T")


def _waits(
    method: Callable[Concatenate[Pause, P], Awaitable[T]],
) -> Callable[Concatenate[BlockingPause, P], T]:
    """The method of that name and signature that waits for it in the calling thread."""

    @functools.wraps(method)
    def waiting(self: BlockingPause, /, *args: P.args, **kwargs: P.kwargs) -> T:
        found: T = self._run(lambda: method(self._pause, *args, **kwargs))
        return found

    return waiting


class BlockingPause:
    """`Pause`, waiting in the calling thread."""

    def __init__(self, pause: Pause, run: Callable[[Callable[[], Awaitable[Any]]], Any]) -> None:
        self._pause, self._run = pause, run
        self.owner, self.progress = pause.owner, pause.progress

    @property
    def ok(self) -> bool:
        """Whether every member came to stand."""
        return self.progress.ok

    @property
    def members(self) -> list[MemberProgress]:
        """How each member came to stand."""
        return self.progress.members

    held = _waits(Pause.held)
    suspend = _waits(Pause.suspend)
    resume = _waits(Pause.resume)

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
