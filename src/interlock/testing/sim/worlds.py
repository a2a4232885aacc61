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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.engines.runner import Runner, RunnerConfig
from interlock.fleet.coordinator_main import CoordinatorConfig, run_coordinator
from interlock.fleet.dispatcher import Dispatcher
from interlock.store.main import slab_number
from interlock.store.node import DiskConfig, Node
from interlock.telemetry.events import Event, EventLog
from interlock.testing.sim import kv, kv_client
from interlock.testing.sim.checks import Checks, channels_seen
from interlock.testing.sim.disk import SimDisk
from interlock.testing.sim.engine import SimEngine
from interlock.testing.sim.faults import Fault, Shape, processes_of
from interlock.testing.sim.host import SimHost, simulated_os
from interlock.testing.sim.kernel import KILLED, Kernel, SimProcess
from interlock.testing.sim.loop import PROCESS, SimLoop, Wedged
from interlock.testing.sim.people import Administrator, Client, Launcher
from interlock.testing.sim.threads import blocking_seam
from interlock.wire.identity import load_identity

COORDINATOR = "unix:/run/coordinator.sock"
STATES = Path("/var/lib/interlock")
SERVES_AGAIN_SECONDS = 60.0
"""After the last fault everything is served again within so many simulated seconds."""
SETTLE_SECONDS = 12.0
"""Then sessions end, and nothing may be left over."""
JOIN_SECONDS = 4.0
LOOK_SECONDS = 0.5
RESTART_SECONDS = (0.05, 1.5)
LINES_MAX = 200_000


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


class World(Checks):
    """One run's processes and what must hold of them."""

    def __init__(self, kernel: Kernel, seed: int, shape: Shape, faults: Sequence[Fault]) -> None:
        super().__init__(kernel)
        self.seed, self.shape, self.faults = seed, shape, faults
        self.events: dict[str, EventLog] = {}
        self.spoilt: set[str] = set()
        """Whose state files a fault has taken or changed."""
        self.lives: dict[str, int] = {}
        self.admin: Administrator | None = None
        self.launcher: Launcher | None = None
        self.waiting_for = {f"front-{n}" for n in range(shape.fronts)}
        self.waiting_for |= {f"kv-{n}" for n in range(shape.kv_engines)} | {"admin"}
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
        far = self.shape.spread and name == f"engine-{self.shape.engines - 1}"
        return "host-b" if far else "host-a"

    def start(self, name: str) -> None:
        living = self.kernel.processes.get(name)
        if self.over or (living is not None and not living.dead):
            return
        if name.startswith("kv-"):
            self._start_kv(name)
            return
        main = self._mains.get(name) or (self._front if name.startswith("front") else self._engine)
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
                self.stopped_engines.add(process.name)
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
            version="0",
        )
        engine = SimEngine(host, self.shape.step_s, lambda stage: self.stepped(host.process, stage))
        runner = Runner(host, engine, config)
        self.runners[host.process] = runner
        self.engines[host.process] = engine
        return await runner.run()

    async def _front(self, host: SimHost) -> int:
        name = host.process.name
        host.files.make_private_dir(STATES / name)
        me = load_identity(host, STATES / name, name)
        dispatcher = Dispatcher(host, me, COORDINATOR, events=self.log_of(host), no_member_s=30.0)
        await dispatcher.start()
        self.dispatchers[host.process] = dispatcher
        clients = [Client(self, host, dispatcher, number) for number in range(3)]
        for client in clients:
            host.process.run(client.run, f"client {client.number}")
        assert dispatcher.stale is not None
        why = await dispatcher.stale
        self.kernel.note(f"{host.process} must stop: {why}")
        return 1

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

    def log_of(self, host: SimHost) -> EventLog:
        return _Noted(host, self)

    # --- engines of the store --------------------------------------------------------------------------------------

    def _start_kv(self, name: str) -> None:
        """A tree of processes, in one life: its ranks first, so that the scheduler can speak to them."""
        engine = "-".join(name.split("-")[:2])
        if any(
            not p.dead for n, p in self.kernel.processes.items() if n == engine or n.startswith(engine + "-")
        ):
            return
        life = self.lives[engine] = self.lives.get(engine, 0) + 1
        kind: Any = kv_client if self.shape.clients else kv
        ranks: list[kv.Rank | kv_client.Rank] = []
        complete = asyncio.Event()

        def rank_main(number: int) -> Callable[[SimHost], Awaitable[int]]:
            async def main(host: SimHost) -> int:
                rank = kind.Rank(self, host, engine, life, number, self.shape.ranks)
                ranks.append(rank)
                if len(ranks) == self.shape.ranks:
                    complete.set()
                return int(await rank.run())

            return main

        async def main(host: SimHost) -> int:
            await complete.wait()
            return int(await kind.Scheduler(self, host, engine, life, ranks).run())

        for number in range(self.shape.ranks):
            self.kernel.start("host-a", f"{engine}-r{number}", rank_main(number), self._kv_ended)
        self.kernel.start("host-a", engine, main, self._kv_ended)

    def _kv_ended(self, process: SimProcess) -> None:
        """One of the tree is gone: the others linger for a while, and write on, before they are ended."""
        self.forget(process)
        if self.over:
            return
        engine = "-".join(process.name.split("-")[:2])
        for name, other in self.kernel.processes.items():
            if not other.dead and (name == engine or name.startswith(engine + "-")):
                self.kernel.loop.later(self.kernel.rng.uniform(0.0, 3.0), other.end, KILLED)
        self.kernel.loop.later(self.kernel.rng.uniform(*RESTART_SECONDS), self.start, engine)

    # --- faults ----------------------------------------------------------------------------------------------------

    def inflict(self, fault: Fault) -> None:
        if self.calm:
            return
        self.kernel.note(f"FAULT {fault}")
        process = self.kernel.processes.get(fault.target)
        network, loop = self.kernel.network, self.kernel.loop
        one, other = fault.target, fault.other
        match fault.kind:
            case "crash" if process is not None:
                process.end(KILLED)
            case "worker-death" if process is not None and process in self.engines:
                self.engines[process].break_down()
            case "freeze" if process is not None:
                process.freeze()
                loop.later(fault.seconds, process.thaw)
            case "cut" | "one-way-cut":
                ways = [(one, other), (other, one)] if fault.kind == "cut" else [(one, other)]
                for way in ways:
                    network.cut(*way)
                    loop.later(fault.seconds, network.heal, *way)
            case "reset" | "half-open":
                network.break_connections(one, other, told="both" if fault.kind == "reset" else "one")
            case "slow":
                network.slow[one, other] = 50.0
                loop.later(fault.seconds, network.slow.pop, (one, other), None)
            case "disk-full" | "disk-errors" | "power-cut" | "clock-back":
                self._inflict_on_machine(fault)
            case "dies-at-disk" if process is not None:
                process.die_at_disk = fault.detail
            case "state-lost" if process is not None:
                process.end(KILLED)
                process.machine.disk.wipe(str(STATES / fault.target))
                self.spoilt.add(fault.target)
            case "bit-flip" if process is not None:
                self._flip(process.machine.disk, STATES / fault.target)

    def _flip(self, disk: SimDisk, directory: Path) -> None:
        """One bit of one of its state files, drawn by the disk."""
        paths = [path for path in disk.names if Path(path).parent == directory]
        if paths:
            self.spoilt.add(directory.name)
            path = paths[int(self.kernel.rng.random() * len(paths))]
            self.kernel.note(f"a bit flips in {path}: {disk.flip_bit(path)}")

    def _inflict_on_machine(self, fault: Fault) -> None:
        machine = self.kernel.machine(fault.target)
        disk, loop = machine.disk, self.kernel.loop
        match fault.kind:
            case "disk-full":
                disk.full = True
                loop.later(fault.seconds, setattr, disk, "full", False)
            case "disk-errors":
                disk.failing = 0.3
                loop.later(fault.seconds, setattr, disk, "failing", 0.0)
            case "power-cut":
                for process in list(machine.processes.values()):
                    if process.name not in ("admin", "launcher"):  # they stand for people elsewhere
                        process.end(KILLED)
                disk.power_cut()
            case "clock-back":
                machine.wall_ns -= int(fault.detail) * 10**9

    def _relent(self) -> None:
        """The faults cease."""
        self.kernel.note("the faults cease")
        self.calm = True
        network = self.kernel.network
        for way in list(network._cuts):
            network._cuts[way] = 1
            network.heal(*way)
        network.slow.clear()
        for machine in self.kernel.machines.values():
            machine.disk.full, machine.disk.failing = False, 0.0
        for process in list(self.kernel.processes.values()):
            process.die_at_disk = None
            process.thaw()

    # --- the run ---------------------------------------------------------------------------------------------------

    async def play(self) -> None:
        for name in ["launcher", *processes_of(self.shape), "admin"]:
            if not name.endswith(("-r0", "-r1")):
                self.start(name)
        for fault in self.faults:
            self.kernel.loop.later(fault.at_s, self.inflict, fault)
        watching = asyncio.create_task(self._look(), name="checks")
        await asyncio.sleep(self.shape.run_s)
        self._relent()
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
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.check_everywhere()

    async def _until_served(self) -> None:
        try:
            async with asyncio.timeout(SERVES_AGAIN_SECONDS):
                await self._all_served.wait()
        except TimeoutError:
            left = self.unserved()
            self.violation(
                f"{SERVES_AGAIN_SECONDS:.0f} s after the last fault there is still: {'; '.join(left)}"
            )


