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
from typing import Concatenate, ParamSpec, TypeVar

from interlock.core.errors import LocalProtocolError
from interlock.fleet.blocking_pausing import BlockingPause
from interlock.fleet.client import FleetClient
from interlock.fleet.pausing import Paused
from interlock.host.base import Host
from interlock.wire.fleet_messages import Command
from interlock.wire.identity import Identity

P = ParamSpec("P")
T = TypeVar("T")


def _waits(
    method: Callable[Concatenate[FleetClient, P], Awaitable[T]],
) -> Callable[Concatenate[BlockingFleetClient, P], T]:
    """The method of that name and signature that waits for it in the calling thread."""

    @functools.wraps(method)
    def waiting(self: BlockingFleetClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(lambda: method(self._client, *args, **kwargs))

    return waiting


def _waits_for_each(
    method: Callable[Concatenate[FleetClient, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[BlockingFleetClient, P], Iterator[T]]:
    """The same for one that tells word by word: it waits in `next`."""

    @functools.wraps(method)
    def waiting(self: BlockingFleetClient, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._iterate(lambda: method(self._client, *args, **kwargs))

    return waiting


def _holds(
    method: Callable[Concatenate[FleetClient, P], Paused],
) -> Callable[Concatenate[BlockingFleetClient, P], contextlib.AbstractContextManager[BlockingPause]]:
    """The same for a block: `with` instead of `async with`."""

    @functools.wraps(method)
    def holding(
        self: BlockingFleetClient, /, *args: P.args, **kwargs: P.kwargs
    ) -> contextlib.AbstractContextManager[BlockingPause]:
        return self._hold(method(self._client, *args, **kwargs))

    return holding


class BlockingFleetClient:
    """`FleetClient`, method by method, waiting in the calling thread. Raises what that raises.

    Raises `LocalProtocolError` where the calling thread runs an event loop: `FleetClient` is for there.
    """

    def __init__(self, host: Host, address: str, identity: Identity | None = None) -> None:
        self._client = FleetClient(host, address, identity)

    status = _waits(FleetClient.status)
    command = _waits(FleetClient.command)
    metrics = _waits(FleetClient.metrics)
    events = _waits(FleetClient.events)
    follow_events = _waits_for_each(FleetClient.follow_events)
    member_gone = _waits(FleetClient.member_gone)

    pause = _waits(FleetClient.pause)
    unpause = _waits(FleetClient.unpause)
    update_weights = _waits(FleetClient.update_weights)
    suspend = _waits(FleetClient.suspend)
    resume = _waits(FleetClient.resume)
    drain = _waits(FleetClient.drain)
    start = _waits(FleetClient.start)
    stop = _waits(FleetClient.stop)

    run = _waits(FleetClient.run)
    follow = _waits_for_each(FleetClient.follow)

    paused = _holds(FleetClient.paused)

    def order(self, command: str, owner: str, timeout_s: float, **more: object) -> Command:
        """See `FleetClient.order`."""
        return self._client.order(command, owner, timeout_s, **more)

    @contextlib.contextmanager
    def _hold(self, block: Paused) -> Iterator[BlockingPause]:
        pause = self._run(block.__aenter__)
        try:
            yield BlockingPause(pause, self._run)
        except BaseException as error:
            self._run(functools.partial(block.__aexit__, type(error), error, error.__traceback__))
            raise
        self._run(functools.partial(block.__aexit__, None, None, None))

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
