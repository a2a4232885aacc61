"""`interlock serve`: checks what was asked, then supervises. All checks come before the first process starts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from interlock import __version__
from interlock.cli import store_peers
from interlock.cli.errors import Failure, Usage
from interlock.cli.processes import encode_config
from interlock.core.limits import MEMBERS_MAX
from interlock.fleet.coordinator import CoordinatorConfig
from interlock.fleet.launchers.local import LocalLauncher, Part
from interlock.fleet.launchers.rundir import RunDir, RunDirBusy
from interlock.fleet.supervisor import FleetPlan, Supervisor
from interlock.host.ports import bind_port
from interlock.host.real import RealHost
from interlock.host.sealed import seal, unseal
from interlock.host.sweep import FileLock

if TYPE_CHECKING:
    from interlock.store.peer_links import PeersConfig

GIB = 1 << 30
RUN_DIR_BYTES_MAX = 107 - len("/v1023/") - 36
"""vLLM names its sockets by 36 characters in a folder of ours; the kernel takes 107 bytes."""
OWNER_BYTES_MAX = 64 * 1024
ENGINES_DEFAULT = 2
SNAPSHOTS_GIB_DEFAULT = 2.0
SNAPSHOT_BLOCKS = 4
"""Between two boundaries where a prompt can resume: with fewer a prompt is computed in more and smaller steps."""
KINDS = {"vllm": "vLLM", "transformers": "Transformers"}
VERSION = "0"
"""Of the weights that every engine loads at start."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, checked."""

    model: Path
    architecture: str
    served_name: str
    kinds: list[str]
    """Of each engine, in order: "vllm" or "transformers"."""
    tensor_parallel: int
    data_parallel: int = 1
    host: str
    port: int
    store_bytes: int
    disk: Path | None = None
    disk_bytes: int = 0
    store_name: str = "store"
    peers: PeersConfig | None = None
    """Nodes of other fleets, whose blocks are read; None: the store is alone."""
    state: Path | None = None
    """Where the fleet's state outlives it; None: in the run directory, and gone with it."""
    snapshot_bytes: int = 0
    """Of each Transformers engine; 0: no boundary snapshots."""
    api_key: str | None
    vllm_arguments: list[str]

    @property
    def engines(self) -> int:
        return len(self.kinds)


def serve(parsed: argparse.Namespace, vllm_arguments: list[str]) -> int:
    """Returns the exit status. Raises `Usage` and `Failure`."""
    say(f"interlock {__version__}")
    asked = check(parsed, vllm_arguments)
    return asyncio.run(_serve(asked))


def say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


# --- checking ----------------------------------------------------------------------------------------------------


def check(parsed: argparse.Namespace, vllm_arguments: list[str]) -> Asked:
    """Everything that can be known before a process starts. Builds the demo model when no other is named."""
    from interlock.engines.checkpoint import (
        BadCheckpoint,
        check_data_parallel,
        check_tensor_parallel,
        read_checkpoint,
    )
    from interlock.engines.vllm_args import RefusedArgument, check_vllm_args

    api_key = parsed.api_key or os.environ.get("INTERLOCK_API_KEY") or None
    if not _is_loopback(parsed.host) and api_key is None:
        raise Usage(
            f"--host {parsed.host} can be reached by others, so it needs --api-key KEY; "
            "or listen on 127.0.0.1, which is the default"
        )
    kinds = chosen_kinds(parsed.engine, parsed.engines)
    if vllm_arguments and "vllm" not in kinds:
        raise Usage("arguments after -- are for vLLM, and no vLLM engine is asked for")
    _check_ranks(kinds, parsed.tp, parsed.data_parallel)
    snapshot_bytes = chosen_snapshot_bytes(parsed.snapshots_gib, kinds, parsed.tp)
    peers = store_peers.config_of_fleet(parsed)
    try:
        check_vllm_args(vllm_arguments)
        if parsed.model is not None:
            read_checkpoint(parsed.model)  # before the port: the likelier mistake
        _check_port(parsed.host, parsed.port)
        model = parsed.model if parsed.model is not None else str(_demo_model())
        checkpoint = read_checkpoint(model)
        check_tensor_parallel(checkpoint, parsed.tp)
        check_data_parallel(checkpoint, parsed.data_parallel)
    except (BadCheckpoint, RefusedArgument) as error:
        raise Usage(str(error)) from error
    default_name = checkpoint.path.name if parsed.model is not None else "demo"
    return Asked(
        model=checkpoint.path,
        architecture=checkpoint.architecture,
        served_name=parsed.served_model_name or default_name,
        kinds=kinds,
        tensor_parallel=parsed.tp,
        data_parallel=parsed.data_parallel,
        host=parsed.host,
        port=parsed.port,
        store_bytes=int(parsed.store_gib * GIB),
        disk=parsed.disk,
        disk_bytes=int(parsed.disk_gib * GIB) if parsed.disk is not None else 0,
        store_name=parsed.store_name,
        peers=peers,
        state=parsed.state_dir.expanduser().resolve() if parsed.state_dir is not None else None,
        snapshot_bytes=snapshot_bytes,
        api_key=api_key,
        vllm_arguments=vllm_arguments,
    )


