"""What must hold in every run: the rows of DESIGN §2 that can be seen from outside, and balanced books at every look."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from interlock.core.limits import SLOT_GRAIN_BYTES
from interlock.store.slots import SlotState
from interlock.testing.sim.kv import LAYOUT, content
from interlock.testing.sim.loop import PROCESS
from interlock.testing.sim.promises import Promises
from interlock.testing.sim.tokens import went_back, wrong_token
from interlock.wire.duplex import Channel

if TYPE_CHECKING:
    from interlock.engines.runner import Runner
    from interlock.fleet.dispatcher import Dispatcher
    from interlock.store.node import Node
    from interlock.testing.sim.engine import SimEngine
    from interlock.testing.sim.host import SimMemory
    from interlock.testing.sim.kernel import Kernel, SimProcess
    from interlock.web.front import Front

VIOLATIONS_MAX = 8
LEFT_SECONDS = 3.0
"""How long a front may take, when nothing fails any more, to abort what a client has left."""


class Reading(msgspec.Struct, eq=False):
    """One request that a front has accepted and not ended, as its client sees it."""

    front: SimProcess
    prompt: list[int]
    limit: int
    tokens: list[int] = []
    versions: list[str] = []
    """Of each token: which weights made it, by the answer's own word."""
    leaves: bool = False
    """Its client aborts it in the middle."""
    promised: bool = False
    """The fleet was reported SUSPENDED with it."""


