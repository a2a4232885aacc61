"""The NIXL lane: an agent pair (UCX) carries the bytes, one-sided: RDMA and GPU memory where there are any, else its TCP or shared memory.

NIXL moves bytes and leaves to its user not to corrupt memory (peers' buffers that are gone, buffers given back while a transfer runs). What we
add is the endpoint around it. The lane has a connection of ours, as a TCP lane has; over it the reader asks for a segment (the owner registers it
with its agent on first demand and answers with that part of its metadata), and asks again after the bytes arrived whether it still stands,
for the owner does not see one-sided reads. A transfer's buffers are released only when its NIXL request ended: `release_xfer_handle` does not
promise that no byte lands, so a request that does not end keeps its buffers, and says so.

What was run: UCX over its TCP and its shared memory, on CPU memory. What was written and not run here: RDMA devices, "VRAM" (CUDA) memory.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np

from interlock.core.endpoint_state import Lane as LaneName
from interlock.core.errors import LocalProtocolError
from interlock.host.base import Host
from interlock.host.blocking import sleep_s
from interlock.host.bulk import BulkSocket
from interlock.host.threads import Lock
from interlock.transfer.lanes.base import Pairing
from interlock.transfer.lanes.carriers import CarriedLane
from interlock.transfer.lanes.pulling import MapAnswer
from interlock.transfer.lanes.tcp import TcpKind
from interlock.transfer.memory import Memory
from interlock.transfer.outcomes import Transfer
from interlock.transfer.pieces import Chunk
from interlock.transfer.segments import PieceRefused

POLL_SECONDS = 0.00005
CPU, GPU = "DRAM", "VRAM"


class NixlView(msgspec.Struct, frozen=True, array_like=True):
    """The owner's answer: how its agent's memory is named."""

    agent: str
    metadata: bytes
    address: int
    size_bytes: int
    kind: str
    device: int


_views = msgspec.msgpack.Decoder(NixlView)


def place_of(memory: Memory) -> tuple[str, int]:
    """(NIXL's word for the kind of memory, device number). Raises `LocalProtocolError` for a device it has no word for."""
    name, _, number = memory.device.partition(":")
    if name not in ("cpu", "cuda"):
        raise LocalProtocolError(f"memory on {memory.device} cannot be registered with NIXL")
    return (CPU, 0) if name == "cpu" else (GPU, int(number or 0))


class NixlKind(TcpKind):
    """Lanes over one NIXL agent of this process; what NIXL cannot reach falls back to the next lane."""

    kind = "nixl"
    rank = 1

    def __init__(self, *arguments: Any, machine: Host, backend: str = "UCX", **options: Any) -> None:
        super().__init__(*arguments, connections=1, **options)
        self._machine, self._backend = machine, backend
        self._name = f"{self._me}-{os.urandom(6).hex()}"
        self._agent: Any = None
        self._lock = Lock()
        self._registered: dict[int, Any] = {}
        self._segments.on_revoke.append(self._revoked)

    async def start(self) -> None:
        """Raises `LocalProtocolError` when NIXL is not installed or its back-end does not come up."""
        try:
            self._agent = await self._machine.in_thread(self._make_agent)
        except ImportError as error:
            raise LocalProtocolError(
                f"NIXL is not installed: {error}", hint="install nixl and nixl-cu12, or leave the lane out"
            ) from error
        except Exception as error:
            raise LocalProtocolError(f"NIXL's {self._backend} back-end did not start: {error}") from error
        await super().start()

    def _make_agent(self) -> Any:
        from nixl._api import nixl_agent, nixl_agent_config

        return nixl_agent(self._name, nixl_agent_config(backends=[self._backend]))

    def make_lane(
        self,
        name: LaneName,
        pairing: Pairing,
        broken: Callable[[str], None],
        dial: Callable[[str, int], Awaitable[BulkSocket]] | None,
    ) -> NixlLane:
        return NixlLane(
            name,
            pairing,
            self._pool,
            self._segments,
            broken,
            mapper=self._map,
            dial=dial,
            agent=self._agent,
            agent_lock=self._lock,
        )

    def _map(self, number: int, incarnation: int) -> tuple[bytes, int | None]:
        segment = self._segments.named(number, incarnation)
        kind, device = place_of(segment.memory)
        with self._lock:
            if not self._segments.has(
                segment
            ):  # it went while we waited for the lock, and `_revoked` with it
                raise PieceRefused("revoked", f"{segment} is not registered any more")
            if number not in self._registered:
                row = (segment.memory.address, segment.memory.size_bytes, device, "")
                self._registered[number] = self._agent.register_memory([row], kind)
            metadata = self._agent.get_partial_agent_metadata(self._registered[number], True, [self._backend])
        view = NixlView(self._name, metadata, segment.memory.address, segment.memory.size_bytes, kind, device)
        return msgspec.msgpack.encode(view), None

    def _revoked(self, number: int) -> None:
        """No reader can reach it any more: an RDMA device refuses what is not registered."""
        with self._lock:
            registered = self._registered.pop(number, None)
            if registered is not None:
                self._agent.deregister_memory(registered)

    async def close(self) -> None:
        await super().close()
        self._segments.on_revoke.remove(self._revoked)
        with self._lock:
            for registered in self._registered.values():
                self._agent.deregister_memory(registered)
            self._registered.clear()
            self._agent = None


class NixlLane(CarriedLane):
    """Its bytes go between the agents."""

    def __init__(self, *arguments: Any, agent: Any, agent_lock: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.agent, self.agent_lock = agent, agent_lock
        self.remotes: set[str] = set()

    def _carry(self, transfer: Transfer, *, here: bool) -> bool:  # noqa: ARG002 - never in the caller's thread
        if not self._may_carry(transfer) or not self.pulls:
            return False
        run = _Run(self, transfer)
        if not self._employ(transfer, run):
            return transfer.over or not transfer.has_pending
        self._pool.run(run.begin)
        return True

    def ask(self, number: int, incarnation: int, tell: Callable[[MapAnswer], None]) -> None:
        pull = self.asker()
        if pull is None:
            tell(MapAnswer(broken="the lane has no connection any more"))
        else:
            pull.ask_map(number, incarnation, tell)

    def go_on(self, step: Callable[[], None]) -> None:
        self._pool.run(step)

    def _left(self) -> None:
        """Every request of the agent ended: until then bytes may land."""
        with self.agent_lock:
            for remote in self.remotes:
                self.agent.remove_remote_agent(remote)

    def explain(self) -> list[str]:
        return [*super().explain(), "its bytes go between two NIXL agents"]


class _Run:
    """One transfer over the agents: ask for each segment, read a chunk, ask again, and so on; one thread at a time."""

    def __init__(self, lane: NixlLane, transfer: Transfer) -> None:
        self._lane, self._transfer = lane, transfer
        self._views: dict[int, NixlView] = {}
        self._local: list[Any] = []
        self._chunk: Chunk | None = None
        self._handle: Any = None
        self._to_ask: list[int] = []

    def look(self) -> None:
        """Nothing can be stopped: it is left when its request ended."""

    def begin(self) -> None:
        try:
            with self._lane.agent_lock:
                for memory in self._transfer.plan.holders:
                    kind, device = place_of(memory)
                    row = (memory.address, memory.size_bytes, device, "")
                    self._local.append((kind, device, memory, self._lane.agent.register_memory([row], kind)))
        except Exception as error:
            self._leave(f"NIXL did not register the buffer: {error}")
            return
        self._next()

    def _next(self) -> None:
        self._chunk = self._transfer.take(self)
        if self._chunk is None:
            self._leave("")
            return
        numbers = {int(number) for number in np.unique(self._chunk.requests[:, 0])}
        self._to_ask = sorted(numbers - self._views.keys())
        self._ask_then(self._start)

    def _ask_then(self, then: Callable[[], None]) -> None:
        if not self._to_ask:
            self._lane.go_on(then)
            return
        number = self._to_ask.pop()

        def told(answer: MapAnswer) -> None:
            if answer.refused is not None:
                self._transfer.fail(answer.refused.code, answer.refused.message)
                self._leave("")
            elif answer.broken:
                self._give_up(answer.broken)
            else:
                try:
                    self._views[number] = _views.decode(answer.detail)
                except (msgspec.MsgspecError, ValueError) as error:
                    self._give_up(f"the owner's answer makes no sense: {error}")
                    return
                self._ask_then(then)

        self._lane.ask(number, self._transfer.plan.incarnation, told)

    def _start(self) -> None:
        """A NIXL request has one kind of memory on each side; pieces of others are told apart by it."""
        assert self._chunk is not None
        try:
            with self._lane.agent_lock:
                self._handle = self._request(self._chunk)
                state = self._lane.agent.transfer(self._handle)
        except PieceRefused as refused:
            self._transfer.fail(refused.code, refused.message)
            self._leave("")
            return
        except Exception as error:
            self._give_up(f"NIXL: {error}")
            return
        self._poll(state)

    def _request(self, chunk: Chunk) -> Any:
        agent, numbers = self._lane.agent, {int(n) for n in np.unique(chunk.requests[:, 0])}
        views = [self._views[number] for number in sorted(numbers)]
        kinds = {view.kind for view in views} | {kind for kind, *_ in self._local}
        if len({view.kind for view in views}) > 1 or len({kind for kind, *_ in self._local}) > 1:
            raise PieceRefused("refused", f"one transfer mixes memory of the kinds {sorted(kinds)}")
        source, into = [], []
        for (number, offset, size), (address, _) in zip(
            chunk.requests.tolist(), chunk.into.tolist(), strict=True
        ):
            view = self._views[number]
            if offset + size > view.size_bytes:
                raise PieceRefused("bounds", f"a piece does not lie in segment {number}")
            source.append((view.address + offset, size, view.device))
            into.append((address, size, self._local[0][1]))
        remote = ""
        for view in views:
            remote = agent.add_remote_agent(view.metadata)
            remote = remote.decode() if isinstance(remote, bytes) else remote
        self._lane.remotes.add(remote)
        return agent.initialize_xfer(
            "READ",
            agent.get_xfer_descs(into, self._local[0][0]),
            agent.get_xfer_descs(source, views[0].kind),
            remote,
            b"",
        )

    def _poll(self, state: str) -> None:
        """The thread is given back between looks, so that a request that never ends holds no thread."""
        lane = self._lane
        for _ in range(20):
            if state != "PROC":
                break
            sleep_s(POLL_SECONDS)
            with lane.agent_lock:
                state = lane.agent.check_xfer_state(self._handle)
        if state == "PROC":
            lane.go_on(lambda: self._poll("PROC"))
            return
        with lane.agent_lock:
            lane.agent.release_xfer_handle(self._handle)
            self._handle = None
        if state != "DONE":
            self._give_up(f"NIXL ended the request in {state}")
            return
        assert self._chunk is not None
        self._to_ask = [int(number) for number in np.unique(self._chunk.requests[:, 0])]
        self._ask_then(self._stood)

    def _stood(self) -> None:
        """The segments stood before and after: the bytes are theirs."""
        self._transfer.done(self, self._lane.name.kind)
        self._next()

    def _give_up(self, why: str) -> None:
        self._transfer.give_back(self, 0, self._lane.name.kind)
        self._leave(why)

    def _leave(self, why: str) -> None:
        with self._lane.agent_lock:
            for *_, registered in self._local:
                self._lane.agent.deregister_memory(registered)
        self._local.clear()
        self._transfer.leave(self, why)
        self._lane.leave(self)
