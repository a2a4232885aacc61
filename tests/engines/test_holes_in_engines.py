"""What ends or holds up one of Megatron's engines in silence, ours tells or does not feel (docs/protocols/holes.md)."""

from __future__ import annotations

import ast
import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_rig import WAIT_SECONDS

from interlock.core.targets import Mode
from interlock.engines.runner import STATUS_FAILED
from interlock.wire.engine_messages import Cursor, Resume
from interlock.wire.identity import Identity

TESTS = Path(__file__).parent
ENGINES = TESTS.parents[1] / "src" / "interlock" / "engines"
P = [3, 1, 4]
EXITS = f"""
import asyncio, sys
sys.path.append({str(TESTS)!r})
from pathlib import Path
from hand_engine import HandEngine
from interlock.engines.runner import Runner, RunnerConfig
from interlock.host.real import RealHost

class Exiting(HandEngine):
    async def pause(self, mode):
        sys.exit("a library took it upon itself")

async def main(directory, coordinator):
    config = RunnerConfig(name="engine-9", address=f"unix:{{directory}}/nine.sock", coordinator=coordinator,
        state_dir=Path(directory) / "nine", version="0")
    return await Runner(RealHost(), Exiting(), config).run()

sys.exit(asyncio.run(main(*sys.argv[1:])))
"""


async def test_a_front_that_dies_with_requests_in_flight_costs_nobody_else_anything(rig: Any) -> None:
    """Hole 1: one client that died with a request in flight ended the service for all."""
    await rig.running()
    dying, front = await rig.front("dying"), await rig.front("front")
    for n in range(5):
        await dying.dispatch(f"d{n}", P, 50)
    await front.dispatch("a", P, 4)
    await rig.engine.until_works(6)
    await rig.engine.step(2)
    await dying.close()
    await rig.engine.step(2)
    assert (await front.until_finish("a")).finish == "length"
    await front.acknowledge("a")
    await rig.coordinator.tell(2, "PAUSED")
    assert (await rig.coordinator.until_standing(2)).state == "PAUSED"
    back = await rig.front("dying", wanted=[Cursor("d0", 1, 0)])
    assert len(await back.until_count("d0", 4)) == 4, "its own next connection finds what was made meanwhile"


async def test_a_library_that_exits_the_process_is_seen_from_outside(rig: Any) -> None:
    """Hole 17: SystemExit in the loop's thread ended the thread, and the process lived on and answered nothing."""
    await rig.running()
    argv = [sys.executable, "-c", EXITS, str(rig.directory), rig.coordinator_address]
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    try:
        await rig.coordinator.until(
            lambda _: any("nine.sock" in r.facts.address for r in rig.coordinator.reports)
        )
        await rig.coordinator.tell(2, "PAUSED")
        async with asyncio.timeout(WAIT_SECONDS):
            _, words = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1
    assert b"a library took it upon itself" in words


async def test_a_step_that_is_cancelled_below_ends_the_member_and_not_its_answer(rig: Any) -> None:
    """Hole 17's quieter sister: an inner task is cancelled, and nobody is left who would say that the pause is over."""
    await rig.running()

    async def pause(mode: Mode) -> None:
        inner = asyncio.ensure_future(asyncio.sleep(60.0))
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    rig.engine.pause = pause
    await rig.coordinator.tell(2, "PAUSED")
    async with asyncio.timeout(WAIT_SECONDS):
        assert await asyncio.shield(rig.life) == STATUS_FAILED


async def test_a_stricter_pause_that_replaces_one_under_way_is_no_such_end(rig: Any) -> None:
    await rig.running()
    rig.engine.finish_pause.clear()
    await rig.coordinator.tell(2, "PAUSED", "wait")
    await rig.coordinator.until(lambda report: report.state == "PAUSING")
    await rig.coordinator.tell(3, "PAUSED", "keep")
    await rig.coordinator.until(lambda report: report.epoch.number == 3)
    rig.engine.finish_pause.set()
    await rig.coordinator.until_standing(3)
    assert not rig.life.done()


async def test_a_front_that_reads_nothing_holds_up_neither_a_pause_nor_another_front(rig: Any) -> None:
    """Hole 19: control and data in one queue; a full pipe to one peer blocked all."""
    await rig.running()
    front = await rig.front()
    stuck = await rig.front("stuck")
    stuck.task.cancel()  # it reads no more
    for n in range(200):
        await stuck.dispatch(f"s{n}", P, 400)
    await front.dispatch("a", P, 50)
    await rig.engine.until_works(201)
    await rig.engine.step(20)
    assert len(await front.until_count("a", 20)) >= 20
    await rig.coordinator.tell(2, "PAUSED")
    report = await rig.coordinator.until_standing(2)
    assert report.state == "PAUSED"


async def test_a_pause_overtakes_a_queue_of_dispatches(rig: Any) -> None:
    """Hole 19: a PAUSE waited behind the submits that were queued before it."""
    await rig.running()
    front = await rig.front()
    for n in range(2000):
        await front.dispatch(f"r{n}", P, 5)
    await rig.coordinator.tell(2, "PAUSED")
    await rig.coordinator.until_standing(2)
    await front.until(lambda: len(rig.engine.works) + len(front.refusals) == 2000)
    assert all(refused.code in ("stale_epoch", "not_running") for refused in front.refusals)
    await rig.engine.step(3)
    assert not front.frames, "it stands, whatever came before"


async def test_a_second_life_under_one_name_ends_the_first_and_inherits_nothing(rig: Any) -> None:
    """Hole 18: two of one identity: the second was dropped in silence, or kept the ghost of the first."""
    await rig.running()
    first = await rig.front(incarnation=1)
    await first.dispatch("a", P, 5)
    await rig.engine.until_works(1)
    second = await rig.front(incarnation=2)
    await second.channel.send(Resume([]))
    async with asyncio.timeout(WAIT_SECONDS):
        while not rig.engine.left:
            await asyncio.sleep(0.005)
    assert rig.runner.desk.requests == 0
    assert second.channel.peer == Identity(rig.runner._member._me.name, rig.runner._member._me.incarnation)


@pytest.mark.parametrize("call", ["pause_generation", "reset_prefix_cache"])
def test_vllm_is_never_told_to_wipe_what_others_share(call: str) -> None:
    """hazards §2.5: by default a pause clears the cache, and with it the connector's, which is the fleet's."""
    argument = {"pause_generation": "clear_cache", "reset_prefix_cache": "reset_connector"}[call]
    seen = 0
    for path in ENGINES.glob("vllm*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == call:
                seen += 1
                said = {word.arg: word.value for word in node.keywords}
                value = said.get(argument)
                assert isinstance(value, ast.Constant), f"{path.name}:{node.lineno}"
                assert value.value is False, f"{path.name}:{node.lineno}"
    assert seen