class _Noted(EventLog):
    """An event log whose events stand in the run's timeline."""

    def __init__(self, host: SimHost, world: World) -> None:
        super().__init__(host.clock)
        self._process, self._world = host.process, world

    def emit(self, name: str, **fields: object) -> Event:
        words = " ".join(f"{key}={value}" for key, value in fields.items())
        self._world.kernel.note(f"{self._process} {name} {words}")
        if name == "coordinator_without_state":
            self._world.coordinator_forgets(excused="coordinator" in self._world.spoilt)
        elif name == "target":
            self._world.coordinator_knows()
        return super().emit(name, **fields)


class _Timeline(logging.Handler):
    """The drivers' own log lines in the timeline; a traceback among them is a defect."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS.get()
        if self._world.kernel.buried or (process is not None and process.dead):
            return
        self._world.kernel.note(f"{process} | {record.getMessage()}")
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self._world.violation(
                f"{process} logged a defect: {record.getMessage()}: {type(error).__name__}: {error}"
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
    logger, timeline = logging.getLogger("interlock"), _Timeline(world)
    before = logger.level, logger.propagate, logger.handlers[:]
    logger.handlers, logger.propagate = [timeline], False
    logger.setLevel(logging.INFO)
    try:
        with simulated_os(kernel), blocking_seam(), channels_seen(world):
            try:
                loop.run_until_complete(world.play())
            except Wedged as wedged:
                world.violation(str(wedged))
            world.over = True
            kernel.bury()
            logger.handlers = []
    finally:
        logger.level, logger.propagate, logger.handlers = before
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
