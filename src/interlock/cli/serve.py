"""`interlock serve`: claims a run directory and a state directory for what was asked, then supervises."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path

import msgspec

from interlock import __version__
from interlock.cli.errors import Failure
from interlock.cli.lines import say
from interlock.cli.serve_checks import GIB, Asked, check
from interlock.cli.serve_plan import make_plan
from interlock.fleet.launchers.local import LocalLauncher
from interlock.fleet.launchers.rundir import RunDir, RunDirBusy
from interlock.fleet.supervisor import Supervisor
from interlock.host.real import RealHost
from interlock.host.sealed import seal, unseal
from interlock.host.sweep import FileLock

RUN_DIR_BYTES_MAX = 107 - len("/v1023/") - 36
"""vLLM names its sockets by 36 characters in a folder of ours; the kernel takes 107 bytes."""
OWNER_BYTES_MAX = 64 * 1024
KINDS = {"vllm": "vLLM", "transformers": "Transformers"}


def serve(parsed: argparse.Namespace, vllm_arguments: list[str]) -> int:
    """Returns the exit status. Raises `Usage` and `Failure`."""
    say(f"interlock {__version__}")
    asked = check(parsed, vllm_arguments)
    return asyncio.run(_serve(asked))


async def _serve(asked: Asked) -> int:
    host = RealHost()
    mark = secrets.token_hex(16)
    try:
        run_dir = await RunDir.claim(host, asked.port, mark)
    except RunDirBusy as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(
            f"no run directory can be had: {error}; set XDG_RUNTIME_DIR to a folder of yours"
        ) from error
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
