"""Snapshots at block boundaries: models that cannot be cut hit at every boundary, with the tokens that they would have made."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_models import Heard, Library, prompts, work

from interlock.cli import serve_checks, serve_plan
from interlock.cli.processes import decode_config
from interlock.core.targets import Mode
from interlock.engines.base import RequestState
from interlock.engines.main import EngineProcessConfig
from interlock.snapshots.start import Claim
from interlock.snapshots.store import SnapshotStore

BLOCK = 16
LONG, REST = prompts((85, 30))
HYBRIDS = ["gemma2", "gemma3", "mamba2", "falcon_h1", "qwen3_next"]
SECONDS = 20.0


async def settled(bench: Any) -> Any:
    """Everything of ended requests is promoted."""
    await bench.engine.pause(Mode.KEEP)
    await bench.engine.unpause()
    made = bench.loop._hooks.boundary
    await asyncio.to_thread(lambda: made._promoter.submit(lambda: None).result(SECONDS))
    return made


@pytest.mark.parametrize("family", HYBRIDS)
async def test_a_prompt_resumes_at_every_boundary_with_the_tokens_it_would_have_had(
    family: str, bench: Any, library: Library, tmp_path: Path
) -> None:
    made = await bench(family, snapshots=str(tmp_path / "snapshots"), snapshot_blocks=1)
    (first,) = await made.run(work("first", LONG))
    assert first.tokens == library.greedy(family, LONG)
    assert first.last.cached_tokens == 0  # type: ignore[union-attr]
    hooks = await settled(made)
    assert len(hooks.store.kept) > 0
    for blocks in range(1, len(LONG) // BLOCK + 1):
        prompt = LONG[: blocks * BLOCK] + REST
        expected = library.greedy(family, prompt)
        (heard,) = await made.run(work(f"after-{blocks}", prompt))
        assert heard.last.cached_tokens == blocks * BLOCK  # type: ignore[union-attr]
        assert heard.tokens == expected
    hooks.store.check_integrity()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
async def test_boundaries_survive_a_restart_and_a_damaged_one_is_computed(
    family: str, bench: Any, library: Library, tmp_path: Path
) -> None:
    where = tmp_path / "snapshots"
    made = await bench(family, snapshots=str(where), snapshot_blocks=1)
    await made.run(work("first", LONG))
    await settled(made)
    await made.engine.stop()
    prompt = LONG[: 4 * BLOCK] + REST
    again = await bench(family, snapshots=str(where), snapshot_blocks=1)
    (heard,) = await again.run(work("a", prompt))
    assert heard.last.cached_tokens == 4 * BLOCK  # type: ignore[union-attr]
    assert heard.tokens == library.greedy(family, prompt)
    await again.engine.stop()
    for path in (where / "kept").iterdir():
        data = bytearray(path.read_bytes())
        data[-4097 if len(data) > 8192 else 4096] ^= 4
        path.write_bytes(data)
    third = await bench(family, snapshots=str(where), snapshot_blocks=1)
    (heard,) = await third.run(work("b", prompt))
    assert heard.last.cached_tokens == 0  # type: ignore[union-attr]
    assert heard.tokens == library.greedy(family, prompt)


async def test_what_serve_plans_hits_at_its_boundaries_and_stays_within_its_bytes(
    bench: Any, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's part of the fleet's plan, encoded and decoded as for its process; the directory is made by the engine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.model("gemma3")
    asked = serve_checks.Asked(
        model=library.path("gemma3"), architecture="a", served_name="m", kinds=["transformers"], tensor_parallel=1,
        host="127.0.0.1", port=8123, store_bytes=1, api_key=None, vllm_arguments=[],
        snapshot_bytes=serve_checks.chosen_snapshot_bytes(0.01, ["transformers"], 1),
    )  # fmt: skip
    part = serve_plan.make_plan(asked, _made(tmp_path / "run"), "gemma3").engines[0]
    planned = decode_config(part.config, EngineProcessConfig).transformers
    assert planned is not None
    wanted = {name: getattr(planned, name) for name in ("snapshots", "snapshot_bytes", "snapshot_blocks")}
    made = await bench("gemma3", **wanted)
    await made.run(work("first", LONG))
    hooks = await settled(made)
    (heard,) = await made.run(work("second", LONG[:70] + REST))
    assert heard.last.cached_tokens == serve_plan.SNAPSHOT_BLOCKS * BLOCK  # type: ignore[union-attr]
    assert heard.tokens == library.greedy("gemma3", LONG[:70] + REST)
    stats = hooks.store.stats()
    assert (
        stats.budget.disk_bytes + hooks.store.kept._bytes_max
        == planned.snapshot_bytes
        == int(0.01 * (1 << 30))
    )
    assert (tmp_path / "cache/interlock/snapshots/8123/engine-0").stat().st_mode & 0o777 == 0o700


def _made(path: Path) -> Path:
    path.mkdir()
    return path


async def test_without_its_directory_an_engine_serves_and_its_chunks_stay_long(
    bench: Any, library: Library, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    made = await bench("gemma3", snapshots=str(tmp_path / "file"), snapshot_blocks=1)
    (heard,) = await made.run(work("first", LONG))
    assert heard.tokens == library.greedy("gemma3", LONG)
    assert made.loop.scheduler.limits.stop_every_blocks is None


def test_a_lowered_bound_holds_from_the_start(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "s", owner="a")
    for number in range(4):
        assert store.save("r", number, {"x": np.zeros(1000, np.float32)}).accepted
    assert store.flush("r", SECONDS)
    assert all(store.promote("r", number, f"{number:032x}") for number in range(4))
    whole = store.kept.bytes
    store.close(erase=True)
    store = SnapshotStore(tmp_path / "s", owner="b", kept_bytes_max=whole // 2)
    assert 0 < store.kept.bytes <= whole // 2
    assert len(list((tmp_path / "s/kept").iterdir())) == len(store.kept)
    store.close(erase=True)


async def test_an_aborted_request_and_another_salt_reuse_nothing_wrong(
    bench: Any, library: Library, tmp_path: Path
) -> None:
    made = await bench("gemma3", snapshots=str(tmp_path / "s"), snapshot_blocks=1)
    await made.run(work("first", LONG))
    await settled(made)
    other = msgspec.structs.replace(work("other", LONG), cache_salt="another tenant")
    (heard,) = await made.run(other)
    assert heard.last.cached_tokens == 0  # type: ignore[union-attr]
    assert heard.tokens == library.greedy("gemma3", LONG)


CHILD = """
import asyncio, sys, msgspec, numpy as np
from pathlib import Path
sys.path.append(sys.argv[1])
from tiny_models import work
from interlock.core.targets import Mode
from interlock.engines.transformers.engine import TransformersEngine
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost
from interlock.snapshots.store import SnapshotStore

