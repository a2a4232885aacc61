"""A whole fleet of the real classes on the simulated kernel, under a workload and a plan of faults from one seed.

Who runs: a coordinator, engines (the real runner over a scripted engine), fronts (the real dispatcher, with clients in their
process), a store node with simulated engines' schedulers and ranks, an administrator, and a launcher that starts again what dies
and tells the coordinator so. `run_world` plays one seed; what it saw that must not be is in the result, each a sentence.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import warnings
from collections.abc import Mapping, Sequence

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.engines.runner import Runner, RunnerConfig
from interlock.fleet.client import FleetClient
from interlock.fleet.coordinator_main import CoordinatorConfig, run_coordinator
from interlock.fleet.dispatcher import Dispatcher
from interlock.store.main import slab_number
from interlock.store.node import DiskConfig, Node
from interlock.telemetry.events import EventLog
from interlock.testing.sim import kv
from interlock.testing.sim.administrators import Administrator
from interlock.testing.sim.afflictions import STATES, Afflicted
from interlock.testing.sim.browsers import MODEL_NAME, Browser, address_of
from interlock.testing.sim.checks import channels_seen
from interlock.testing.sim.engine import SimEngine
from interlock.testing.sim.faults import Fault, Shape, processes_of
from interlock.testing.sim.host import SimHost, simulated_os
from interlock.testing.sim.http import serve_http
from interlock.testing.sim.kernel import Kernel, SimProcess
from interlock.testing.sim.kv_trees import KvTrees
from interlock.testing.sim.loop import SimLoop, Wedged
from interlock.testing.sim.people import Client, Launcher, Returner
from interlock.testing.sim.threads import blocking_seam
from interlock.testing.sim.tokens import FIRST, WEIGHTS
from interlock.testing.sim.vocabulary import text_model
from interlock.testing.sim.witnesses import EngineWatch, Noted, logged
from interlock.web.front import Access, Front
from interlock.wire.identity import load_identity

COORDINATOR = "unix:/run/coordinator.sock"
SERVES_AGAIN_SECONDS = 60.0
"""After the last fault everything is served again within so many simulated seconds."""
SETTLE_SECONDS = 12.0
"""Then sessions end, and nothing may be left over."""
JOIN_SECONDS = 4.0
LOOK_SECONDS = 0.5
LOOK_STEPS_MAX = 10_000
"""From one look to the next: five times what the busiest fleet of sixty took. More is somebody who talks without end."""
RESTART_SECONDS = (0.05, 1.5)


class Result(msgspec.Struct):
    """One run. No violation: it was well."""

    seed: int
    shape: Shape
    faults: list[Fault]
    violations: list[str]
    lines: list[str]
    simulated_s: float
    steps: int
    served: int
    """Requests that got all their tokens."""
    schedule: dict[int, int] = {}
    """Of a run that was not well: the scheduler's draws that did not take the default."""
    draws: int = 0
    deviations: list[str] = []
    """Of a run by a fixed schedule: those draws, in words."""
    luck: int = 0
    """0: delays, workload and entropy are the seed's; else drawn anew."""

    @property
    def ok(self) -> bool:
        return not self.violations


