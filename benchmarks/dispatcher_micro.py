"""What the dispatcher itself costs: engines in processes of their own that answer each dispatch at once, no model, no HTTP.

    python benchmarks/dispatcher_micro.py [--engines 2] [--requests 5000] [--prompt 512]

Prints requests per second with many in flight, the latency of one request at a time, and for comparison that of a bare
question and answer over the same kind of channel: the difference is what the dispatcher adds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests" / "fleet"
sys.path.append(str(TESTS))

from scripted_engine import read  # noqa: E402

from interlock.fleet.client import FleetClient  # noqa: E402
from interlock.fleet.coordinator import Coordinator, CoordinatorConfig  # noqa: E402
from interlock.fleet.dispatcher import Dispatcher  # noqa: E402
from interlock.fleet.ledger import GenerationRequest  # noqa: E402
from interlock.host.real import RealHost  # noqa: E402
from interlock.wire.channel import connect_channel  # noqa: E402
from interlock.wire.engine_messages import Sampling  # noqa: E402
from interlock.wire.fleet_messages import GetStatus, Membership  # noqa: E402
from interlock.wire.identity import load_identity, passing_identity  # noqa: E402


async def measure(engines: int, requests: int, prompt: int, home: Path) -> None:
    host = RealHost()
    address = f"unix:{home}/coordinator.sock"
    state = home / "coordinator"
    host.files.make_private_dir(state)
    config = CoordinatorConfig(address=address, state_dir=state, recovering_s=0.2)
    coordinator = Coordinator(host, load_identity(host, state, "coordinator"), config)
    await coordinator.start()
    running = asyncio.create_task(coordinator.run())
    children = []
    for n in range(engines):
        host.files.make_private_dir(home / f"e{n}")
        argv = [
            sys.executable,
            str(TESTS / "scripted_engine.py"),
            f"{home}/e{n}",
            f"e{n}",
            address,
            "instant",
        ]
        children.append(await host.spawn(argv, env=dict(os.environ), log=None))
    try:
        async with Dispatcher(host, passing_identity(host, "front"), address) as dispatcher:
            await until_ready(dispatcher, engines)
            await report(host, address, dispatcher, requests, [7] * prompt)
            dispatcher.check_integrity()
            print(f"engines' shares: {dict(dispatcher.counters)}")
    finally:
        for child in children:
            await child.end_tree(5.0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await coordinator.close()


async def until_ready(dispatcher: Dispatcher, engines: int) -> None:
    async with asyncio.timeout(30):
        while True:
            view = dispatcher.membership
            up = [m for m in view.members if m.state == "RUNNING"] if view else []
            if len(up) == engines and all(link.up for link in dispatcher._links.values()):
                return
            await asyncio.sleep(0.02)


async def report(
    host: RealHost, address: str, dispatcher: Dispatcher, requests: int, prompt: list[int]
) -> None:
    count = 0

    async def one() -> float:
        nonlocal count
        count += 1
        begun = time.perf_counter()
        ask = GenerationRequest(id=f"r{count}", prompt=prompt, sampling=Sampling(max_tokens=1))
        await read(dispatcher.submit(ask))
        return time.perf_counter() - begun

    async def worker(share: int) -> None:
        for _ in range(share):
            await one()

    alone = [await one() for _ in range(500)]
    bare = await bare_answers(host, address, 500)
    print(f"one at a time: p50 {ms(alone):.3f} ms; a bare answer over a channel: p50 {ms(bare):.3f} ms")
    for lanes in (32, 512):
        begun, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(worker(requests // lanes) for _ in range(lanes)))
        wall, spent, done = time.perf_counter() - begun, time.process_time() - cpu, requests // lanes * lanes
        print(
            f"{lanes:4d} in flight: {done / wall:7.0f} requests/s, {1e6 * spent / done:5.0f} µs of this process's CPU each"
        )


def ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


async def bare_answers(host: RealHost, address: str, count: int) -> list[float]:
    """A question to the coordinator, which sits in this very process: two trips through a socket and a loop."""
    await FleetClient(host, address).status()
    me = passing_identity(host, "probe")
    channel = await connect_channel(host, address, me=me, role="admin", accept=Membership, deadline_s=5.0)
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        await channel.request(GetStatus(), 5.0)
        times.append(time.perf_counter() - begun)
    await channel.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--uvloop", action="store_true", help="as the front runs it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        work = measure(asked.engines, asked.requests, asked.prompt, Path(home))
        if asked.uvloop:
            import uvloop

            uvloop.run(work)
        else:
            asyncio.run(work)


if __name__ == "__main__":
    main()
