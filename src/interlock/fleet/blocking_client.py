"""The synchronous twin of `FleetClient`, for a trainer's plain thread: the same names, the same words, the same errors.

    fleet = BlockingFleetClient(address)
    with fleet.paused() as pause:
        pause.update_weights("v7", "/checkpoints/v7")

It is the same code: each call runs the asynchronous client on an event loop of its own, in the calling thread, for as long as
the call takes. So no thread of ours lives beside the trainer's, a fork between two calls is harmless, Ctrl-C ends a wait (and a
pause that was begun is released), and `on_progress` is called in the calling thread. Any number of threads may share one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import TypeVar

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import (
    COMMAND_SECONDS_DEFAULT,
    ENGINE_START_SECONDS_MAX,
    HELLO_SECONDS_MAX,
    RELEASE_SECONDS_DEFAULT,
)
from interlock.fleet.blocking_pausing import BlockingPause
from interlock.fleet.client import FleetClient, OnProgress
from interlock.host.base import Host
from interlock.wire.fleet_messages import (
    Command,
    CommandProgress,
    CommandReport,
    Events,
    Membership,
)
from interlock.wire.identity import Identity

T = TypeVar("T")


class BlockingFleetClient:
    """`FleetClient`, method by method, waiting in the calling thread. Raises what that raises.

    Raises `LocalProtocolError` where the calling thread runs an event loop: `FleetClient` is for there.
    """

    def __init__(self, host: Host, address: str, identity: Identity | None = None) -> None:
        self._client = FleetClient(host, address, identity)

    def status(self, timeout_s: float = HELLO_SECONDS_MAX) -> Membership:
        """See `FleetClient.status`."""
        return self._run(lambda: self._client.status(timeout_s))

    def command(
        self, command_id: str, *, owner: str = "", timeout_s: float = HELLO_SECONDS_MAX
    ) -> CommandReport:
        """See `FleetClient.command`."""
        return self._run(lambda: self._client.command(command_id, owner=owner, timeout_s=timeout_s))

    def metrics(self, timeout_s: float = HELLO_SECONDS_MAX) -> str:
        """See `FleetClient.metrics`."""
        return self._run(lambda: self._client.metrics(timeout_s))

    def events(
        self,
        after: int = 0,
        ring: str = "",
        *,
        wait_seconds: float = 0.0,
        timeout_s: float = HELLO_SECONDS_MAX,
    ) -> Events:
        """See `FleetClient.events`."""
        return self._run(
            lambda: self._client.events(after, ring, wait_seconds=wait_seconds, timeout_s=timeout_s)
        )

    def follow_events(self, after: int = 0, ring: str = "") -> Iterator[Events]:
        """See `FleetClient.follow_events`. It waits in `next`."""
        return self._iterate(lambda: self._client.follow_events(after, ring))

    def member_gone(self, name: str, incarnation: int, timeout_s: float = HELLO_SECONDS_MAX) -> None:
        """See `FleetClient.member_gone`."""
        self._run(lambda: self._client.member_gone(name, incarnation, timeout_s))

    def pause(
        self,
        mode: str = "keep",
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        hold_seconds: float | None = None,
        allow_unknown: bool = False,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.pause`."""
        return self._run(
            lambda: self._client.pause(
                mode,
                owner=owner,
                timeout_s=timeout_s,
                hold_seconds=hold_seconds,
                allow_unknown=allow_unknown,
                on_progress=on_progress,
            )
        )

    def unpause(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        break_hold_of: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.unpause`."""
        return self._run(
            lambda: self._client.unpause(
                owner=owner, timeout_s=timeout_s, break_hold_of=break_hold_of, on_progress=on_progress
            )
        )

    def update_weights(
        self,
        version: str,
        weights: str,
        *,
        owner: str,
        kv: str = "recompute",
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.update_weights`."""
        return self._run(
            lambda: self._client.update_weights(
                version, weights, owner=owner, kv=kv, timeout_s=timeout_s, on_progress=on_progress
            )
        )

    def suspend(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.suspend`."""
        return self._run(
            lambda: self._client.suspend(owner=owner, timeout_s=timeout_s, on_progress=on_progress)
        )

    def resume(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.resume`."""
        return self._run(
            lambda: self._client.resume(owner=owner, timeout_s=timeout_s, on_progress=on_progress)
        )

    def drain(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.drain`."""
        return self._run(
            lambda: self._client.drain(owner=owner, timeout_s=timeout_s, on_progress=on_progress)
        )

    def start(
        self,
        *,
        owner: str,
        timeout_s: float = ENGINE_START_SECONDS_MAX,
        version: str | None = None,
        weights: str = "",
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.start`."""
        return self._run(
            lambda: self._client.start(
                owner=owner,
                timeout_s=timeout_s,
                version=version,
                weights=weights,
                on_progress=on_progress,
            )
        )

    def stop(
        self,
        *,
        owner: str,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        composite: bool = False,
        on_progress: OnProgress | None = None,
    ) -> CommandProgress:
        """See `FleetClient.stop`."""
        return self._run(
            lambda: self._client.stop(
                owner=owner, timeout_s=timeout_s, composite=composite, on_progress=on_progress
            )
        )

    @contextlib.contextmanager
    def paused(
        self,
        mode: str = "keep",
        *,
        owner: str | None = None,
        timeout_s: float = COMMAND_SECONDS_DEFAULT,
        hold_seconds: float | None = None,
        allow_unknown: bool = False,
        release_s: float = RELEASE_SECONDS_DEFAULT,
        on_progress: OnProgress | None = None,
    ) -> Iterator[BlockingPause]:
        """See `FleetClient.paused`."""
        block = self._client.paused(
            mode,
            owner=owner,
            timeout_s=timeout_s,
            hold_seconds=hold_seconds,
            allow_unknown=allow_unknown,
            release_s=release_s,
            on_progress=on_progress,
        )
        pause = self._run(block.__aenter__)
        try:
            yield BlockingPause(pause, self._run)
        except BaseException as error:
            self._run(functools.partial(block.__aexit__, type(error), error, error.__traceback__))
            raise
        self._run(functools.partial(block.__aexit__, None, None, None))

    def order(self, command: str, owner: str, timeout_s: float, **more: object) -> Command:
        """See `FleetClient.order`."""
        return self._client.order(command, owner, timeout_s, **more)

    def run(self, order: Command, on_progress: OnProgress | None = None) -> CommandProgress:
        """See `FleetClient.run`."""
        return self._run(lambda: self._client.run(order, on_progress))

    def follow(self, order: Command) -> Iterator[CommandProgress]:
        """See `FleetClient.follow`. It waits in `next`."""
        return self._iterate(lambda: self._client.follow(order))

    def _run(self, ask: Callable[[], Awaitable[T]]) -> T:
        _check_no_loop()

        async def once() -> T:
            return await ask()

        return asyncio.run(once())

    def _iterate(self, begin: Callable[[], AsyncGenerator[T, None]]) -> Iterator[T]:
        _check_no_loop()
        with asyncio.Runner() as runner:
            words = begin()

            async def following() -> tuple[T] | None:
                with contextlib.suppress(StopAsyncIteration):
                    return (await anext(words),)
                return None

            try:
                while (found := runner.run(following())) is not None:
                    yield found[0]
            finally:
                runner.run(words.aclose())


def _check_no_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise LocalProtocolError(
        "a blocking fleet client was called in a thread that runs an event loop, which would stand still meanwhile",
        hint="await FleetClient there",
    )
