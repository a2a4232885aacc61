"""The simulated machine itself: what its loop keeps in order, what its disk loses, what its processes leave behind."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from interlock.host.base import Stream
from interlock.testing.plugin import Simulation
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.kernel import KILLED, SimProcess
from interlock.testing.sim.loop import SimLoop, Wedged

pytest_plugins = ["interlock.testing.plugin"]


def ignore(_: SimProcess) -> None:
    """An exit that nobody acts on."""


def order_of(seed: int) -> list[str]:
    loop, seen = SimLoop(random.Random(seed)), []

    async def walk(name: str) -> None:
        for step in range(3):
            seen.append(f"{name}{step}")
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(walk(name) for name in "abc"))

    loop.run_until_complete(main())
    loop.close()
    return seen


def test_tasks_are_shuffled_and_the_steps_of_one_stay_in_order() -> None:
    orders = {tuple(order_of(seed)) for seed in range(20)}
    assert len(orders) > 5
    for order in orders:
        for name in "abc":
            assert [step for step in order if step[0] == name] == [f"{name}{n}" for n in range(3)]
    assert order_of(3) == order_of(3)


def test_callbacks_of_one_future_run_in_the_order_they_were_added() -> None:
    for seed in range(20):
        loop, seen = SimLoop(random.Random(seed)), []

        async def main(loop: SimLoop = loop, seen: list[int] = seen) -> None:
            future = loop.create_future()
            for number in range(5):
                future.add_done_callback(lambda _, number=number: seen.append(number))
            future.set_result(None)
            await asyncio.sleep(1.0)

        loop.run_until_complete(main())
        loop.close()
        assert seen == list(range(5))


def test_time_passes_only_when_nothing_is_left_to_do_and_a_wait_for_nobody_is_a_fault() -> None:
    loop = SimLoop(random.Random(0))
    loop.run_until_complete(asyncio.sleep(3600.0))
    assert loop.time() == pytest.approx(3600.0)

    async def for_ever() -> None:
        await loop.create_future()

    with pytest.raises(Wedged, match="for ever"):
        loop.run_until_complete(for_ever())


def test_a_frozen_process_takes_no_step_and_a_dead_one_not_even_its_finally(simulation: Simulation) -> None:
    seen: list[str] = []

    async def main(host: SimHost) -> int:
        try:
            while True:
                await host.clock.sleep_s(1.0)
                seen.append(f"{simulation.loop.time():.0f}")
        finally:
            seen.append("finally")

    async def story() -> None:
        process = simulation.kernel.start("a", "p", main, ignore)
        await asyncio.sleep(2.5)
        process.freeze()
        await asyncio.sleep(3.0)
        assert seen == ["1", "2"]
        process.thaw()
        await asyncio.sleep(0.1)
        assert seen == ["1", "2", "6"]
        process.end(KILLED)
        await asyncio.sleep(5.0)
        assert seen == ["1", "2", "6"]

    simulation.run(story)


@pytest.mark.parametrize("simulation", range(20), indirect=True)
def test_a_power_cut_leaves_a_durable_file_old_or_new_and_never_half(simulation: Simulation) -> None:
    path = Path("/state/file")

    async def main(host: SimHost) -> int:
        host.files.make_private_dir(path.parent)
        host.files.write_durably(path, b"old" * 100)
        host.process.die_at_disk = ("open", "write", "fsync", "rename")[host.process.kernel.rng.randrange(4)]
        host.files.write_durably(path, b"new" * 200)
        raise AssertionError("it dies before")

    async def story() -> None:
        process = simulation.kernel.start("a", "p", main, ignore)
        await asyncio.sleep(1.0)
        assert process.dead
        process.machine.disk.power_cut()
        inode = process.machine.disk.names[str(path)]
        assert inode.now in (b"old" * 100, b"new" * 200)

    simulation.run(story)


def test_descriptors_pass_within_a_message_and_each_is_closed_once(simulation: Simulation) -> None:
    got: list[bytes] = []

    async def server(host: SimHost) -> int:
        async def serve(stream: Stream) -> None:
            await stream.receive_exactly(2)
            fd = stream.take_fds()[0]
            memory = host.map_memory(fd)
            got.append(bytes(memory.pages.data[:3]))
            with pytest.raises(OSError, match="does not have"):
                os.close(fd)

        await host.listen("unix:/s", serve)
        await asyncio.Event().wait()
        return 0

    async def client(host: SimHost) -> int:
        memory = host.create_memory("m", 4096)
        memory.view[:3] = b"abc"
        stream = await host.connect("unix:/s")
        await stream.send(b"hi", fds=(memory.fd,))
        await host.clock.sleep_s(1.0)
        memory.close()
        assert not host.process.fds
        return 0

    async def story() -> None:
        simulation.kernel.start("a", "server", server, ignore)
        await asyncio.sleep(0.1)
        ended = simulation.kernel.start("a", "client", client, ignore)
        await asyncio.sleep(5.0)
        assert ended.exit_status == 0

    simulation.run(story)
    assert got == [b"abc"]


def test_a_one_way_cut_holds_bytes_back_and_a_half_open_stream_is_told_on_one_side(
    simulation: Simulation,
) -> None:
    heard: list[str] = []

    async def server(host: SimHost) -> int:
        async def serve(stream: Stream) -> None:
            while True:
                heard.append((await stream.receive_exactly(1)).decode())

        await host.listen("unix:/s", serve)
        await asyncio.Event().wait()
        return 0

    streams: list[Stream] = []

    async def client(host: SimHost) -> int:
        streams.append(await host.connect("unix:/s"))
        for letter in "abc":
            await streams[0].send(letter.encode())
            await host.clock.sleep_s(1.0)
        await asyncio.Event().wait()
        return 0

    async def story() -> None:
        kernel = simulation.kernel
        kernel.start("a", "server", server, ignore)
        await asyncio.sleep(0.1)
        kernel.start("a", "client", client, ignore)
        await asyncio.sleep(0.6)
        kernel.network.cut("client", "server")
        await asyncio.sleep(5.0)
        assert heard == ["a"]
        kernel.network.heal("client", "server")
        await asyncio.sleep(1.0)
        assert heard == ["a", "b", "c"]
        assert kernel.network.break_connections("server", "client", told="one") == 1
        await streams[0].send(b"d")
        await asyncio.sleep(60.0)
        assert heard == ["a", "b", "c"]

    simulation.run(story)
