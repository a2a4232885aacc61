"""What goes wrong in one run, and when: drawn from the seed, a list that can be read, cut down, and run again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

KINDS = ("crash", "freeze", "net", "disk", "power", "wipe", "clock", "rot")
"""What `--faults` chooses from."""


class Shape(msgspec.Struct, frozen=True):
    """The fleet of one seed."""

    engines: int
    fronts: int
    kv_engines: int
    ranks: int
    spread: bool
    """The last engine runs on a machine of its own: no pid of it is seen elsewhere."""
    shuffle: bool
    run_s: float
    step_s: float
    stop: bool
    """At the end an administrator stops the fleet."""
    clients: bool = False
    """The store's users go through the real, synchronous client."""
    quiet: bool = False
    """Nobody pauses the fleet."""
    weights: bool = False
    """Two people command it, who update its weights, suspend and resume it, too."""
    starts: bool = False
    """They also stop it whole, and start it again."""
    web: bool = False
    """Each front is asked over HTTP, too."""


class Fault(msgspec.Struct, frozen=True):
    """One thing that goes wrong. `other` and `seconds` where they mean something."""

    at_s: float
    kind: str
    target: str
    other: str = ""
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        between = f" and {self.other}" if self.other else ""
        lasting = f" for {self.seconds:.2f} s" if self.seconds else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.at_s:8.3f} s  {self.kind} {self.target}{between}{lasting}{detail}"


def shape_of(seed: int) -> Shape:
    rng = random.Random(f"shape {seed}")
    return Shape(
        engines=rng.choice((1, 2, 2, 3)),
        fronts=rng.choice((1, 1, 2)),
        kv_engines=rng.choice((1, 2)),
        ranks=rng.choice((1, 2)),
        spread=rng.random() < 0.3,
        shuffle=rng.random() < 0.8,
        run_s=rng.uniform(8.0, 25.0),
        step_s=rng.choice((0.01, 0.03, 0.1)),
        stop=rng.random() < 0.3,
        clients=random.Random(f"clients {seed}").random() < 0.5,
        weights=random.Random(f"weights {seed}").random() < 0.6,
        starts=random.Random(f"starts {seed}").random() < 0.5,
        web=random.Random(f"web {seed}").random() < 0.4,
    )


def faults_of(seed: int, shape: Shape, kinds: Sequence[str]) -> list[Fault]:
    rng = random.Random(f"faults {seed}")
    if not kinds:
        return []
    count = rng.choice((0, 1, 2, 4, 8, 14))
    others = [kind for kind in kinds if kind != "rot"]
    drawn = [_draw(rng, shape, rng.choice(others)) for _ in range(count)] if others else []
    if "rot" in kinds:
        drawn += _rot(seed, shape)
    if "disk" in kinds:
        drawn += _slow(seed, shape)
    if shape.web:
        drawn += _web(seed, shape, kinds)
    return sorted(drawn, key=lambda fault: fault.at_s)


def processes_of(shape: Shape) -> list[str]:
    names = ["coordinator", "store"]
    names += [f"engine-{n}" for n in range(shape.engines)]
    names += [f"front-{n}" for n in range(shape.fronts)]
    for n in range(shape.kv_engines):
        names += [f"kv-{n}", *(f"kv-{n}-r{rank}" for rank in range(shape.ranks))]
    return names


def ways_of(shape: Shape) -> list[tuple[str, str]]:
    """Who talks with whom."""
    engines = [f"engine-{n}" for n in range(shape.engines)]
    fronts = [f"front-{n}" for n in range(shape.fronts)]
    users = [name for name in processes_of(shape) if name.startswith("kv-")]
    ways = [(front, engine) for front in fronts for engine in engines]
    ways += [(name, "coordinator") for name in [*engines, *fronts, "admin"]]
    return ways + [(user, "store") for user in users]


def _rot(seed: int, shape: Shape) -> list[Fault]:
    """Flipped bits of state files, from a source of their own: older seeds keep the rest of their plans."""
    rng = random.Random(f"rot {seed}")
    names = [name for name in processes_of(shape) if not name.startswith("kv-")]
    faults = []
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at_s, target = rng.uniform(0.3, shape.run_s * 0.9), rng.choice(names)
        faults.append(Fault(at_s, "bit-flip", target))
        faults.append(Fault(at_s, "crash", target))  # what is flipped is read at the next start
    return faults


def _slow(seed: int, shape: Shape) -> list[Fault]:
    """A disk that takes its time: whoever waits for it in a thread is late, whoever calls it from his loop stands still."""
    rng = random.Random(f"slow {seed}")
    if rng.random() > 0.25:
        return []
    at_s, seconds = rng.uniform(0.3, shape.run_s * 0.9), rng.choice((0.5, 3.0, 10.0))
    return [Fault(at_s, "disk-slow", "host-a", seconds=seconds, detail=str(rng.choice((0.01, 0.1, 0.5))))]


def _web(seed: int, shape: Shape, kinds: Sequence[str]) -> list[Fault]:
    """What befalls answers under way over HTTP: their front dies, or the way to it. From a source of their own, too."""
    rng = random.Random(f"web faults {seed}")
    faults = []
    for _ in range(rng.choice((0, 1, 2, 4))):
        at_s, number = rng.uniform(0.3, shape.run_s * 0.9), rng.randrange(shape.fronts)
        one, other, seconds = f"web-{number}", f"front-{number}", rng.choice((0.5, 2.0, 12.0))
        if rng.random() < 0.5:
            one, other = other, one
        what = rng.choice(("crash", "crash", "cut", "one-way-cut", "reset", "half-open", "slow"))
        if what == "crash" and "crash" in kinds:
            faults.append(Fault(at_s, what, f"front-{number}"))
        elif what in ("reset", "half-open") and "net" in kinds:
            faults.append(Fault(at_s, what, one, other))
        elif what != "crash" and "net" in kinds:
            faults.append(Fault(at_s, what, one, other, seconds))
    return faults


def _draw(rng: random.Random, shape: Shape, kind: str) -> Fault:
    at_s = rng.uniform(0.3, shape.run_s * 0.9)
    process = rng.choice(processes_of(shape))
    seconds = rng.choice((0.05, 0.5, 2.0, 6.0, 12.0)) * rng.uniform(0.5, 1.5)
    match kind:
        case "crash":
            if process.startswith("engine") and rng.random() < 0.3:
                return Fault(at_s, "worker-death", process)
            return Fault(at_s, "crash", process)
        case "freeze":
            return Fault(at_s, "freeze", process, seconds=seconds)
        case "net":
            one, other = rng.choice(ways_of(shape))
            if rng.random() < 0.5:
                one, other = other, one
            what = rng.choice(("cut", "one-way-cut", "reset", "reset", "half-open", "slow"))
            if what in ("reset", "half-open"):
                return Fault(at_s, what, one, other)
            return Fault(at_s, what, one, other, seconds)
        case "disk":
            what = rng.choice(("disk-full", "disk-errors", "dies-at-disk"))
            if what == "dies-at-disk":
                call = rng.choice(("open", "write", "fsync", "rename"))
                return Fault(at_s, what, "coordinator", detail=call)
            return Fault(at_s, what, "host-a", seconds=seconds)
        case "power":
            return Fault(at_s, "power-cut", "host-a")
        case "wipe":
            return Fault(at_s, "state-lost", rng.choice([p for p in processes_of(shape) if "kv" not in p]))
        case "clock":
            return Fault(at_s, "clock-back", "host-a", detail=str(rng.choice((1, 60, 86400))))
    raise ValueError(f"{kind!r} is no kind of fault; there are {', '.join(KINDS)}")