class Checks:
    """Knows the truth: what was asked, delivered, held and written, whoever claims what."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.violations: list[str] = []
        self.calm = False
        """The faults are over."""
        self.over = False
        self.served = 0
        self.runners: dict[SimProcess, Runner] = {}
        self.engines: dict[SimProcess, SimEngine] = {}
        self.dispatchers: dict[SimProcess, Dispatcher] = {}
        self.nodes: dict[SimProcess, tuple[Node, SimMemory]] = {}
        self.fronts: dict[SimProcess, Front] = {}
        """Those that are asked over HTTP."""
        self.aborting = False
        """Somebody asked for a pause that aborts, or for a stop: an end "abort" is then a true end."""
        self.promises = Promises(self.violation, self.runners, self.engines)
        self.open: dict[str, Reading] = {}
        self.left: dict[str, tuple[SimProcess, float]] = {}
        """Requests whose client has closed its connection, and when: their front is to abort them."""
        self.calm_s = 0.0
        """Since when."""
        self._orphans: dict[str, dict[str, Reading]] = {}
        """By front: what its earlier lives had open."""
        self.spoilt: set[str] = set()
        """Whose state files a fault has taken or changed."""
        self.waiting_for: set[str] = set()
        """Who has not shown yet that it is served after the faults."""
        self.channels: list[tuple[SimProcess, Channel]] = []
        """Every channel that is open, and whose it is."""
        self._touching: dict[tuple[int, int], dict[SimProcess, str]] = {}

    def violation(self, words: str) -> None:
        if len(self.violations) < VIOLATIONS_MAX and not self.over:
            self.kernel.note(f"VIOLATION {words}")
            self.violations.append(f"at {self.kernel.loop.time():.3f} s: {words}")

    def unhandled(self, context: dict[str, Any]) -> None:
        """asyncio says that nobody looked at an exception."""
        error = context.get("exception")
        task = context.get("task") or context.get("future")
        if error is not None and isinstance(error, Exception):
            name = task.get_name() if isinstance(task, asyncio.Task) else context.get("message")
            self.violation(f"nobody handles it that {name} raised {type(error).__name__}: {error}")

    def forget(self, process: SimProcess) -> None:
        """It is gone: what it held is over."""
        for things in (self.runners, self.engines, self.dispatchers, self.nodes, self.fronts):
            things.pop(process, None)
        for request, reading in list(self.open.items()):
            if reading.front is process:
                del self.open[request]
                if not reading.leaves:
                    self.orphans_of(process.name)[request] = reading
        for touching in self._touching.values():
            touching.pop(process, None)
        self.promises.process_ended(process)

    # --- tokens ----------------------------------------------------------------------------------------------------

    def orphans_of(self, front: str) -> dict[str, Reading]:
        return self._orphans.setdefault(front, {})

    def not_recovered(self, request: str, reading: Reading) -> None:
        """Every engine has told what it holds, and nobody knows it any more: front and engine were lost together."""
        if reading.promised and not self.spoilt:
            self.violation(f"request {request} was lost, and the fleet was reported SUSPENDED with it")

    def suspended(self, open_before: Collection[str]) -> None:
        """What was open before somebody asked for it is on disk: whoever dies while it is so, it goes on afterwards."""
        for request in open_before:
            reading = self.open.get(request)
            dispatcher = self.dispatchers.get(reading.front) if reading is not None else None
            if reading is not None and dispatcher is not None and dispatcher.ledger.get(request) is not None:
                reading.promised = (
                    True  # one that has ended and is only not read to its end dies with its front
                )

    def wakes(self) -> None:
        """Somebody asks for the end of the suspension."""
        for readings in (self.open, *self._orphans.values()):
            for reading in readings.values():
                reading.promised = False

    def delivered(self, request: str, reading: Reading, finish: str) -> None:
        """No delivered token changes, is lost or repeated, and each says which weights made it."""
        tokens, versions, limit = reading.tokens, reading.versions, reading.limit
        wrong = wrong_token(reading.prompt, tokens, versions, kept=self.promises.kept_cache)
        if wrong is None and not self.promises.versions_lost:
            wrong = went_back(versions, self.promises.order)
        if wrong is not None:
            self.violation(f"request {request} was told {list(tokens)}: {wrong}")
        if finish == "length" and len(tokens) != limit:
            self.violation(f"request {request} ended as complete with {len(tokens)} of {limit} tokens")
        if finish == "abort" and not self.aborting:
            self.violation(f"request {request} ended as aborted, and nobody asked for that")
        if finish not in ("", "length", "abort"):
            self.violation(f"request {request} ended by {finish!r}")

    # --- KV memory -------------------------------------------------------------------------------------------------

    def touches(self, process: SimProcess, slab: int, slot: int, session: str) -> None:
        """A slot is never handed out while somebody who got it may still touch it."""
        touching = self._touching.setdefault((slab, slot), {})
        life = process.name.rsplit("-r", 1)[0]
        for other, theirs in touching.items():
            if other is not process and (theirs != session or other.name.rsplit("-r", 1)[0] != life):
                self.violation(f"{process} writes slot {slot} for {session} while {other} does for {theirs}")
        touching[process] = session

    def promised(self, process: SimProcess, slab: int, slots: Sequence[int]) -> None:
        for slot in slots:
            self._touching.get((slab, slot), {}).pop(process, None)

    def loaded(self, process: SimProcess, key: bytes, data: bytes, start: int, stop: int) -> None:
        """What passed the check is what was saved for that key."""
        if data != b"".join(content(key, head) for head in range(start, stop)):
            self.violation(f"{process} loaded other bytes than were saved for {key.hex()[:12]}")

    def _check_slab(self, node: Node, memory: SimMemory) -> None:
        """A published block is whole: every shard of it is written, and nobody writes there any more."""
        view = memory.view
        for block in node.store.shelf:
            at = block.slot * SLOT_GRAIN_BYTES
            for head in range(LAYOUT.heads):
                place = at + head * LAYOUT.head_bytes
                if view[place : place + LAYOUT.head_bytes] != content(block.key, head):
                    self.violation(
                        f"block {block.key.hex()[:12]} is published and its head {head} is not there"
                    )
                    return

    # --- books -----------------------------------------------------------------------------------------------------

    def check_everywhere(self) -> None:
        """Each owner's own check, and the slab against the truth."""
        for kind, owners in (
            ("dispatcher", [(p, d.check_integrity) for p, d in self.dispatchers.items()]),
            ("desk", [(p, r.desk.check_integrity) for p, r in self.runners.items() if r.desk is not None]),
            ("store", [(p, n.check_integrity) for p, (n, _) in self.nodes.items()]),
        ):
            for process, check in owners:
                try:
                    check()
                except AssertionError as error:
                    self.violation(f"the books of {process}'s {kind} do not balance: {error!r}")
        for node, memory in self.nodes.values():
            self._check_slab(node, memory)
        self._check_left()

    def _check_left(self) -> None:
        """Nothing runs on for a client who has left. While faults go on its front may be the last to hear of it."""
        for request, (front, left_s) in list(self.left.items()):
            dispatcher = self.dispatchers.get(front)
            if dispatcher is None or dispatcher.ledger.get(request) is None:
                del self.left[request]
            elif self.calm and self.kernel.loop.time() > max(left_s, self.calm_s) + LEFT_SECONDS:
                del self.left[request]
                self.violation(f"request {request} of {front} runs on, and its client left at {left_s:.3f} s")

    def check_wake_ups(self) -> None:
        """When nothing is ready, nobody sleeps over messages."""
        self.channels = [item for item in self.channels if item[1].closed is None and not item[0].dead]
        for process, channel in self.channels:
            try:
                channel.check_integrity()
            except AssertionError as error:
                self.violation(f"a wake-up of {process} was lost: {error}")

    def check_left_over(self) -> None:
        """Served and idle: nothing is held for anybody."""
        for process, dispatcher in self.dispatchers.items():
            entries = {entry.request.id for entry in dispatcher.ledger.entries()} - set(dispatcher.parked)
            if entries:
                self.violation(f"{process} still has requests: {sorted(entries)}")
        # Those of a front that died before it had told a client the answer's name run on for as long as somebody may come for them.
        waiting = sum(len(dispatcher.parked) for dispatcher in self.dispatchers.values())
        for process, runner in self.runners.items():
            if runner.desk is not None and runner.desk.requests > waiting:
                self.violation(f"{process} still has {runner.desk.requests} requests that nobody wants")
        for process, front in self.fronts.items():
            if front.body_bytes:
                self.violation(
                    f"{process} still counts {front.body_bytes} bytes of requests that it has answered"
                )
        for process, (node, _) in self.nodes.items():
            count = node.store.slots.count
            for state in (SlotState.WRITING, SlotState.QUARANTINED):
                if count[state]:
                    self.violation(f"{count[state]} slots of {process} are still {state} with nobody writing")
            if node.store.counters["internal_errors"] or node.store.counters["integrity_failures"]:
                self.violation(f"{process} counted internal errors of its own")
        for request, reading in self.open.items():
            self.violation(f"request {request} of {reading.front} never ended")
        for process in self.kernel.processes.values():
            for task in () if process.dead else process.tasks:
                if task.done() and task._log_traceback:  # nobody has looked at it
                    self.unhandled({"task": task, "exception": task.exception()})
            allowed = 1 if process in self.nodes else 0
            if not process.dead and len(process.fds) > allowed:
                self.violation(f"{process} holds {len(process.fds)} descriptors, {allowed} are in use")


@contextlib.contextmanager
def channels_seen(checks: Checks) -> Iterator[None]:
    """Every channel made meanwhile is told to `checks`."""
    original = Channel.__init__

    def made(channel: Channel, *args: Any, **more: Any) -> None:
        original(channel, *args, **more)
        checks.channels.append((PROCESS.get(), channel))

    with patched(Channel, "__init__", made):
        yield


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