class World(Afflicted):
    """One run's processes and what must hold of them."""

    def __init__(self, kernel: Kernel, seed: int, shape: Shape, faults: Sequence[Fault]) -> None:
        super().__init__(kernel, shape, faults)
        self.seed = seed
        self._version, self._number = int(FIRST), 0
        self.kv_trees = KvTrees(self, RESTART_SECONDS)
        self.admin: Administrator | None = None
        self.launcher: Launcher | None = None
        self.waiting_for = {f"front-{n}" for n in range(shape.fronts)}
        self.waiting_for |= {f"kv-{n}" for n in range(shape.kv_engines)} | {"admin"}
        if shape.web:
            self.waiting_for |= {f"web-{n}" for n in range(shape.fronts)}
        if shape.stop:
            self.waiting_for.add("stop")
        self._all_served = asyncio.Event()
        self._mains = {
            "coordinator": self._coordinator,
            "store": self._store,
            "admin": self._admin,
            "launcher": self._launch,
        }

    # --- processes -------------------------------------------------------------------------------------------------

    def machine_of(self, name: str) -> str:
        if name.startswith("web"):
            return "host-c"
        far = self.shape.spread and name == f"engine-{self.shape.engines - 1}"
        return "host-b" if far else "host-a"

    def start(self, name: str) -> None:
        living = self.kernel.processes.get(name)
        if self.over or (living is not None and not living.dead):
            return
        if name.startswith("kv-"):
            self.kv_trees.start(name)
            return
        kinds = {"front": self._front, "engine": self._engine, "web": self._web}
        main = self._mains.get(name) or kinds[name.split("-")[0]]
        self.kernel.start(self.machine_of(name), name, main, self._ended)

    def _ended(self, process: SimProcess) -> None:
        self.forget(process)
        if self.over:
            return
        unreadable = isinstance(process.failure, LocalProtocolError) and "remove it" in process.failure.hint
        if unreadable and process.name in self.spoilt:
            self._repair(process)
        if process.name.startswith("engine"):
            assert self.launcher is not None
            self.launcher.saw_end(process)
            if process.exit_status == 0:
                self.launcher.saw_stop(process)
                return
        self.kernel.loop.later(self.kernel.rng.uniform(*RESTART_SECONDS), self.start, process.name)

    def _repair(self, process: SimProcess) -> None:
        """An operator does as he is told: the state file that cannot be read is removed."""
        self.kernel.note(f"the operator removes what {process} cannot read")
        process.machine.disk.names.pop(str(STATES / process.name / "identity.json"), None)

    async def _coordinator(self, host: SimHost) -> int:
        config = CoordinatorConfig(
            address=COORDINATOR,
            state_dir=STATES / "coordinator",
            expected=[f"engine-{n}" for n in range(self.shape.engines)],
            launches=self.shape.starts,
        )
        await run_coordinator(host, config, events=self.log_of(host))
        return 1

    async def _engine(self, host: SimHost) -> int:
        name = host.process.name
        config = RunnerConfig(
            name=name,
            address=f"unix:/run/{name}.sock",
            coordinator=COORDINATOR,
            state_dir=STATES / name,
            version=FIRST,
            weights=WEIGHTS + FIRST,
        )
        watch = EngineWatch(self, host.process)
        engine = SimEngine(host, self.shape.step_s, watch, able=self.shape.weights)
        runner = Runner(host, engine, config)
        self.runners[host.process] = runner
        self.engines[host.process] = engine
        return await runner.run()

    async def _front(self, host: SimHost) -> int:
        name = host.process.name
        host.files.make_private_dir(STATES / name)
        me = load_identity(host, STATES / name, name)
        dispatcher = Dispatcher(
            host, me, COORDINATOR, events=self.log_of(host), no_member_s=30.0, keep_in=STATES / name
        )
        await dispatcher.start()
        self.dispatchers[host.process] = dispatcher
        clients = [Client(self, host, dispatcher, number) for number in range(3)]
        for client in clients:
            host.process.run(client.run, f"client {client.number}")
        host.process.run(Returner(self, host, dispatcher).run, "returning clients")
        if self.shape.web:
            front = Front(
                host,
                dispatcher,
                FleetClient(host, COORDINATOR),
                text_model(),
                served_model_name=MODEL_NAME,
                access=Access(),
            )
            self.fronts[host.process] = front
            await serve_http(host, front, address_of(name))
        assert dispatcher.stale is not None
        why = await dispatcher.stale
        self.kernel.note(f"{host.process} must stop: {why}")
        return 1

    async def _web(self, host: SimHost) -> int:
        """The machine of those who ask over HTTP."""
        front = host.process.name.replace("web", "front")
        for number in range(2):
            host.process.run(Browser(self, host, front, number).run, f"browser {number}")
        await asyncio.Event().wait()
        return 0

    async def _store(self, host: SimHost) -> int:
        host.files.make_private_dir(STATES / "store")
        me = load_identity(host, STATES / "store", "store")
        memory = await host.in_thread(host.create_memory, "interlock-kv", kv.SLAB_BYTES)
        # A disk that holds some of what the slab does: most blocks go down, and many come up again.
        disk = DiskConfig(STATES / "kv", 2 * kv.SLAB_BYTES + (1 << 18), index_records_min=256)
        node = Node(host, me, memory, slab_number(me.name, me.incarnation), join_s=JOIN_SECONDS, disk=disk)
        await node.start(kv.STORE)
        self.nodes[host.process] = (node, memory)
        await asyncio.Event().wait()
        return 0

    async def _admin(self, host: SimHost) -> int:
        self.admin = Administrator(self, host, COORDINATOR)
        return await self.admin.run()

    async def _launch(self, host: SimHost) -> int:
        self.launcher = Launcher(self, host, COORDINATOR)
        return await self.launcher.run()

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def next_version(self) -> str:
        """A name that no weights had before; later ones are higher."""
        self._version += 1
        return str(self._version)

    def log_of(self, host: SimHost) -> EventLog:
        return Noted(host, self)

    # --- the run ---------------------------------------------------------------------------------------------------

    async def play(self) -> None:
        webs = [f"web-{n}" for n in range(self.shape.fronts)] if self.shape.web else []
        for name in ["launcher", *processes_of(self.shape), *webs, "admin"]:
            if not name.endswith(("-r0", "-r1")):
                self.start(name)
        for fault in self.faults:
            self.kernel.loop.later(fault.at_s, self.inflict, fault)
        watching = asyncio.create_task(self._look(), name="checks")
        await asyncio.sleep(self.shape.run_s)
        self.relent()
        await self._until_served()
        await asyncio.sleep(SETTLE_SECONDS)
        watching.cancel()
        self.check_everywhere()
        self.check_left_over()
        self.over = True

    def unserved(self, *, besides_stop: bool = False) -> list[str]:
        return sorted(self.waiting_for - {"stop"} if besides_stop else self.waiting_for)

    def probed(self, name: str) -> None:
        self.kernel.note(f"{name} is served again")
        self.waiting_for.discard(name)
        if not self.waiting_for:
            self._all_served.set()

    async def _look(self) -> None:
        loop = self.kernel.loop
        while True:
            before = loop.steps
            await asyncio.sleep(LOOK_SECONDS)
            self.check_everywhere()
            if loop.steps - before > LOOK_STEPS_MAX:
                loop.give_up = f"{loop.steps - before} steps in {LOOK_SECONDS} s: somebody talks without end, at {loop.time():.3f} s"

    async def _until_served(self) -> None:
        try:
            async with asyncio.timeout(SERVES_AGAIN_SECONDS):
                await self._all_served.wait()
        except TimeoutError:
            left = self.unserved()
            self.violation(
                f"{SERVES_AGAIN_SECONDS:.0f} s after the last fault there is still: {'; '.join(left)}"
            )


