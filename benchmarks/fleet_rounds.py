"""How many messages and rounds a pause of many ranks takes: the real coordinator and members on the simulated host.

Every message takes `ONE_WAY_SECONDS`, computing takes none, so the time from the command's acceptance to its end, divided by
that, counts the rounds of messages that follow each other. Used by `fleet.py`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from fleet_engine import BenchEngine

from interlock.engines.member import Member
from interlock.fleet.client import FleetClient
from interlock.fleet.coordinator_main import CoordinatorConfig, run_coordinator
from interlock.telemetry.events import EventLog
from interlock.testing.sim.host import SimHost, simulated_os
from interlock.testing.sim.kernel import Kernel
from interlock.testing.sim.loop import SimLoop
from interlock.testing.sim.network import Network, SimStream
from interlock.wire.conversation import Conversation
from interlock.wire.fleet_messages import EngineFacts
from interlock.wire.identity import load_identity

ONE_WAY_SECONDS = 0.001
COORDINATOR = "unix:/run/coordinator.sock"
STATES = Path("/var/lib/interlock")


class Rounds(msgspec.Struct):
    """Of one pause. `rounds` one after the other; `messages` by name, the client's own among them."""

    ranks: int
    rounds: float
    messages: dict[str, int]


class SteadyNetwork(Network):
    """Every message takes as long as any other."""

    def delay_s(self, ends: tuple[str, str]) -> float:
        return ONE_WAY_SECONDS

    async def connect(self, process: Any, address: str) -> SimStream:
        stream = await super().connect(process, address)
        stream.out.factor = stream.other.out.factor = 1.0
        return stream


@contextmanager
def counted(messages: Counter[str]) -> Iterator[None]:
    """What is said on any channel meanwhile, by name."""
    say: Callable[..., tuple[int, bytes]] = Conversation.say

    def counting(self: Conversation, body: msgspec.Struct, *more: Any) -> tuple[int, bytes]:
        messages[type(body).__name__] += 1
        return say(self, body, *more)

    Conversation.say = counting  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Conversation.say = say  # type: ignore[method-assign]


def pause_of(ranks: int, seed: int = 1) -> Rounds:
    """One pause of so many idle ranks, from RUNNING."""
    loop = SimLoop(random.Random(seed), shuffle=False)
    kernel = Kernel(loop, random.Random(seed))
    kernel.network = SteadyNetwork(kernel)
    log: list[EventLog] = []

    async def coordinator(host: SimHost) -> int:
        log.append(EventLog(host.clock))
        config = CoordinatorConfig(address=COORDINATOR, state_dir=STATES / "coordinator", recovering_s=1.0)
        await run_coordinator(host, config, events=log[0])
        return 0

    async def member(host: SimHost) -> int:
        name = host.process.name
        host.files.make_private_dir(STATES / name)
        me = load_identity(host, STATES / name, name)
        facts = EngineFacts(f"unix:/run/{name}.sock", "m", 8192, "bench")
        ended = asyncio.Event()
        leave: Callable[[str, bool], None] = lambda *_: ended.set()  # noqa: E731
        joined = Member(host, me, BenchEngine(0.0), coordinator=COORDINATOR, facts=facts, leave=leave)
        joined.begin("0")
        await ended.wait()
        return 1

    found: list[Counter[str]] = []

    async def trainer(host: SimHost) -> int:
        client = FleetClient(host, COORDINATOR)
        while True:
            await asyncio.sleep(0.5)
            try:
                members = (await client.status()).members
            except Exception:  # it is starting
                continue
            if sum(one.state == "RUNNING" for one in members) == ranks:
                break
        messages: Counter[str] = Counter()
        with counted(messages):
            await client.pause(owner="bench")
        found.append(messages)
        return 0

    async def play() -> None:
        over = asyncio.Event()
        kernel.start("host", "coordinator", coordinator, lambda _: None)
        for number in range(ranks):
            kernel.start("host", f"engine-{number}", member, lambda _: None)
        kernel.start("host", "trainer", trainer, lambda _: over.set())
        await over.wait()

    loop.set_exception_handler(lambda *_: None)
    with simulated_os(kernel):
        loop.run_until_complete(play())
        logging.disable()  # what buried processes would still have to say
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel.bury()
            gc.collect()
        logging.disable(logging.NOTSET)
    loop.close()
    assert found, kernel.lines[-5:]
    at = {event.name: event.at_s for event in log[0].since(0) if event.name in ("command", "command_done")}
    for idle in ("Hello", "Welcome", "Ping", "Pong"):
        found[0].pop(idle, None)
    return Rounds(ranks, (at["command_done"] - at["command"]) / ONE_WAY_SECONDS, dict(found[0]))


if __name__ == "__main__":
    print(pause_of(64))