def chosen_kinds(asked: list[list[tuple[str, int | None]]] | None, engines: int | None) -> list[str]:
    """One kind for each engine, from `--engine` (repeated, in lists, with numbers or without) and `--engines`.

    Raises `Usage`.
    """
    named = [one for group in asked or [[("vllm", None)]] for one in group]
    numbered = [count is not None for _, count in named]
    if any(numbered) and not all(numbered):
        raise Usage("--engine: give a number for every kind or for none, as in vllm:1,transformers:2")
    if all(numbered):
        kinds = [kind for kind, count in named for _ in range(count or 0)]
        if engines is not None and engines != len(kinds):
            raise Usage(
                f"--engines {engines} and --engine do not agree: that names {len(kinds)}; leave --engines out"
            )
    elif len(named) == 1:
        kinds = [named[0][0]] * (ENGINES_DEFAULT if engines is None else engines)
    elif engines is None or engines == len(named):
        kinds = [kind for kind, _ in named]
    else:
        raise Usage(
            f"--engines {engines} of {len(named)} kinds: say how many of each, as in vllm:1,transformers:2"
        )
    if len(kinds) > MEMBERS_MAX:
        raise Usage(f"{len(kinds)} engines are more than the {MEMBERS_MAX} that a fleet can have")
    return kinds


def _check_ranks(kinds: list[str], tensor_parallel: int, data_parallel: int) -> None:
    """Raises `Usage`."""
    if data_parallel > 1 and "vllm" in kinds:
        raise Usage(f"--data-parallel {data_parallel} is for Transformers engines: add --engine transformers")
    if data_parallel > 1 and tensor_parallel > 1:
        raise Usage(
            f"--data-parallel {data_parallel} and --tp {tensor_parallel} do not go together; choose one"
        )


def chosen_snapshot_bytes(asked_gib: float | None, kinds: list[str], tensor_parallel: int) -> int:
    """What each Transformers engine has for boundary snapshots. Raises `Usage`."""
    able = "transformers" in kinds and tensor_parallel == 1
    if asked_gib is None:
        return int(SNAPSHOTS_GIB_DEFAULT * GIB) if able else 0
    if asked_gib and "transformers" not in kinds:
        raise Usage("--snapshots-gib is for Transformers engines, and none is asked for")
    if asked_gib and not able:
        raise Usage(f"--snapshots-gib needs engines of one rank; leave it or --tp {tensor_parallel} out")
    return int(asked_gib * GIB)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    try:
        bind_port(host, port).close()
    except OSError as error:
        raise Failure(error.strerror or str(error)) from error


def _demo_model() -> Path:
    from interlock.engines.demo_model import build_demo_model, demo_model_path

    if not demo_model_path().is_dir():
        say("  building the demo model (once, some seconds)")
    try:
        return build_demo_model()
    except OSError as error:
        raise Failure(
            f"the demo model cannot be built in {demo_model_path().parent}: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder that can be written, or name a MODEL"
        ) from error


# --- serving -----------------------------------------------------------------------------------------------------


