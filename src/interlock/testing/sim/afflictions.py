"""What a fault does to a simulated world, and how the world gets well again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from interlock.testing.sim.checks import Checks
from interlock.testing.sim.disk import SimDisk
from interlock.testing.sim.faults import Fault, Shape
from interlock.testing.sim.kernel import KILLED, Kernel

STATES = Path("/var/lib/interlock")
ELSEWHERE = ("admin", "launcher", "web")
"""They stand for people who are somewhere else."""


class Afflicted(Checks):
    """A world of this shape to which these faults are done."""

    def __init__(self, kernel: Kernel, shape: Shape, faults: Sequence[Fault]) -> None:
        super().__init__(kernel)
        self.shape, self.faults = shape, faults

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
            case "disk-full" | "disk-errors" | "disk-slow" | "power-cut" | "clock-back":
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
            case "disk-slow":
                disk.slow_s = float(fault.detail)
                loop.later(fault.seconds, setattr, disk, "slow_s", 0.0)
            case "power-cut":
                for process in list(machine.processes.values()):
                    if process.name.split("-")[0] not in ELSEWHERE:
                        process.end(KILLED)
                disk.power_cut()
            case "clock-back":
                machine.wall_ns -= int(fault.detail) * 10**9

    def night(self) -> None:
        """A fleet that is SUSPENDED is switched off whole, and on again."""
        if not self.calm:
            self.kernel.note("everything is switched off")
            for process in list(self.kernel.processes.values()):
                if process.name.split("-")[0] not in ELSEWHERE and not process.dead:
                    process.end(KILLED)

    def relent(self) -> None:
        """The faults cease."""
        self.kernel.note("the faults cease")
        self.calm, self.calm_s = True, self.kernel.loop.time()
        network = self.kernel.network
        for way in list(network._cuts):
            network._cuts[way] = 1
            network.heal(*way)
        network.slow.clear()
        for machine in self.kernel.machines.values():
            machine.disk.full, machine.disk.failing, machine.disk.slow_s = False, 0.0, 0.0
        for process in list(self.kernel.processes.values()):
            process.die_at_disk = None
            process.thaw()
