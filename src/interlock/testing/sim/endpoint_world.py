"""Two or three real transfer engines under a seed: endpoints, links, handshakes and the greeting of lanes, on the simulated machine.

Real: `TransferEngine` with endpoint drivers, links, meeting, hearing, gate and ticks, all of `wire/`, and of the lanes the acceptor, the tokens and the
listing. Made up: what goes over a lane (`endpoint_lanes`). Faults: crash and restart (with its state or without), freeze, cuts in one or both
directions, resets, half-open connections, slow ways; several at a time.

Checked: an answer over a lane is of the life with which it was paired, and never a refusal; an `open` ends by its deadline; SETTLE_SECONDS after the last
fault each pair is connected, both sides name the connection alike, and it carries, over lanes of that connection alone and one control
channel; no stream is left that nobody owns; nothing is logged as an error. Where no fault was, each `open` takes QUICK_SECONDS at most.

In some worlds nobody can dial one of the peers' lanes, and in some an engine opens to one peer at a time (its gate has one place).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import msgspec

from interlock.core.errors import InterlockError, StaleError
from interlock.core.limits import LANE_PATIENCE_SECONDS
from interlock.membership.directory import StaticDirectory
from interlock.testing.sim.endpoint_lanes import REFUSED, SimKind, SimLane
from interlock.testing.sim.host import SimHost, simulated_os
from interlock.testing.sim.kernel import KILLED, Kernel, SimProcess
from interlock.testing.sim.loop import SimLoop
from interlock.transfer import engine as engine_module
from interlock.transfer.engine import TransferEngine, TransferFailed
from interlock.transfer.gate import Gate
from interlock.transfer.lanes.base import Pairing
from interlock.transfer.peer import Peer
from interlock.wire.identity import load_identity

RUN_SECONDS = 25.0
SETTLE_SECONDS = 30.0
OPEN_SECONDS = 8.0
SLACK_SECONDS = 1.0
QUICK_SECONDS = 0.3
"""Without faults nothing is lost, so no handshake waits for a word to be repeated."""
RETIRES = 0.05
"""How often one who opens retires what is there first: so that opens cross, and come while a retirement is under way."""
KINDS = ("crash", "crash", "freeze", "cut", "one-way-cut", "reset", "half-open", "slow", "retire")


class Seen(msgspec.Struct):
    """What one run was made of."""

    opens: int = 0
    opened: int = 0
    reads: int = 0
    faults: int = 0
    lives: int = 0


class EndpointWorld:
    """One seed. `run()` raises `AssertionError`, with the timeline, when something that must hold did not."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"endpoints {seed}")
        self.loop = SimLoop(random.Random(f"schedule {seed}"))
        self.kernel = Kernel(self.loop, random.Random(f"kernel {seed}"))
        self.names = [f"peer-{letter}" for letter in "abc"[: self.rng.choice((2, 2, 3))]]
        shape = random.Random(f"shape {seed}")
        self.walled = shape.choice((None, None, self.names[0], self.names[-1]))
        self.is_narrow = shape.random() < 0.5
        self.count = self.rng.choice((0, 1, 2, 4, 8))
        self.engines: dict[str, TransferEngine] = {}
        self.seen = Seen()
        self.wrong: list[str] = []
        self._done = False
        self.loop.set_exception_handler(self._unseen)

    def run(self) -> Seen:
        with self._seam(), simulated_os(self.kernel):
            try:
                self.loop.run_until_complete(self._story())
            except AssertionError:
                raise
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            finally:
                self.kernel.bury()
        self.loop.close()
        if self.wrong:
            lines = "\n".join(self.kernel.lines[-60:])
            raise AssertionError(f"seed {self.seed}: {'; '.join(self.wrong[:4])}\n{lines}")
        return self.seen

    @contextmanager
    def _seam(self) -> Iterator[None]:
        """The engine's own lanes need sockets and threads; here it gets those of this world."""
        with (
            mock.patch.object(engine_module, "make_kinds", self._make_kinds),
            mock.patch.object(engine_module, "borrow_pool", return_value=None),
            mock.patch.object(engine_module, "return_pool", return_value=None),
            _errors_to(self._logged),
        ):
            yield

    def _logged(self, text: str) -> None:
        if not self.kernel.buried:
            self.wrong.append(text)

    def _unseen(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.kernel.buried and not isinstance(
            error, ConnectionError
        ):  # of which a dead process's tasks are not told any more
            self.wrong.append(f"nobody looked at {error!r}: {context.get('message')}")

    def _make_kinds(
        self, _: Any, host: Any, me: str, __: Any, segments: Any, admission: Any, ___: str
    ) -> dict[str, Any]:
        life = f"{me}@{segments.incarnation}".encode()
        address = f"unix:/lanes-of-{me}-{segments.incarnation}"
        walled = f"unix:/lanes-of-{self.walled}-"
        return {"sim": SimKind(host, me, life, segments, admission, self._was_read, address, walled)}

    def _was_read(self, pairing: Pairing, answer: bytes) -> None:
        self.seen.reads += 1
        if answer == REFUSED:
            self.wrong.append(
                f"{pairing.peer} refused a read of {pairing.me} over a lane that both had listed"
            )
        elif answer != f"{pairing.peer}@{pairing.theirs.incarnation}".encode():
            self.wrong.append(
                f"{pairing.me} read {answer!r} over a lane to {pairing.peer} at {pairing.theirs}"
            )

    # --- processes -------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        self.seen.lives += 1
        self.kernel.start(f"machine of {name}", name, lambda host: self._live(host, name), lambda _: None)

    async def _live(self, host: SimHost, name: str) -> int:
        directory = StaticDirectory({other: f"unix:/{other}" for other in self.names})
        folder = Path(f"/state/{name}")
        host.files.make_private_dir(folder)
        me = load_identity(host, folder, name)
        engine = TransferEngine(cast("Any", host), me, f"unix:/{name}", directory=directory)
        if self.is_narrow:
            engine._hearing._gate = Gate(1)
        await engine.start()
        self.engines[name] = engine
        try:
            await self._use(host, engine, name)
        except StaleError:
            self.kernel.note(f"{name} was told that this life is over")
        await engine.close()
        return 0

    async def _use(self, host: SimHost, engine: TransferEngine, name: str) -> None:
        others = [other for other in self.names if other != name]
        while True:
            await asyncio.sleep(self.rng.choice((0.0, 0.05, 0.5)) * self.rng.random())
            if self._done:
                await asyncio.sleep(3600.0)
            peer = self.rng.choice(others)
            if self.rng.random() < RETIRES:
                engine.retire(peer)
            await self._open(host, engine, name, peer)

    async def _open(self, host: SimHost, engine: TransferEngine, name: str, peer: str) -> None:
        begun_s = self.loop.time()
        self.seen.opens += 1
        try:
            await engine.open(peer, timeout_s=OPEN_SECONDS)
            self.seen.opened += 1
            quick_s = QUICK_SECONDS + (2 * LANE_PATIENCE_SECONDS if self.walled else 0.0)
            if self.count == 0 and not self.is_narrow and self.loop.time() - begun_s > quick_s:
                self.wrong.append(
                    f"{name} opened to {peer} in {self.loop.time() - begun_s:.2f} s with no fault"
                )
            await self._read(engine, peer, begun_s + OPEN_SECONDS - self.loop.time())
        except (TransferFailed, ConnectionError, EOFError, TimeoutError):
            pass  # what befalls it is named; what it is told is judged in `_was_read`
        took_s = self.loop.time() - begun_s
        if took_s > OPEN_SECONDS + SLACK_SECONDS and not self._was_frozen(host.process, begun_s):
            self.wrong.append(f"{name} waited {took_s:.1f} s to open to {peer}")

    async def _read(self, engine: TransferEngine, peer: str, timeout_s: float) -> None:
        """At once, as whoever waited for the connection would."""
        there = engine._peers.look(peer)
        for lane in there.driver.usable if there is not None else ():
            await cast("SimLane", lane).read(max(0.0, timeout_s))

    def _was_frozen(self, process: SimProcess, since_s: float) -> bool:
        return any(f"{process} goes on" in line and float(line[:10]) >= since_s for line in self.kernel.lines)

    # --- faults ----------------------------------------------------------------------------------------------------

    async def _story(self) -> None:
        for name in self.names:
            self._start(name)
        plan = sorted((self.rng.uniform(0.0, RUN_SECONDS), self.rng.choice(KINDS)) for _ in range(self.count))
        tasks = [asyncio.create_task(self._fault(at_s, kind)) for at_s, kind in plan]
        await asyncio.sleep(RUN_SECONDS)
        await asyncio.gather(*tasks)
        self.kernel.note("the last fault is over")
        await asyncio.sleep(SETTLE_SECONDS)
        await self._check_all()

    async def _fault(self, at_s: float, kind: str) -> None:
        await asyncio.sleep(at_s)
        self.seen.faults += 1
        one, two = self.rng.sample(self.names, 2)
        lasting_s = self.rng.choice((0.02, 0.3, 2.0, 7.0, 14.0)) * self.rng.uniform(0.5, 1.5)
        network = self.kernel.network
        self.kernel.note(f"fault: {kind} {one} {two} {lasting_s:.2f} s")
        match kind:
            case "crash":
                await self._crash(one, lasting_s)
            case "freeze":
                process = self.kernel.processes[one]
                process.freeze()
                await asyncio.sleep(lasting_s)
                process.thaw()
            case "cut" | "one-way-cut":
                ways = [(one, two), (two, one)] if kind == "cut" else [(one, two)]
                for source, target in ways:
                    network.cut(source, target)
                await asyncio.sleep(lasting_s)
                for source, target in ways:
                    network.heal(source, target)
            case "reset":
                network.break_connections(one, two, told="both")
            case "half-open":
                network.break_connections(one, two, told="one")
            case "slow":
                network.slow[one, two] = 20.0
                await asyncio.sleep(lasting_s)
                network.slow.pop((one, two), None)
            case "retire":
                process = self.kernel.processes[one]
                if not process.dead and not process.frozen and one in self.engines:
                    process.context.copy().run(self.engines[one].retire, two)

    async def _crash(self, name: str, down_s: float) -> None:
        process = self.kernel.processes[name]
        if process.dead:  # somebody else's fault restarts it
            return
        process.end(KILLED)
        self.engines.pop(name, None)
        await asyncio.sleep(min(down_s, 3.0) * self.rng.random())
        self._start(name)

    # --- after the last fault --------------------------------------------------------------------------------------

    async def _check_all(self) -> None:
        self._done = True
        await asyncio.sleep(OPEN_SECONDS + 3.0)  # whoever was opening something is through with it
        for name in self.names:
            process = self.kernel.processes[name]
            assert not process.dead, f"{process} is dead: {process.failure}"
        asked = [
            self._in(name, partial(self._open_late, name, other))
            for name, other in itertools.permutations(self.names, 2)
        ]
        await asyncio.gather(*asked)
        await asyncio.sleep(5.0)
        for one, two in itertools.combinations(self.names, 2):
            mine, theirs = self.engines[one].stamps(two), self.engines[two].stamps(one)
            if mine is None or theirs is None or mine != theirs[::-1]:
                self.wrong.append(f"{one} is at {mine} and {two} at {theirs}")
        for name in self.names:
            await self._in(name, partial(self._check_one, name))

    def _in(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[Any]:
        """A task of that process."""
        return self.kernel.processes[name].run(work, f"a last look at {name}")

    async def _open_late(self, name: str, other: str) -> None:
        try:
            await self.engines[name].open(other, timeout_s=OPEN_SECONDS)
        except InterlockError as error:
            self.wrong.append(
                f"{SETTLE_SECONDS:.0f} s after the last fault {name} cannot open to {other}: {error}"
            )

    async def _check_one(self, name: str) -> None:
        engine = self.engines[name]
        owned = 0
        for peer in engine._peers:
            read = False
            owned += len(peer.link._channels)
            self._check_kept(name, peer)
            for lanes in peer.driver._lanes.values():
                owned += sum(len(cast("SimLane", lane).links) for lane in lanes.values())
            for lane in peer.driver.usable:
                try:
                    read |= await cast("SimLane", lane).read(5.0) is not None
                except (ConnectionError, EOFError, TimeoutError) as error:
                    self.wrong.append(f"{name} cannot read from {peer.name} after all is well: {error!r}")
            if not read:
                self.wrong.append(f"{name} is connected with {peer.name} and has no lane to read over")
        streams = len(self.kernel.processes[name].streams)
        if streams != owned:
            to = sorted(stream.peer.address for stream in self.kernel.processes[name].streams.values())
            self.wrong.append(f"{name} has {streams} streams open and needs {owned}: {to}")
        if len(engine._hearing._gate):
            self.wrong.append(f"{name} keeps places in its gate for {len(engine._hearing._gate)}")

    def _check_kept(self, name: str, peer: Peer) -> None:
        state = peer.driver.state
        if old := set(peer.driver._lanes) - {(state.stamp, state.theirs)}:
            self.wrong.append(f"{name} keeps lanes to {peer.name} of pairings that are over: {old}")
        if len(peer.link._channels) != 1:
            self.wrong.append(f"{name} has {len(peer.link._channels)} control channels to {peer.name}")


@contextmanager
def _errors_to(tell: Callable[[str], None]) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "newer life" not in text:  # an old life that is told so says it as an error, as it should
                why = record.exc_info[1] if record.exc_info else ""
                tell(f"logged: {text} {why!r}")

    handler = Handler(logging.ERROR)
    logger = logging.getLogger("interlock")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
