"""What `interlock serve` starts: the configuration of each process, from what was asked."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import msgspec

from interlock.cli.processes import encode_config
from interlock.cli.serve_checks import Asked
from interlock.fleet.coordinator import CoordinatorConfig
from interlock.fleet.launchers.local import Part
from interlock.fleet.plan import FleetPlan

SNAPSHOT_BLOCKS = 4
"""Between two boundaries where a prompt can resume: with fewer a prompt is computed in more and smaller steps."""
VERSION = "0"
"""Of the weights that every engine loads at start."""


def make_plan(asked: Asked, run: Path, model_id: str) -> FleetPlan:
    """The parts of the fleet and the configuration of each, for the run directory `run`, in which it writes the admin token."""
    coordinator = f"unix:{run / 'coordinator.sock'}"
    store = f"unix:{run / 'store.sock'}"
    states = asked.state or run / "state"
    if asked.state is None:
        states.mkdir(mode=0o700)
    token = run / "admin-token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(16))
    return FleetPlan(
        coordinator=_coordinator_part(asked, coordinator, states),
        store=_store_part(asked, store, states),
        engines=[
            _engine_part(asked, i, run, states, coordinator, store, model_id) for i in range(asked.engines)
        ],
        front=_front_part(asked, coordinator, states, token),
        coordinator_address=coordinator,
        store_address=store,
        http_host=asked.host,
        http_port=asked.port,
        example=_example(asked),
        states=states,
        outlives=asked.state is not None,
    )


def _example(asked: Asked) -> str:
    key = ' -H "Authorization: Bearer $INTERLOCK_API_KEY"' if asked.api_key else ""
    question = msgspec.json.encode(
        {"model": asked.served_name, "prompt": "def main():", "max_tokens": 32}
    ).decode()
    braces = question.replace("{", "{{").replace("}", "}}").replace("'", "'\\''")
    return f"  try: curl {{url}}/v1/completions -H 'Content-Type: application/json'{key} -d '{braces}'"


def _coordinator_part(asked: Asked, address: str, states: Path) -> Part:
    config = CoordinatorConfig(
        address=address,
        state_dir=states / "coordinator",
        version=VERSION,
        expected=[f"engine-{i}" for i in range(asked.engines)],
        launches=True,
    )
    return Part(name="coordinator", kind="coordinator", config=encode_config(config))


def _store_part(asked: Asked, address: str, states: Path) -> Part:
    from interlock.store.main import StoreConfig

    config = StoreConfig(
        address=address,
        state_dir=states / "store",
        slab_bytes=asked.store_bytes,
        disk=asked.disk,
        disk_bytes=asked.disk_bytes,
        name=asked.store_name,
        peers=asked.peers,
        end_frozen_writers=True,
    )
    return Part(name="store", kind="store", config=encode_config(config))


def _front_part(asked: Asked, coordinator: str, states: Path, token: Path) -> Part:
    from interlock.web.main import FrontConfig

    config = FrontConfig(
        coordinator_address=coordinator,
        model_dir=asked.model,
        served_model_name=asked.served_name,
        state_dir=states / "front",
        host=asked.host,
        port=asked.port,
        api_key=asked.api_key,
        admin_token_file=token,
    )
    return Part(name="front", kind="front", config=encode_config(config))


def _engine_part(
    asked: Asked, index: int, run: Path, states: Path, coordinator: str, store: str, model_id: str
) -> Part:
    from interlock.engines.main import EngineProcessConfig
    from interlock.engines.runner import RunnerConfig
    from interlock.engines.transformers.setup import TransformersConfig
    from interlock.engines.vllm_setup import VllmConfig

    name = f"engine-{index}"
    common: dict[str, Any] = {
        "model": str(asked.model),
        "model_id": model_id,
        "name": name,
        "store": store,
        "state_dir": str(states / f"{name}-kv"),
        "scratch_dir": str(run / f"v{index}"),  # vLLM's socket paths have 107 bytes at most
        "tensor_parallel": asked.tensor_parallel,
        "threads": threads_per_rank(asked),
        "log": str(run / f"{name}.log"),
    }
    vllm = asked.kinds[index] == "vllm"
    snapshots: dict[str, Any] = {}
    if asked.snapshot_bytes:
        snapshots = {
            "snapshots": str(snapshot_folder(asked.port, name)),
            "snapshot_bytes": asked.snapshot_bytes,
            "snapshot_blocks": SNAPSHOT_BLOCKS,
        }
    config = EngineProcessConfig(
        runner=RunnerConfig(
            name=name,
            address=f"unix:{run / f'{name}.sock'}",
            coordinator=coordinator,
            state_dir=states / name,
            version=VERSION,
            weights=str(asked.model),
        ),
        vllm=VllmConfig(**common, arguments=asked.vllm_arguments) if vllm else None,
        transformers=None
        if vllm
        else TransformersConfig(
            **common,
            **snapshots,
            data_parallel=asked.data_parallel,
            lockstep_step_seconds=asked.step_seconds,
        ),
        failure=run / f"{name}.failure",
        shared_memory=run / f"{name}.shm",
    )
    return Part(name=name, kind="engine", config=encode_config(config))


def snapshot_folder(port: int, engine: str) -> Path:
    """Beside the models in the cache, not in the run directory: that is memory on many machines, and goes with the fleet."""
    from interlock.engines.demo_model import cache_folder

    return cache_folder().parent / "snapshots" / str(port) / engine


def threads_per_rank(asked: Asked) -> int:
    """One core is left to coordinator, store, fronts and runners. OpenMP threads that have to wait for a core spin, and
    a rank with one thread too many is ten times slower than one with one too few (measured)."""
    cores = len(os.sched_getaffinity(0))
    return max(1, (cores - 1) // (asked.engines * asked.tensor_parallel * asked.data_parallel))
