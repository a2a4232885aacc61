"""What `interlock serve` was asked, checked as a whole before the first process starts."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from interlock.cli import store_peers
from interlock.cli.errors import Failure, Usage
from interlock.cli.lines import say
from interlock.core.limits import LOCKSTEP_STEP_SECONDS, MEMBERS_MAX
from interlock.host.ports import bind_port

if TYPE_CHECKING:
    from interlock.store.peer_links import PeersConfig

GIB = 1 << 30
ENGINES_DEFAULT = 2
SNAPSHOTS_GIB_DEFAULT = 2.0


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, checked."""

    model: Path
    architecture: str
    served_name: str
    kinds: list[str]
    """Of each engine, in order: "vllm" or "transformers"."""
    tensor_parallel: int
    data_parallel: int = 1
    step_seconds: float = LOCKSTEP_STEP_SECONDS
    """Of a lockstep group's step."""
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
        step_seconds=parsed.step_seconds or LOCKSTEP_STEP_SECONDS,
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
