"""A real node on a real Unix socket, in a thread or a process of its own, and ranks in real processes."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlock.core.layouts import KVLayout, Shard, shard_of_rank
from interlock.core.prefixes import KeySalt, chain_keys
from interlock.host.blocking import BlockingHost, monotonic_s, sleep_s
from interlock.host.real import RealHost
from interlock.store.client import StoreClient
from interlock.store.main import slab_number
from interlock.store.node import Node
from interlock.wire.blocking import BlockingChannel
from interlock.wire.identity import load_identity, passing_identity
from interlock.wire.locations import as_list
from interlock.wire.store_messages import Attach, GetStats, NodeMessage

LAYOUT = KVLayout(layers=2, heads=4, block_tokens=4, content=32, dtype="float32")
"""4 heads × 1 KiB: one page a block."""
PATIENCE_S = 10.0
HERE = Path(__file__).parent


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Polls a state that only the node can reach; the deadline is the test's failure."""
    deadline_s = monotonic_s() + PATIENCE_S
    while monotonic_s() < deadline_s:
        if value := condition():
            return value
        sleep_s(0.01)
    raise AssertionError(f"never came true: {what}")


class NodeThread:
    """A node in a thread of this process, so that tests can look into its books."""

    def __init__(self, address: str, state_dir: Path, slab_bytes: int, join_s: float) -> None:
        self.address, self._state_dir, self._slab_bytes, self._join_s = address, state_dir, slab_bytes, join_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="node", daemon=True)
        self._thread.start()
        self.host = RealHost()
        self.node: Node = self.run(self._start())

    async def _start(self) -> Node:
        me = load_identity(self.host, self._state_dir, "store")
        memory = self.host.create_memory("test-slab", self._slab_bytes)
        node = Node(
            self.host, me, memory, slab_number(me.name, me.incarnation), join_s=self._join_s, tick_s=0.02
        )
        await node.start(self.address)
        return node

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def look(self, question: Callable[[Node], Any]) -> Any:
        """Asks between two messages, with the books balanced."""

        async def ask() -> Any:
            self.node.check_integrity()
            return question(self.node)

        return self.run(ask())

    def slots(self) -> dict[str, int]:
        return {str(k): v for k, v in self.look(lambda node: dict(node.store.slots.count)).items()}

    def close(self) -> None:
        self.look(lambda _: None)
        self.run(self.node.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()
        self.host.close()


class NodeProcess:
    """A node as the supervisor starts it."""

    def __init__(self, address: str, state_dir: Path, slab_bytes: int) -> None:
        self.read_fd, self.write_fd = os.pipe()
        program = (
            "import asyncio, sys; from pathlib import Path; from interlock.host.real import RealHost; "
            "from interlock.store.main import StoreConfig, run_node; "
            "asyncio.run(run_node(RealHost(), StoreConfig(address=sys.argv[1], state_dir=Path(sys.argv[2]), "
            "slab_bytes=int(sys.argv[3]))))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, address, str(state_dir), str(slab_bytes)],
            env={**os.environ, "INTERLOCK_PARENT_FD": str(self.read_fd)},
            pass_fds=(self.read_fd,),
        )
        os.close(self.read_fd)

    def close(self) -> int:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1
        return self.process.wait(PATIENCE_S)


class RankProcess:
    """Drives `rank_process.py`."""

    def __init__(self, address: str, attach: Attach, program: str = "rank_process.py") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / program), address, msgspec.json.encode(attach).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            self.say(verb, *arguments)
            return self.hear()

        return ask

    def say(self, verb: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(
            json.dumps([verb, json.loads(msgspec.json.encode(arguments, enc_hook=as_list))]) + "\n"
        )
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        assert ready, "the rank did not answer"
        line = self.process.stdout.readline()
        assert line, "the rank is gone"
        return json.loads(line)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE_S)