async def _serve(asked: Asked) -> int:
    host = RealHost()
    mark = secrets.token_hex(16)
    try:
        run_dir = await RunDir.claim(host, asked.port, mark)
    except (RunDirBusy, OSError) as error:
        raise Failure(str(error)) from error
    states: FileLock | None = None
    try:
        _check_length(run_dir.path)
        model_id = _model_identity(host, asked.model)
        states = _claim_states(host, asked.state, StateOwner(model_id, asked.kinds))
        plan = make_plan(asked, run_dir.path, model_id)
        engines = _engines_in_words(asked.kinds)
        size = asked.tensor_parallel * asked.data_parallel
        ranks = f" of {size} ranks{' in lockstep' if asked.data_parallel > 1 else ''}" if size > 1 else ""
        say(
            f"  {engines}{ranks}, {asked.architecture} from {asked.model}, "
            f"{asked.store_bytes / GIB:.2f} GiB of shared KV cache; logs in {run_dir.path}"
        )
        launcher = LocalLauncher(host, run_dir.path, mark)
        supervisor = Supervisor(host, launcher, plan, say)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            status = 0 if number is not signal.SIGHUP else 128 + number
            loop.add_signal_handler(number, supervisor.leave, f"got {number.name}: leaving", status)
        try:
            status = await supervisor.run()
            if status == 0:
                return 0
            print("interlock: the fleet has ended, the lines above say why", file=sys.stderr)
            return status
        finally:
            launcher.close()
    finally:
        run_dir.remove()
        if states is not None:
            states.release()


class StateOwner(msgspec.Struct, frozen=True):
    """Whose state a directory holds: requests go on only with the same weights, in engines of the same names."""

    model: str
    engines: list[str]


def _claim_states(host: RealHost, folder: Path | None, owner: StateOwner) -> FileLock | None:
    """One fleet at a time begins where the last one in that directory ended. Raises `Failure`."""
    if folder is None:
        return None
    try:
        host.files.make_private_dir(folder)
        lock = FileLock.take(folder / "lock")
    except OSError as error:
        raise Failure(f"--state-dir {folder} cannot be used: {error}") from error
    if lock is None:
        raise Failure(f"--state-dir {folder} is in use by another fleet; end that one, or name another")
    try:
        _check_owner(host, folder / "fleet.json", owner)
    except BaseException:
        lock.release()
        raise
    return lock


def _check_owner(host: RealHost, path: Path, owner: StateOwner) -> None:
    try:
        data = host.files.read(path, OWNER_BYTES_MAX)
        if data is None:
            host.files.write_durably(path, seal(msgspec.json.encode(owner)))
            return
        found = msgspec.json.decode(unseal(data), type=StateOwner)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} cannot be used: {error}; name another --state-dir") from error
    if found != owner:
        what = "another model" if found.model != owner.model else f"engines {', '.join(found.engines)}"
        raise Failure(
            f"--state-dir {path.parent} is the state of a fleet of {what}, whose requests cannot go on in this one; "
            "start it as it was, or name another --state-dir"
        )


def _engines_in_words(kinds: list[str]) -> str:
    counts = [(kinds.count(kind), KINDS[kind]) for kind in dict.fromkeys(kinds)]
    words = " and ".join(f"{count} {name}" for count, name in counts)
    return f"{words} engine{'s' if len(kinds) > 1 else ''}"


def _check_length(run: Path) -> None:
    if len(os.fsencode(run)) > RUN_DIR_BYTES_MAX:
        raise Failure(
            f"the run directory {run} has too long a path for sockets; set XDG_RUNTIME_DIR to a folder with a path of "
            f"at most {RUN_DIR_BYTES_MAX - 20} bytes"
        )


def _model_identity(host: RealHost, model: Path) -> str:
    """By content, remembered by (path, size, time): equal names mean equal tokens and a common KV cache."""
    from interlock.engines.demo_model import cache_folder
    from interlock.store.models import UnknownModelError, model_identity

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    try:
        return model_identity(str(model), None, files=host.files, cache=cache / "digests.json")
    except UnknownModelError as error:
        raise Failure(str(error)) from error


def threads_per_rank(asked: Asked) -> int:
    """One core is left to coordinator, store, fronts and runners. OpenMP threads that have to wait for a core spin, and
    a rank with one thread too many is ten times slower than one with one too few (measured)."""
    cores = len(os.sched_getaffinity(0))
    return max(1, (cores - 1) // (asked.engines * asked.tensor_parallel * asked.data_parallel))


def make_plan(asked: Asked, run: Path, model_id: str) -> FleetPlan:
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


def snapshot_folder(port: int, engine: str) -> Path:
    """Beside the models in the cache, not in the run directory: that is memory on many machines, and goes with the fleet."""
    from interlock.engines.demo_model import cache_folder

    return cache_folder().parent / "snapshots" / str(port) / engine


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
        else TransformersConfig(**common, **snapshots, data_parallel=asked.data_parallel),
        failure=run / f"{name}.failure",
        shared_memory=run / f"{name}.shm",
    )
    return Part(name=name, kind="engine", config=encode_config(config))
