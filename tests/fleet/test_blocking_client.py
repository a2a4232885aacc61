"""The synchronous twin says and raises what the asynchronous client does, in a thread without a loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import pytest

from interlock.core.errors import ChannelFault, LocalProtocolError
from interlock.fleet.blocking_client import BlockingFleetClient
from interlock.fleet.blocking_pausing import BlockingPause
from interlock.fleet.client import FleetClient
from interlock.fleet.pausing import Pause
from interlock.wire.fleet_messages import CommandProgress

if TYPE_CHECKING:
    from conftest import Fleet

T = TypeVar("T")


async def in_thread(fleet: Fleet, work: Callable[[BlockingFleetClient], T]) -> T:
    return await asyncio.to_thread(work, BlockingFleetClient(fleet.host, fleet.address))


@pytest.mark.parametrize(("twin", "original"), [(BlockingFleetClient, FleetClient), (BlockingPause, Pause)])
def test_the_twin_has_every_public_name_with_the_same_parameters(twin: type, original: type) -> None:
    names = {name for name, _ in inspect.getmembers(original) if not name.startswith("_")}
    assert names <= set(dir(twin)) | {"owner", "progress"}
    for name in names:
        ours, theirs = getattr(twin, name, None), getattr(original, name)
        if inspect.isfunction(theirs):
            assert ours is not None
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), (
                name
            )


async def test_a_block_holds_updates_and_releases(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    engine = await fleet.engine("a", abilities=("updates", "suspends"))
    await fleet.start_dispatcher()
    await fleet.ready("a")
    heard: list[CommandProgress] = []

    def work(client: BlockingFleetClient) -> str:
        with client.paused(on_progress=heard.append) as pause:
            assert pause.ok
            assert pause.held()
            pause.suspend()
            pause.resume()
            pause.update_weights("v1", lambda: "/weights/v1")
            return client.status().members[0].state

    assert await in_thread(fleet, work) == "PAUSED"
    assert heard[-1].ok
    assert (engine.member.state, engine.member.version) == ("RUNNING", "v1")


async def test_a_block_that_raises_is_released_and_raises_that(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    engine = await fleet.engine("a")
    await fleet.start_dispatcher()
    await fleet.ready("a")

    def work(client: BlockingFleetClient) -> None:
        with client.paused():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await in_thread(fleet, work)
    assert engine.member.state == "RUNNING"


async def test_commands_progress_events_and_questions(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    await fleet.engine("a")
    await fleet.start_dispatcher()
    await fleet.ready("a")

    def work(client: BlockingFleetClient) -> None:
        order = client.order("PAUSE", "t", 10.0)
        words = list(client.follow(order))
        assert words[-1].ok
        assert client.command(order.command_id).progress.ok
        with pytest.raises(ChannelFault, match="the command is UNPAUSE"):
            client.resume(owner="t")
        assert client.unpause(owner="t").ok
        told = client.events()
        followed = client.follow_events(0, told.ring)
        assert next(followed).events == told.events
        followed.close()  # type: ignore[attr-defined]
        assert "interlock_coordinator_members" in client.metrics()

    await in_thread(fleet, work)


async def test_it_refuses_to_stop_an_event_loop(fleet: Fleet) -> None:
    with pytest.raises(LocalProtocolError, match="await FleetClient"):
        BlockingFleetClient(fleet.host, fleet.address).status()