def run_world(
    seed: int,
    shape: Shape,
    faults: Sequence[Fault],
    schedule: Mapping[int, int] | None = None,
    luck: int = 0,
) -> Result:
    """One run, from a cold start to its last check. The same arguments give the same lines.

    `schedule`: draws of the scheduler instead of the seed's own (`schedule.py`). `luck`: another draw of all else than faults.
    """
    collecting = gc.isenabled()
    gc.disable()  # what is collected when must not depend on anything but the seed
    try:
        return _run_world(seed, shape, faults, schedule, luck)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            logging.disable()
            gc.collect()  # all of the run, here: what its coroutines do at their end is nobody else's business
            logging.disable(logging.NOTSET)
        if collecting:
            gc.enable()


def _run_world(
    seed: int, shape: Shape, faults: Sequence[Fault], schedule: Mapping[int, int] | None, luck: int
) -> Result:
    loop = SimLoop(random.Random(f"schedule {seed}"), shuffle=shape.shuffle, fixed=schedule)
    kernel = Kernel(loop, random.Random(f"kernel {seed} {luck}" if luck else f"kernel {seed}"))
    world = World(kernel, seed, shape, faults)
    loop.on_calm = world.check_wake_ups
    loop.set_exception_handler(lambda _, context: world.unhandled(context))
    try:
        with logged(world), simulated_os(kernel), blocking_seam(), channels_seen(world):
            try:
                loop.run_until_complete(world.play())
            except Wedged as wedged:
                world.violation(str(wedged))
            world.over = True
            kernel.bury()
    finally:
        loop.close()
    taken = loop.schedule
    return Result(
        seed,
        shape,
        list(faults),
        world.violations,
        kernel.lines,
        loop.time(),
        loop.steps,
        world.served,
        taken.taken if world.violations else {},
        taken.draws,
        taken.words,
        luck,
    )
