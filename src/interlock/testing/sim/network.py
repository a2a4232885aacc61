"""Simulated connections: late, slow, cut in one direction or both, reset, half-open, and overtaken by their successors.

Each connection is two pipes, one a direction. A pipe keeps its bytes in order and takes as long as it likes; two connections
between the same processes share nothing, so a new one may be served while the old one's bytes are still under way. A cut holds
bytes back (they arrive when it heals, as TCP would send them again); a reset loses what was under way; half-open means that one
side was told of the end and the other never will be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from interlock.core.limits import CONNECTIONS_MAX
from interlock.host.base import Stream
from interlock.testing.sim.loop import PROCESS
from interlock.testing.sim.streams import Pipe, SimStream

if TYPE_CHECKING:
    from interlock.testing.sim.kernel import Kernel, Machine, SimProcess

_log = logging.getLogger(__name__)


class SimListener:
    """`Listener` of the host seam."""

    def __init__(
        self, network: Network, process: SimProcess, address: str, serve: Callable[[Stream], Awaitable[None]]
    ) -> None:
        self._network, self.process, self._address, self._serve = network, process, address, serve
        self._tasks: set[asyncio.Task[None]] = set()
        process.listeners[address] = self

    @property
    def address(self) -> str:
        return self._address

    def accept(self, stream: SimStream) -> None:
        if len(self._tasks) >= CONNECTIONS_MAX:
            stream.vanish()
            return
        task = self.process.run(lambda: self._run(stream), f"serve {self._address}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard, context=self.process.context.copy())

    async def _run(self, stream: SimStream) -> None:
        try:
            await self._serve(stream)
        except Exception:
            _log.exception("%s: the handler of a connection failed", self._address)
        finally:
            stream.close()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.vanish()

    def vanish(self) -> None:
        self.process.listeners.pop(self._address, None)
        self._network.forget(self)


class Network:
    """All connections. Addresses of `unix:` are found on every machine: a stand-in for TCP until fleets speak it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.delay_max_s = 0.004
        self.slow: dict[tuple[str, str], float] = {}
        """(from, to) → factor of the delay."""
        self._cuts: dict[tuple[str, str], int] = {}
        self._listeners: dict[str, SimListener] = {}
        self._pipes: list[Pipe] = []
        self._healed: list[asyncio.Future[None]] = []
        self._keys = 0

    @property
    def now_s(self) -> float:
        return self.kernel.loop.time()

    def next_key(self) -> int:
        self._keys += 1
        return self._keys

    def delay_s(self, ends: tuple[str, str]) -> float:
        rng = self.kernel.rng
        usual = rng.random() * self.delay_max_s
        if rng.random() < 0.02:
            usual *= 25.0
        return usual * self.slow.get(ends, 1.0)

    def is_cut(self, ends: tuple[str, str]) -> bool:
        return ends in self._cuts

    # --- what hosts ask --------------------------------------------------------------------------------------------

    async def listen(
        self, process: SimProcess, address: str, serve: Callable[[Stream], Awaitable[None]]
    ) -> SimListener:
        if address in self._listeners:
            raise FileExistsError(
                f"{address}: another process listens there; stop it or use another directory"
            )
        listener = self._listeners[address] = SimListener(self, process, address, serve)
        return listener

    async def connect(self, process: SimProcess, address: str) -> SimStream:
        await asyncio.sleep(self.delay_s((process.name, address)))
        listener = self._listeners.get(address)
        if listener is None:
            raise ConnectionRefusedError(f"{address}: nobody listens there")
        there = listener.process
        while self.is_cut((process.name, there.name)) or self.is_cut((there.name, process.name)):
            healed = self.kernel.loop.create_future()
            self._healed.append(healed)
            await healed
        if there.dead or self._listeners.get(address) is not listener:
            raise ConnectionRefusedError(f"{address}: nobody listens there any more")
        here, far = SimStream(self, process, address), SimStream(self, there, address)
        here.other, far.other = far, here
        here.out, far.out = Pipe(self, here, far), Pipe(self, far, here)
        self._pipes += [here.out, far.out]
        if len(self._pipes) > 512:
            self._pipes = [pipe for pipe in self._pipes if not (pipe._source.gone and pipe._target.gone)]
        delay = self.delay_s((process.name, there.name))
        self.kernel.loop.later(delay, self._accept, listener, far)
        return here

    def _accept(self, listener: SimListener, stream: SimStream) -> None:
        if not listener.process.dead and not stream.gone:
            listener.accept(stream)

    def forget(self, listener: SimListener) -> None:
        if self._listeners.get(listener.address) is listener:
            del self._listeners[listener.address]

    # --- faults ----------------------------------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from `source` to `target` until `heal`."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1

    def heal(self, source: str, target: str) -> None:
        left = self._cuts.get((source, target), 0) - 1
        if left > 0:
            self._cuts[source, target] = left
            return
        self._cuts.pop((source, target), None)
        for pipe in self._pipes:
            if pipe.ends == (source, target):
                pipe.pump()
        waiting, self._healed = self._healed, []
        for healed in waiting:
            if not healed.done():
                healed.set_result(None)

    def break_connections(self, one: str, other: str, *, told: str) -> int:
        """Resets every connection between the two. `told`: "both", or "one": the other never hears of it."""
        count = 0
        for process in (self.kernel.processes.get(one),):
            for stream in list(process.streams.values()) if process is not None else ():
                if stream.other.process.name != other:
                    continue
                count += 1
                stream.break_off("the connection was reset")
                if told == "both":
                    delay = self.kernel.rng.random() * 0.2
                    self.kernel.loop.later(delay, stream.other.break_off, "the connection was reset")
                else:
                    stream.other.out.void = True
                stream.out.void = True
        return count


def current_machine() -> Machine | None:
    process = PROCESS.get()
    return process.machine if process is not None else None
