"""The entry point of an engine's process: signals, the supervisor's pipe, and an end that leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

import msgspec

from interlock.core.limits import CHILD_GRACE_SECONDS
from interlock.engines.base import Engine, EngineStartError
from interlock.engines.runner import STATUS_FAILED, Runner, RunnerConfig
from interlock.engines.transformers.setup import TransformersConfig
from interlock.engines.vllm_setup import VllmConfig
from interlock.host.base import Host
from interlock.host.processes import become_subreaper, parent_gone
from interlock.host.resident import resident_bytes
from interlock.host.sweep import end_marked, own_mark, remove_shared_memory, shared_memory_of

_log = logging.getLogger(__name__)

RECORD_SECONDS = 0.5


class EngineProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that one engine's process is started with: exactly one of `vllm` and `transformers`."""

    runner: RunnerConfig
    vllm: VllmConfig | None = None
    transformers: TransformersConfig | None = None
    failure: Path
    """Written when the engine cannot start: the sentence for the operator."""
    shared_memory: Path
    """Kept up to date with the names of shared memory that the tree uses: whoever kills the tree removes them."""

    @property
    def engine(self) -> VllmConfig | TransformersConfig:
        """Raises `ValueError` unless there is exactly one."""
        chosen = [config for config in (self.vllm, self.transformers) if config is not None]
        if len(chosen) != 1:
            raise ValueError("an engine's process is one engine: name either vllm or transformers")
        return chosen[0]


def make_engine(host: Host, config: VllmConfig | TransformersConfig) -> Engine:
    """The adapter for that configuration, not started; imports only what it needs."""
    if isinstance(config, VllmConfig):
        from interlock.engines.vllm import VllmEngine

        return VllmEngine(host, config)
    if config.data_parallel > 1:
        from interlock.engines.lockstep.engine import LockstepEngine

        return LockstepEngine(host, config)
    from interlock.engines.transformers.engine import TransformersEngine

    return TransformersEngine(host, config)


async def run_engine(host: Host, config: EngineProcessConfig) -> int:
    """One engine's whole life; returns the exit status, with no process of the tree left but this one."""
    become_subreaper()
    scratch = Path(config.engine.scratch_dir)
    host.files.make_private_dir(scratch)
    _empty(host, scratch)
    runner = Runner(
        host,
        make_engine(host, config.engine),
        config.runner,
        measure=lambda: resident_bytes(os.getpid()),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runner.stop, f"got {signal.Signals(number).name}")
    recorded: set[str] = set()
    helpers = [
        asyncio.create_task(_leave_with_supervisor(runner), name="supervisor"),
        asyncio.create_task(
            _record_shared_memory(host, config.shared_memory, recorded), name="shared memory"
        ),
    ]
    try:
        return await runner.run()
    except EngineStartError as error:
        _log.error("%s", error)
        host.files.write_durably(config.failure, str(error).encode())
        return STATUS_FAILED
    finally:
        for helper in helpers:
            helper.cancel()
        mark = own_mark()
        if mark is None or await end_marked(mark, CHILD_GRACE_SECONDS / 2):
            remove_shared_memory(recorded)
            _empty(host, scratch)


async def _leave_with_supervisor(runner: Runner) -> None:
    await parent_gone()
    runner.stop("the supervisor is gone")


async def _record_shared_memory(host: Host, record: Path, known: set[str]) -> None:
    """Ranks talk through shared memory that has a name; nobody removes it when all of them are killed at once.

    The record only grows: what a dead process had mapped can no longer be seen, and is what it is for.
    """
    while True:
        names = await host.in_thread(lambda: shared_memory_of(os.getpid()))
        if not names <= known:
            known |= names
            await host.in_thread(host.files.write_durably, record, "\n".join(sorted(known)).encode())
        await host.clock.sleep_s(RECORD_SECONDS)


def _empty(host: Host, folder: Path) -> None:
    """Sockets and meeting places that the engine's libraries leave behind also when they end in order."""
    for left in folder.iterdir():
        with contextlib.suppress(OSError):
            host.files.remove(left)
