"""What a coordinator keeps on disk: what it decided, which commands it accepted, and which lives it knew.

Written before anybody is told. Members are kept so that a coordinator which starts again waits for those it has not heard
yet, instead of calling a fleet PAUSED of which it knows one half. Deadlines are on the monotonic clock in memory; on disk
stands the moment of writing on both clocks, so that they mean the same after a reboot.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from interlock.core.fleet_state import FleetState
from interlock.core.identity import Epoch
from interlock.core.limits import COORDINATOR_STATE_BYTES_MAX
from interlock.host.base import Host
from interlock.host.sealed import seal, unseal
from interlock.wire.fleet_messages import EngineFacts, MemberProgress

FILE = "coordinator.json"


class CommandRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted command and what became of it. (owner, command_id) names it for ever."""

    owner: str
    command_id: str
    command: str
    epoch: Epoch
    wanted: str
    """The fleet's state that it waits for."""
    deadline_s: float
    allow_unknown: bool = False
    version: str | None = None
    """UPDATE: the weights that it waits for."""
    done: bool = False
    ok: bool = False
    message: str = ""
    members: list[MemberProgress] = []
    """As judged when it was done; kept in memory only, for a thousand members make a long list."""

    @property
    def key(self) -> tuple[str, str]:
        return self.owner, self.command_id


class KnownMember(msgspec.Struct, frozen=True):
    """A life that was a member and was not seen to end."""

    name: str
    incarnation: int
    facts: EngineFacts


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    fleet: FleetState
    commands: list[CommandRecord] = []
    members: list[KnownMember] = []
    wall_ns: int = 0
    monotonic_s: float = 0.0


class StateFile:
    """Reads once at start, writes durably at each change."""

    def __init__(self, host: Host, state_dir: Path) -> None:
        self._host, self._path = host, state_dir / FILE

    def load(self) -> tuple[Stored | None, str]:
        """The state as of now, and why there is none. Deadlines are moved to this boot's monotonic clock.

        Raises `OSError`: a disk that fails now has not lost the state, and it must not be written over.
        """
        try:
            data = self._host.files.read(self._path, COORDINATOR_STATE_BYTES_MAX)
            if data is None:
                return None, f"{self._path} does not exist"
            stored = msgspec.json.decode(unseal(data), type=Stored)
        except (ValueError, msgspec.MsgspecError) as error:
            return None, f"{self._path} cannot be read: {error}"
        return self._moved(stored), ""

    def save(self, fleet: FleetState, commands: list[CommandRecord], members: list[KnownMember]) -> None:
        """Raises `OSError`: then nobody may be told."""
        clock = self._host.clock
        stored = Stored(
            fleet=fleet,
            commands=[msgspec.structs.replace(record, members=[]) for record in commands],
            members=members,
            wall_ns=clock.wall_ns(),
            monotonic_s=clock.monotonic_s(),
        )
        data = seal(msgspec.json.encode(stored))
        if len(data) > COORDINATOR_STATE_BYTES_MAX:
            raise OSError(f"{len(data)} bytes of state, {COORDINATOR_STATE_BYTES_MAX} are read back at most")
        self._host.files.write_durably(self._path, data)

    def _moved(self, stored: Stored) -> Stored:
        """A wall clock that stepped back is taken to have stood still: a deadline then comes later, never earlier."""
        clock = self._host.clock
        away_s = max(0, clock.wall_ns() - stored.wall_ns) / 1e9
        shift_s = clock.monotonic_s() - stored.monotonic_s - away_s

        def move(deadline_s: float) -> float:
            return deadline_s + shift_s

        holds = tuple(
            hold
            if hold.deadline_s is None
            else msgspec.structs.replace(hold, deadline_s=move(hold.deadline_s))
            for hold in stored.fleet.holds
        )
        commands = [msgspec.structs.replace(c, deadline_s=move(c.deadline_s)) for c in stored.commands]
        fleet = msgspec.structs.replace(stored.fleet, holds=holds)
        return msgspec.structs.replace(stored, fleet=fleet, commands=commands)
