"""`interlock store run|stats`: a KV store node by itself, for plain vLLM engines that share a cache without a fleet of ours."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from interlock.cli.errors import Failure, Usage

GIB = 1 << 30
ASK_SECONDS = 5.0


def add_parser(commands: Any) -> None:
    store = commands.add_parser("store", help="a KV store node for plain vLLM engines")
    verbs = store.add_subparsers(dest="verb", metavar="VERB")
    run_node = verbs.add_parser("run", help="serve a shared KV cache until Ctrl-C")
    stats = verbs.add_parser("stats", help="print the node's counters")
    for verb in (run_node, stats):
        verb.add_argument("--address", required=True, metavar="unix:/PATH", help="the node's socket")
    run_node.add_argument(
        "--gib", type=float, default=1.0, metavar="X", help="memory for KV blocks (default 1 GiB)"
    )
    run_node.add_argument(
        "--state-dir",
        type=Path,
        help="private directory for the node's identity (default: one per address under ~/.local/state/interlock)",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.verb is None:
        raise Usage("store needs one of: run, stats")
    if not arguments.address.startswith("unix:/"):
        raise Usage(f"--address {arguments.address} is not unix:/ and an absolute path")
    try:
        return asyncio.run(_serve(arguments) if arguments.verb == "run" else _stats(arguments.address))
    except (OSError, ValueError, MemoryError) as error:
        raise Failure(f"store: {error}") from error


def default_state_dir(address: str) -> Path:
    """One per address: the same node keeps its identity over restarts, two nodes never share one."""
    root = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return root / "interlock" / f"store-{hashlib.blake2b(address.encode(), digest_size=6).hexdigest()}"


async def _serve(arguments: argparse.Namespace) -> int:
    from interlock.host.real import RealHost
    from interlock.store.main import StoreConfig, run_node
    from interlock.telemetry.logs import configure_logging

    configure_logging("store")
    state_dir = arguments.state_dir or default_state_dir(arguments.address)
    state_dir.parent.mkdir(parents=True, exist_ok=True)
    config = StoreConfig(address=arguments.address, state_dir=state_dir, slab_bytes=int(arguments.gib * GIB))
    await run_node(RealHost(), config)
    return 0


async def _stats(address: str) -> int:
    from interlock.host.real import RealHost
    from interlock.store.control import AsyncStoreClient
    from interlock.wire.identity import passing_identity

    host = RealHost()
    client = AsyncStoreClient(host, address, me=passing_identity(host, "stats"))
    try:
        async with asyncio.timeout(ASK_SECONDS):
            values = await client.stats()
    except TimeoutError:
        raise Failure(
            f"no store node answers at {address} within {ASK_SECONDS:.0f} s; is it running?"
        ) from None
    finally:
        await client.close()
    for name, value in sorted(values.items()):
        sys.stdout.write(f"{name} {value:g}\n")
    return 0
