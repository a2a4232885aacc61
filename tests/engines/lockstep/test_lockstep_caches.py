"""What ranks of a group keep for later: KV blocks in the store that all engines share, snapshots of each rank, whole requests."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent.parent / "connectors"))

from connector_rig import Store
from lockstep_bench import Reading, make_engine
from tiny_models import Bench, Heard, Library, prompts, work

from interlock.core.targets import Mode
from interlock.engines.base import RequestState
from interlock.engines.lockstep.engine import LockstepEngine
from interlock.snapshots.store import SnapshotStore

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="session")]
BLOCK = 16
TRIES = 40
"""On a busy machine a look-up or a grant comes too late now and then, by design: then the prompt is computed."""


@pytest.fixture
def folder(home: Path, request: pytest.FixtureRequest) -> Path:
    """With a short path, which sockets need."""
    path = home / request.node.name[-8:]
    path.mkdir()
    return path


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    store = Store(folder, 64 << 20)
    yield store
    store.close()


@contextlib.asynccontextmanager
async def started(library: Library, folder: Path, **options: Any) -> AsyncIterator[LockstepEngine]:
    engine = make_engine(library, folder / "group", **options)
    try:
        await engine.start()
        yield engine
    finally:
        async with asyncio.timeout(30):
            await engine.stop()


async def on_rank(engine: LockstepEngine, rank: int, key: str, prompt: list[int], **more: Any) -> Heard:
    """The answer of the idle group's rank 0 or 1: while another request runs on rank 0, the next one is rank 1's."""
    beside = Reading(engine, f"beside {key}", [3], 1500) if rank else None
    if beside is not None:
        await beside.until(1)
    reading = Reading(engine, key, prompt, 20, **more)
    await reading.until(1)
    assert engine._streams[key].rank == rank
    await reading.task
    if beside is not None:
        await engine.abort(beside.key)
        await beside.task
    return reading.heard


def cached(heard: Heard) -> int:
    assert heard.last is not None
    return heard.last.cached_tokens


async def test_ranks_read_each_others_blocks_and_a_plain_engine_theirs_until_the_weights_change(
    store: Store, library: Library, folder: Path
) -> None:
    asked = prompts((85, 97))
    async with started(library, folder, store=store.address) as engine:
        for computes, reads in ((0, 1), (1, 0)):
            prompt = asked[computes]
            first = await on_rank(engine, computes, f"computed on {computes}", prompt)
            assert (cached(first), first.tokens) == (0, library.greedy("mixtral", prompt))
            for attempt in range(TRIES):
                other = await on_rank(engine, reads, f"{attempt} on {reads}", prompt)
                assert other.tokens == library.greedy("mixtral", prompt)
                if cached(other) == len(prompt) // BLOCK * BLOCK:
                    break
            assert cached(other) == len(prompt) // BLOCK * BLOCK
        assert engine.counts()["loaded_blocks"] > 0

        plain = Bench(library, "mixtral", folder / "plain", {"store": store.address}, gated=False)
        await plain.start()
        for attempt in range(TRIES):
            (heard,) = await plain.run(work(f"plain {attempt}", asked[0]))
            assert heard.tokens == library.greedy("mixtral", asked[0])
            if cached(heard):
                break
        assert cached(heard) > 0, "an engine without lockstep shares the cache with the group"
        await plain.engine.stop()

        library.model("mixtral", seed=1)
        await engine.pause(Mode.KEEP)
        await engine.update_weights(library.path("mixtral", 1), "v1")
        await engine.unpause()
        for n, prompt in enumerate(asked):
            heard = await on_rank(engine, n, f"{n} by new weights", prompt)
            assert (cached(heard), heard.tokens) == (0, library.greedy("mixtral", prompt, seed=1))


async def test_a_hybrids_ranks_resume_at_their_boundaries_and_its_requests_outlive_their_group(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-Next: recurrent layers and experts. Each rank has snapshots of its own; a request's whole state moves anywhere."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    library.model("qwen3_next")
    long, rest = prompts((85, 30))
    kept, request = folder / "snapshots", work("moved", long, temperature=1.0, seed=5, max_tokens=60)
    options = {"model": str(library.path("qwen3_next")), "model_id": "qwen3_next"}
    plain = Bench(library, "qwen3_next", folder / "plain", {}, gated=False)
    await plain.start()
    (undisturbed,) = await plain.run(request)
    async with started(library, folder, snapshots=str(kept), snapshot_blocks=1, **options) as engine:
        for rank in range(2):
            heard = await on_rank(engine, rank, f"first on {rank}", long)
            assert (cached(heard), heard.tokens) == (0, library.greedy("qwen3_next", long))
        prompt = long[: 4 * BLOCK] + rest
        for rank in range(2):
            await promoted(kept / f"rank-{rank}" / "kept", 5)
            heard = await on_rank(engine, rank, f"again on {rank}", prompt)
            assert (cached(heard), heard.tokens) == (4 * BLOCK, library.greedy("qwen3_next", prompt))

        # Its whole state is on disk when the group dies; another process continues it, random generator and all.
        listening = asyncio.create_task(Heard().listen(engine.generate(request)))
        while engine.load().running == 0:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        await engine.pause(Mode.KEEP)
        state = await engine.take(request.key)
        assert len(state.payload) > 1000, "its caches are with it"
        saved = SnapshotStore(folder / "requests", owner="group")
        assert saved.save(
            "moved", 1, {"state": np.frombuffer(msgspec.msgpack.encode(state), np.uint8)}
        ).accepted
        assert saved.flush(timeout_s=30)
        claim = saved.claim("moved")
        saved.close(erase=False)
        before = (await listening).tokens
    assert 0 < len(before) < 60, "it was to be met in the middle"
    opened = SnapshotStore(folder / "requests", owner="next", claims=[claim])
    snapshot = opened.load("moved", 1)
    assert snapshot is not None
    restored = msgspec.msgpack.decode(bytes(snapshot.tensors["state"].data), type=RequestState)
    heard = await Heard().listen(plain.engine.put(restored))
    assert before + heard.tokens == undisturbed.tokens
    opened.close(erase=True)
    await plain.engine.stop()


async def promoted(folder: Path, count: int) -> None:
    """Until so many boundaries of ended requests are there for later ones."""
    async with asyncio.timeout(20):
        while not folder.is_dir() or len(list(folder.iterdir())) < count:
            await asyncio.sleep(0.01)
