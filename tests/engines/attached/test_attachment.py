"""An attached server walks with the fleet, over lost connections, restarts and users who go past us.

The coordinator, the member, the HTTP client are real; the server stands in for vLLM (`stand_in_vllm`), which the tests of
`test_attached_vllm.py` are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from stand_in_vllm import StandInVllm

import interlock
from interlock.core.errors import ChannelFault
from interlock.engines.attached.attach import Attachment
from interlock.engines.base import EngineStartError
from interlock.fleet.client import CommandFailed, FleetClient
from interlock.fleet.coordinator import Coordinator, CoordinatorConfig
from interlock.host.real import RealHost
from interlock.wire.fleet_messages import Member
from interlock.wire.identity import load_identity

WAIT_SECONDS = 15.0


class Ground:
    """A coordinator of its own, and what was attached to it."""

    def __init__(self, folder: Path) -> None:
        self.host = RealHost()
        self.address = f"unix:{folder}/coordinator.sock"
        self.client = FleetClient(self.host, self.address)
        state = folder / "state"
        self.host.files.make_private_dir(state)
        config = CoordinatorConfig(address=self.address, state_dir=state, recovering_s=0.1)
        self.coordinator = Coordinator(self.host, load_identity(self.host, state, "coordinator"), config)
        self.stack = contextlib.AsyncExitStack()

    async def attach(self, server: StandInVllm, **more: object) -> Attachment:
        attached = await interlock.attach(server.url, coordinator=self.address, name="policy", **more)  # type: ignore[arg-type]
        await self.stack.enter_async_context(attached)
        await attached.joined(WAIT_SECONDS)
        return attached

    async def member(self) -> Member:
        (member,) = (await self.client.status()).members
        return member

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    ground = Ground(tmp_path)
    await ground.coordinator.start()
    running = asyncio.create_task(ground.coordinator.run())
    await ground.until(lambda: ground.coordinator.fleet.phase == "LEADING")
    try:
        yield ground
    finally:
        await ground.stack.aclose()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await ground.coordinator.close()


@pytest.fixture
async def server() -> AsyncIterator[StandInVllm]:
    async with StandInVllm() as server:
        yield server


async def test_it_is_a_member_that_says_by_name_what_it_lacks_and_gets_no_work(
    ground: Ground, server: StandInVllm
) -> None:
    attached = await ground.attach(server)
    member = await ground.member()
    assert (member.name, member.state, member.version) == ("policy", "RUNNING", "0")
    assert member.facts.address == "", "no front sends it anything"
    assert {f"without_{name}" for name in attached.lacks} <= set(member.facts.capabilities)
    assert {"without_exit_proof", "without_token_ledger", "without_epoch_fence"} <= set(
        member.facts.capabilities
    )
    assert "updates" in member.facts.capabilities
    assert "suspends" not in member.facts.capabilities
    await ground.until(lambda: attached._engine is not None and attached._engine.load().running == 2)


async def test_pause_and_unpause_keep_its_caches(ground: Ground, server: StandInVllm) -> None:
    attached = await ground.attach(server)
    async with ground.client.paused(mode="keep"):
        assert server.paused
        assert attached.state == "PAUSED"
    assert not server.paused
    assert {given["clear_cache"] for given in server.named("/pause")} == {"false"}
    assert server.named("/pause")[-1]["mode"] == "keep"


async def test_an_update_drops_every_cached_block_before_it_is_done(
    ground: Ground, server: StandInVllm
) -> None:
    attached = await ground.attach(server)
    server.calls.clear()
    server.holding_blocks = 2
    async with ground.client.paused() as pause:
        await pause.update_weights("v1", "/weights/v1")
        assert (server.weights, server.label, server.cached) == ("/weights/v1", "v1", False)
    assert attached.version == "v1"
    order = [path for path, _ in server.calls]
    assert order.index("/collective_rpc") < order.index("/reset_prefix_cache") < order.index("/resume")
    assert server.named("/reset_prefix_cache")[-1] == {
        "reset_running_requests": "true",
        "reset_external": "true",
    }


async def test_an_update_that_fails_leaves_no_version_and_nothing_runs(
    ground: Ground, server: StandInVllm
) -> None:
    attached = await ground.attach(server)
    server.fail_reload = "no such file"
    await ground.client.pause(owner="t")
    with pytest.raises(CommandFailed, match="policy failed on the way"):
        await ground.client.update_weights("v1", "/weights/v1", owner="t")
    assert attached.version is None
    assert server.paused
    with pytest.raises(ChannelFault, match="the weights are unknown"):
        await ground.client.unpause(owner="t")
    server.fail_reload = ""
    await ground.client.update_weights("v1", "/weights/v1", owner="t")
    await ground.client.unpause(owner="t")
    assert not server.paused


async def test_who_resumes_it_past_us_is_seen_and_it_is_paused_again(
    ground: Ground, server: StandInVllm
) -> None:
    attached = await ground.attach(server)
    async with ground.client.paused():
        server.paused = False
        await ground.until(lambda: server.paused)
        assert attached.drifts == 1
    assert not server.paused


async def test_a_server_that_was_started_anew_joins_anew_with_the_fleets_weights(
    ground: Ground, server: StandInVllm
) -> None:
    await ground.attach(server)
    async with ground.client.paused() as pause:
        await pause.update_weights("v1", "/weights/v1")
    before = await ground.member()
    await server.stop(forget=True)
    assert (server.label, server.weights) == ("default", "")
    await server.start()
    await ground.until(lambda: server.label == "v1" and not server.paused)
    after = await ground.member()
    assert after.incarnation > before.incarnation
    assert server.weights == "/weights/v1"


async def test_a_connection_that_is_lost_for_a_moment_changes_nothing(
    ground: Ground, server: StandInVllm
) -> None:
    await ground.attach(server)
    before = await ground.member()
    await server.stop()
    pausing = asyncio.create_task(ground.client.pause(owner="t", timeout_s=WAIT_SECONDS))
    await asyncio.sleep(0.1)
    assert not pausing.done(), "it cannot be seen to stand"
    await server.start()
    progress = await pausing
    assert [member.outcome for member in progress.members] == ["standing"]
    assert (await ground.member()).incarnation == before.incarnation
    await ground.client.unpause(owner="t")


async def test_a_detached_engine_is_waited_for_by_nobody(ground: Ground, server: StandInVllm) -> None:
    attached = await ground.attach(server)
    await ground.client.pause(owner="t")
    await attached.detach()
    assert (await ground.member()).state == "LOST"
    assert server.paused, "it stays as it is"


async def test_stop_leaves_it_paused_and_ends_the_attachment(ground: Ground, server: StandInVllm) -> None:
    attached = await ground.attach(server)
    await ground.client.stop(owner="t", composite=True)
    assert await asyncio.wait_for(attached.ended(), WAIT_SECONDS)
    assert server.paused
    assert attached.state == "STOPPED"


async def test_a_late_joiner_behind_in_weights_is_updated_before_it_runs(
    ground: Ground, server: StandInVllm
) -> None:
    await ground.attach(server)
    async with ground.client.paused() as pause:
        await pause.update_weights("v1", "/weights/v1")
    async with StandInVllm() as late:
        other = await interlock.attach(late.url, coordinator=ground.address, name="late")
        async with other:
            await other.joined(WAIT_SECONDS)
            assert (late.weights, late.label, late.paused) == ("/weights/v1", "v1", False)


async def test_what_cannot_be_attached_says_what_to_do(ground: Ground) -> None:
    async with StandInVllm(development=False) as plain:
        with pytest.raises(EngineStartError, match="VLLM_SERVER_DEV_MODE=1"):
            await interlock.attach(plain.url, coordinator=ground.address)
    with pytest.raises(
        EngineStartError, match=r"^the vLLM server at \S+ cannot be attached: it does not answer: "
    ):
        await interlock.attach(plain.url, coordinator=ground.address)
    with pytest.raises(ValueError, match="no URL of a server"):
        await interlock.attach("localhost", coordinator=ground.address)
    with pytest.raises(TypeError, match="give a vLLM AsyncLLM"):
        await interlock.attach(object(), coordinator=ground.address)
    with pytest.raises(ValueError, match="names no fleet"):
        await interlock.attach(plain.url, coordinator="fleet-of-mine")
    assert (await ground.client.status()).members == []


async def test_kv_cannot_be_kept_and_the_refusal_changes_nothing(ground: Ground, server: StandInVllm) -> None:
    attached = await ground.attach(server)
    await ground.client.pause(owner="t")
    with pytest.raises(CommandFailed, match="policy failed on the way"):
        await ground.client.update_weights("v1", "/weights/v1", owner="t", kv="keep")
    assert attached.version == "0"
    assert server.weights == ""
    await ground.client.update_weights("v1", "/weights/v1", owner="t")


async def test_a_pause_that_waits_is_overtaken_by_a_stricter_one(ground: Ground, server: StandInVllm) -> None:
    await ground.attach(server)
    server.let_pause.clear()
    waiting = asyncio.create_task(ground.client.pause("wait", owner="patient"))
    await ground.until(lambda: len(server.named("/pause")) == 2)
    strict = asyncio.create_task(ground.client.pause("abort", owner="strict"))
    await ground.until(lambda: server.named("/pause")[-1]["mode"] == "abort")
    server.let_pause.set()
    await strict
    with contextlib.suppress(CommandFailed):
        await waiting
    assert server.paused


async def test_a_trainers_own_way_of_giving_weights_is_called_while_it_stands(
    ground: Ground, server: StandInVllm
) -> None:
    given: list[tuple[Path, str, bool]] = []

    async def update(path: Path, version: str) -> None:
        given.append((path, version, server.paused))

    await ground.attach(server, update=update)
    async with ground.client.paused() as pause:
        await pause.update_weights("v1", "/weights/v1")
    assert given == [(Path("/weights/v1"), "v1", True)]
    assert server.named("/collective_rpc") == []
    assert server.named("/reset_prefix_cache")


async def test_of_two_attachments_by_one_name_the_newer_stays(ground: Ground, server: StandInVllm) -> None:
    older = await ground.attach(server)
    newer = await interlock.attach(server.url, coordinator=ground.address, name="policy")
    async with newer:
        assert "newer life" in await asyncio.wait_for(older.ended(), WAIT_SECONDS)
        await newer.joined(WAIT_SECONDS)
        assert (await ground.member()).state == "RUNNING"


async def test_a_member_that_was_forgotten_and_lives_comes_back_as_a_newer_life(
    ground: Ground, server: StandInVllm
) -> None:
    await ground.attach(server)
    before = await ground.member()
    await ground.client.member_gone("policy", before.incarnation)
    async with asyncio.timeout(WAIT_SECONDS):
        while (after := await ground.member()).state != "RUNNING":
            await asyncio.sleep(0.02)
    assert after.incarnation > before.incarnation