class Rig:
    """Makes nodes, ranks and schedulers, and ends them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = f"unix:{directory}/store.sock"
        self._things: list[Any] = []

    def node(self, *, slab_bytes: int = 64 * 4096, join_s: float = 5.0) -> NodeThread:
        return self.add(NodeThread(self.address, self.state_dir(), slab_bytes, join_s))

    def node_process(self, *, slab_bytes: int = 64 * 4096) -> NodeProcess:
        return self.add(NodeProcess(self.address, self.state_dir(), slab_bytes))

    def state_dir(self) -> Path:
        path = self.directory / "state"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def attach(
        self, rank: int | None, ranks: int, engine: str, incarnation: int, layout: KVLayout, **more: Any
    ) -> Attach:
        shard = None
        if rank is not None:
            shard = shard_of_rank(rank, ranks, layers=layout.layers, heads=layout.heads)
        return Attach(engine, incarnation, rank, ranks, layout, shard, **more)

    def rank(
        self,
        rank: int = 0,
        ranks: int = 1,
        *,
        engine: str = "engine-0",
        incarnation: int = 1,
        layout: KVLayout = LAYOUT,
        **more: Any,
    ) -> RankProcess:
        process = self.add(
            RankProcess(self.address, self.attach(rank, ranks, engine, incarnation, layout, **more))
        )
        assert process.ready(PATIENCE_S), process.counts()
        return process

    def shard_rank(self, attach: Attach) -> RankProcess:
        """One that holds any rectangle, and can stop in the middle of a copy (`shard_process`)."""
        process = self.add(RankProcess(self.address, attach, "shard_process.py"))
        assert process.ready(PATIENCE_S), process.counts()
        return process

    def scheduler_process(
        self, ranks: int = 1, *, engine: str = "engine-0", incarnation: int = 1
    ) -> RankProcess:
        process = self.add(RankProcess(self.address, self.attach(None, ranks, engine, incarnation, LAYOUT)))
        assert process.ready(PATIENCE_S), process.counts()
        return process

    def channel(self) -> BlockingChannel:
        """A bare channel, to say what no client would."""
        return self.add(
            BlockingChannel.connect(
                self.address,
                me=passing_identity(BlockingHost(), "bare"),
                role="bare",
                accept=NodeMessage,
                timeout_s=PATIENCE_S,
            )
        )

    def scheduler(
        self,
        ranks: int = 1,
        *,
        engine: str = "engine-0",
        incarnation: int = 1,
        layout: KVLayout = LAYOUT,
        lookup_timeout_s: float = 2.0,
    ) -> StoreClient:
        """In this process. Waits longer than in production: these tests are about what is answered, not how soon."""
        client = StoreClient(
            self.address,
            passing_identity(BlockingHost(), "scheduler"),
            self.attach(None, ranks, engine, incarnation, layout),
            lookup_timeout_s=lookup_timeout_s,
        )
        self.add(client)
        assert client.wait_ready(PATIENCE_S), client.last_error
        return client

    def stats(self) -> dict[str, float]:
        channel = BlockingChannel.connect(
            self.address,
            me=passing_identity(BlockingHost(), "stats"),
            role="stats",
            accept=NodeMessage,
            timeout_s=PATIENCE_S,
        )
        try:
            return dict(channel.request(GetStats(), PATIENCE_S).values)
        finally:
            channel.close()

    def add(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing

    def close(self) -> None:
        for thing in reversed(self._things):
            thing.close()


def make_keys(count: int, *, model: str = "m", start: int = 0) -> tuple[list[bytes], list[bytes]]:
    """A chain of that many keys, and the parent of each."""
    salt = KeySalt(model=model, dtype="float32", layout_digest=LAYOUT.digest())
    keys = chain_keys(range(start, start + 4 * count), 4, salt)
    return keys, [b"", *keys[:-1]]


def save(
    scheduler: StoreClient,
    ranks: list[RankProcess],
    session: str,
    keys: list[bytes],
    parents: list[bytes],
    fill: int = 1,
) -> Any:
    """A whole save, acknowledged by the node."""
    grant = scheduler.start_write(session, 1, keys, parents)
    assert grant is not None, scheduler.counts()
    for rank in ranks:
        sums = rank.write(grant, keys, fill)
        rank.report(grant, [True] * len(sums), sums)
        assert rank.delivered(PATIENCE_S)
    return grant


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


class Tools:
    LAYOUT = LAYOUT
    PATIENCE_S = PATIENCE_S
    Shard = Shard
    eventually = staticmethod(eventually)
    make_keys = staticmethod(make_keys)
    save = staticmethod(save)


@pytest.fixture
def tools() -> type[Tools]:
    return Tools
