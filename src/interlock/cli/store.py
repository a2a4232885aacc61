"""`interlock store run|ls|stats|verify|rm`: a KV store node by itself, and a look into any node."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlock.cli import store_peers
from interlock.cli.arguments import count, folder, gibibytes
from interlock.cli.errors import Failure, Usage

if TYPE_CHECKING:
    from interlock.store.control import AsyncStoreClient

GIB = 1 << 30
ASK_SECONDS = 5.0
VERBS = "run, ls, stats, verify, verify-disk, rm"


def add_parser(commands: Any) -> None:
    """Adds the command; `run` is what its arguments are given to."""
    store = commands.add_parser(
        "store", help="a KV store node for plain vLLM engines, and a look into any node"
    )
    verbs = store.add_subparsers(dest="verb", metavar="VERB")
    run_node = verbs.add_parser("run", help="serve a shared KV cache until Ctrl-C")
    ls = verbs.add_parser(
        "ls",
        help="list the blocks in RAM (not those on disk)",
        description="Looks at the node's RAM only: a block that is on its disk alone is not listed. One line a block: key, parent, slot, bytes, tokens, tenant, and 'pinned' where it is.",
    )
    stats = verbs.add_parser("stats", help="print the node's counters, and what each tenant uses")
    verify = verbs.add_parser(
        "verify",
        help="check the bytes of every block in RAM (packs on disk: verify-disk)",
        description="Looks at the node's RAM only; `verify-disk` looks at the packs of its disk. Checks every block against the checksum its writer reported. The node forgets what fails and goes on. "
        "Status 1 when something failed.",
    )
    remove = verbs.add_parser(
        "rm",
        help="forget blocks, by tenant or by the first digits of their keys",
        description="A tenant's removal also ends what is being written for him. Engines compute again what is gone.",
    )
    for verb in (run_node, ls, stats, verify, remove):
        verb.add_argument("--address", required=True, metavar="unix:/PATH", help="the node's socket")
    for verb in (ls, stats, verify, remove):
        verb.add_argument("--json", action="store_true", help="JSON, an object a line")
    for verb in (ls, remove):
        verb.add_argument("--tenant", help="only blocks of that tenant")
        verb.add_argument(
            "--prefix", default="", metavar="HEX", help="only keys that begin with these digits"
        )
    ls.add_argument("--limit", type=count, default=0, metavar="N", help="stop after N blocks (default: all)")
    remove.add_argument("--all", action="store_true", help="every block, whoever's it is")
    _add_run_options(run_node)
    verify_disk = verbs.add_parser(
        "verify-disk",
        help="read every pack of a disk tier and check it, also while a node uses it (RAM: verify)",
        description="Looks at the packs of a directory, not at any node's RAM (that is `verify`), and asks no node. Changes nothing. Status 1 when something is not what was written.",
    )
    verify_disk.add_argument("directory", type=Path, metavar="DIR", help="what `store run --disk` was given")
    verify_disk.add_argument("--json", action="store_true", help="JSON")


def _add_run_options(run_node: argparse.ArgumentParser) -> None:
    run_node.add_argument(
        "--gib", type=gibibytes, default=1.0, metavar="X", help="memory for KV blocks (default 1 GiB)"
    )
    run_node.add_argument(
        "--state-dir",
        type=Path,
        help="private directory for the node's identity (default: one per address under ~/.local/state/interlock)",
    )
    run_node.add_argument(
        "--disk", type=folder, metavar="DIR", help="a directory for blocks that leave memory"
    )
    run_node.add_argument(
        "--disk-gib", type=gibibytes, default=10.0, metavar="X", help="its size (default 10 GiB)"
    )
    run_node.add_argument(
        "--quota",
        action="append",
        default=[],
        metavar="TENANT=GIB",
        help="memory that a tenant may use at most; at it he evicts his own blocks; 0 stores nothing; * is every other named "
        "tenant. May be repeated",
    )
    run_node.add_argument(
        "--end-frozen-writers",
        action="store_true",
        help="SIGKILL a process of yours that keeps slots of ended sessions from the rest (default: name it in the log)",
    )
    run_node.add_argument(
        "--kv-events",
        metavar="ENDPOINT",
        help="publish changes as vLLM's KV events at tcp://127.0.0.1:PORT or ipc:///PATH",
    )
    run_node.add_argument(
        "--kv-events-tokens",
        action="store_true",
        help="tell the tokens of what engines save in those events, for routers that name blocks by tokens; whoever reads the events reads the prompts",
    )
    run_node.add_argument(
        "--kv-events-replay", metavar="ENDPOINT", help="answer there who missed some of those events"
    )
    store_peers.add_options(run_node)


def run(arguments: argparse.Namespace) -> int:
    """Raises `Usage`, and `Failure` when the node cannot be had or asked. Status 1 also for what `verify` found."""
    if arguments.verb is None:
        raise Usage(f"store needs one of: {VERBS}")
    if arguments.verb == "verify-disk":
        return _verify_disk(arguments)
    if not arguments.address.startswith("unix:/"):
        raise Usage(f"--address {arguments.address} is not unix:/ and an absolute path")
    if arguments.verb == "rm":
        _check_rm(arguments)
    if getattr(arguments, "prefix", "") and not set(arguments.prefix) <= set("0123456789abcdef"):
        raise Usage(f"--prefix {arguments.prefix} is not of hexadecimal digits (0-9, a-f)")
    from interlock.core.errors import InterlockError

    try:
        if arguments.verb == "run":
            return asyncio.run(_serve(arguments))
        return asyncio.run(_ask(arguments, ASKING[arguments.verb]))
    except (OSError, ValueError, MemoryError, InterlockError) as error:
        raise Failure(f"store: {error}") from error


def _check_rm(arguments: argparse.Namespace) -> None:
    chosen = arguments.tenant is not None or bool(arguments.prefix)
    if arguments.all == chosen:
        raise Usage("store rm needs --tenant NAME, --prefix HEX or both, or else --all")


def default_state_dir(address: str) -> Path:
    """One per address: the same node keeps its identity over restarts, two nodes never share one."""
    root = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return root / "interlock" / f"store-{hashlib.blake2b(address.encode(), digest_size=6).hexdigest()}"


def parse_quotas(words: list[str]) -> dict[str, int]:
    """Bytes by tenant. Raises `Usage`."""
    quotas = {}
    for word in words:
        tenant, _, size = word.rpartition("=")
        try:
            quotas[tenant] = int(float(size) * GIB)
        except ValueError:
            tenant = ""
        if not tenant or quotas[tenant] < 0:
            raise Usage(f"--quota {word} is not TENANT=GIB, as in alice=2.5")
    return quotas


async def _serve(arguments: argparse.Namespace) -> int:
    from interlock.host.real import RealHost
    from interlock.store.main import StoreConfig, run_node
    from interlock.telemetry.logs import configure_logging

    configure_logging("store")
    state_dir = arguments.state_dir or default_state_dir(arguments.address)
    state_dir.parent.mkdir(parents=True, exist_ok=True)
    config = StoreConfig(
        address=arguments.address,
        state_dir=state_dir,
        slab_bytes=int(arguments.gib * GIB),
        disk=arguments.disk,
        disk_bytes=int(arguments.disk_gib * GIB) if arguments.disk is not None else 0,
        quotas=parse_quotas(arguments.quota),
        end_frozen_writers=arguments.end_frozen_writers,
        kv_events=arguments.kv_events,
        kv_events_replay=arguments.kv_events_replay,
        kv_events_tokens=arguments.kv_events_tokens,
        name=arguments.name,
        peers=store_peers.config_of(arguments),
    )
    await run_node(RealHost(), config)
    return 0


# --- asking a node -----------------------------------------------------------------------------------------------


async def _ask(
    arguments: argparse.Namespace,
    verb: Callable[[AsyncStoreClient, argparse.Namespace], Coroutine[Any, Any, int]],
) -> int:
    from interlock.host.real import RealHost
    from interlock.store.control import AsyncStoreClient
    from interlock.wire.identity import passing_identity

    host = RealHost()
    client = AsyncStoreClient(
        host, arguments.address, me=passing_identity(host, "cli"), timeout_s=ASK_SECONDS
    )
    try:
        return await verb(client, arguments)
    except TimeoutError:
        raise Failure(
            f"no store node answers at {arguments.address} within {ASK_SECONDS:.0f} s; is it running?"
        ) from None
    finally:
        await client.close()


async def _ls(client: AsyncStoreClient, arguments: argparse.Namespace) -> int:
    shown = 0
    async for block in client.blocks(tenant=arguments.tenant, prefix=arguments.prefix):
        fields = {
            "key": block.key.hex(),
            "parent": block.parent.hex(),
            "slot": block.slot,
            "bytes": block.size_bytes,
            "block_tokens": block.block_tokens,
            "tenant": block.tenant,
            "pinned": block.pinned,
        }
        if arguments.json:
            _say(json.dumps(fields))
        else:
            words = [
                f"{fields['key']}",
                block.parent.hex()[:12] or "-",
                str(block.slot),
                str(block.size_bytes),
            ]
            _say("\t".join([*words, str(block.block_tokens), block.tenant or "-", "pinned" * block.pinned]))
        shown += 1
        if shown == arguments.limit:
            break
    return 0


async def _stats(client: AsyncStoreClient, arguments: argparse.Namespace) -> int:
    values, tenants = await client.stats(), await client.tenants()
    if arguments.json:
        uses = {t.tenant: {"bytes": t.used_bytes, "quota_bytes": t.quota_bytes} for t in tenants}
        _say(json.dumps({"stats": values, "tenants": uses}))
        return 0
    for name, value in sorted(values.items()):
        _say(f"{name} {value:g}")
    for use in tenants:
        quota = "no quota" if use.quota_bytes is None else f"of {use.quota_bytes}"
        _say(f"tenant {use.tenant}: {use.used_bytes} bytes, {quota}")
    return 0


async def _verify(client: AsyncStoreClient, arguments: argparse.Namespace) -> int:
    checked, bad = 0, []
    async for page in client.verify():
        checked += page.checked
        bad += [key.hex() for key in page.bad]
    if arguments.json:
        _say(json.dumps({"checked": checked, "bad": bad}))
    else:
        for key in bad:
            _say(f"bad, and forgotten: {key}")
        _say(f"{checked} blocks checked, {len(bad)} bad")
    return 1 if bad else 0


def _verify_disk(arguments: argparse.Namespace) -> int:
    from interlock.host.disk import RealDirectory
    from interlock.store.packs.verify import verify_packs

    try:
        directory = RealDirectory(arguments.directory, None)
    except OSError as error:
        raise Failure(f"store verify-disk: {error}") from error
    try:
        result = verify_packs(directory)
    finally:
        directory.close()
    if arguments.json:
        import msgspec

        _say(msgspec.json.encode(result).decode())
    else:
        for finding in result.findings:
            _say(f"pack {finding.pack}: {finding.key or 'all of it'}: {finding.reason}")
        _say(
            f"{result.packs} packs, {result.blocks} blocks, {result.bytes} bytes read, {len(result.findings)} findings"
        )
    return 1 if result.findings else 0


async def _rm(client: AsyncStoreClient, arguments: argparse.Namespace) -> int:
    if arguments.all:
        gone = await client.clear()
    else:
        gone = await client.remove(tenant=arguments.tenant, prefix=arguments.prefix)
    missed = client.last_missed
    if arguments.json:
        _say(json.dumps({"removed": gone, "missed": missed}))
    else:
        _say(f"{gone} blocks forgotten")
        if missed:
            _say(
                f"not yet at {', '.join(missed)}: away, or their disks did not let it through; they carry it out when they can, and nothing comes back from them"
            )
    return 1 if missed else 0


ASKING: dict[str, Callable[[AsyncStoreClient, argparse.Namespace], Coroutine[Any, Any, int]]] = {
    "ls": _ls,
    "stats": _stats,
    "verify": _verify,
    "rm": _rm,
}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