async def main():
    folder, family, checkpoint = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    (folder / "scratch").mkdir(parents=True)
    engine = TransformersEngine(RealHost(), TransformersConfig(
        model=checkpoint, model_id=family, name="doomed", state_dir=str(folder / "state"),
        scratch_dir=str(folder / "scratch"), log=str(folder / "log"), step_tokens=32, block_tokens=16))
    await engine.start()
    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=type(work("x", [1])))
    seen, taken = 0, None
    async def listen():
        nonlocal seen
        async for progress in engine.generate(request):
            seen += len(progress.tokens)
            if seen >= 5 and not reached.is_set():
                reached.set()
    reached = asyncio.Event()
    task = asyncio.create_task(listen())
    await reached.wait()
    await engine.pause(Mode.KEEP)
    state = await engine.take(request.key)
    store = SnapshotStore(folder / "snapshots", owner="doomed")
    data = np.frombuffer(msgspec.msgpack.encode(state), np.uint8)
    assert store.save(request.key, len(state.tokens), {"state": data}).accepted
    assert store.flush(timeout_s=30)
    claim = store.claim(request.key)
    print(msgspec.json.encode([claim, state.tokens]).decode(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["gemma3", "falcon_h1"])
async def test_a_request_outlives_the_process_that_ran_it(
    family: str, temperature: float, bench: Any, library: Library, tmp_path: Path
) -> None:
    """Its whole state is saved, the process gets SIGKILL, and another one continues it token for token."""
    request = work("a", LONG, temperature=temperature, seed=11, max_tokens=60)
    made = await bench(family)
    (undisturbed,) = await made.run(request)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "child"), family,
         str(library.path(family))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.msgpack.encode(request))
    child.stdin.close()
    told = await asyncio.to_thread(child.stdout.readline)
    child.send_signal(signal.SIGKILL)
    await asyncio.to_thread(child.wait, SECONDS)
    child.stdout.close()
    claim, before = msgspec.json.decode(told, type=tuple[Claim, list[int]])
    assert 5 <= len(before) < 60, "it was to be killed in the middle"
    store = SnapshotStore(tmp_path / "child/snapshots", owner="next", claims=[claim])
    snapshot = store.load("a", len(before))
    assert snapshot is not None
    state = msgspec.msgpack.decode(bytes(snapshot.tensors["state"].data), type=RequestState)
    heard = await Heard().listen(made.engine.put(state))
    assert before + heard.tokens == undisturbed.tokens
    store.close(erase=True)
