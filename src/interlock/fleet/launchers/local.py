"""Processes of a fleet on this machine: started with the supervisor's pipe, ended as whole trees, their last words kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from interlock.fleet.launchers.rundir import LEAVE_FILE, SHARED_MEMORY_SUFFIX, forget_shared_memory
from interlock.host.base import Child, Host
from interlock.host.processes import PARENT_FD, TREE_MARK, become_subreaper, open_parent_pipe

TAIL_LINES = 12
TAIL_BYTES = 64 * 1024
END_SECONDS_MAX = 10.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the fleet, as it is started and started again."""

    name: str
    kind: str
    """What `python -m interlock _process` is to be: "coordinator", "store", "engine", "front"."""
    config: bytes
    """Its configuration, JSON; handed over in a file of mode 0600, for it may hold secrets."""


class LocalLauncher:
    """Starts parts in one run directory. All of them see the end of this process by their pipe."""

    def __init__(self, host: Host, run_dir: Path, mark: str, program: Sequence[str] = ()) -> None:
        self._host, self._run_dir, self._mark = host, run_dir, mark
        self._program = list(program) or [sys.executable, "-m", "interlock", "_process"]
        self._parent_read, self._parent_write = open_parent_pipe()
        become_subreaper()

    def log_of(self, name: str) -> Path:
        return self._run_dir / f"{name}.log"

    def failure_of(self, name: str) -> Path:
        """Where a part leaves one sentence for the operator when it cannot start."""
        return self._run_dir / f"{name}.failure"

    async def start(self, part: Part, env: Mapping[str, str] = os.environ) -> Child:
        """Raises `OSError` when the program cannot be started at all."""
        config = self._run_dir / f"{part.name}.json"
        self._host.files.write_durably(config, part.config)
        self._host.files.remove(self.failure_of(part.name))
        marks = "/".join(filter(None, [env.get(TREE_MARK), self._mark]))
        return await self._host.spawn(
            [*self._program, part.kind, part.name, str(self._run_dir)],
            env={**env, PARENT_FD: str(self._parent_read), TREE_MARK: marks},
            log=self.log_of(part.name),
            pass_fds=[self._parent_read],
        )

    async def end(self, part: Part, child: Child) -> bool:
        """Ends whatever is left of its tree, and takes away its shared memory. True when proven gone."""
        gone = await child.end_tree(END_SECONDS_MAX)
        if gone:
            forget_shared_memory(self._run_dir / f"{part.name}{SHARED_MEMORY_SUFFIX}")
        return gone

    @property
    def told_to_leave(self) -> bool:
        """Somebody with access to the run directory asks for the end of a stopped fleet."""
        return (self._run_dir / LEAVE_FILE).exists()

    def last_words(self, name: str) -> str:
        """What the operator should read when this part has died: its own sentence, else the end of its log."""
        said = self._host.files.read(self.failure_of(name), TAIL_BYTES)
        if said:
            return said.decode(errors="replace").strip()
        try:
            log = self.log_of(name).read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return "it left no log"
        lines = [line for line in log.splitlines() if line.strip()][-TAIL_LINES:]
        return "the last lines of its log:\n" + "\n".join(f"    {line}" for line in lines)

    def close(self) -> None:
        """Tells every child that is left that the supervisor is gone."""
        for fd in (self._parent_read, self._parent_write):
            os.close(fd)
