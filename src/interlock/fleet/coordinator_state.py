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
from interlock.host.slots import SlotFile
from interlock.wire.fleet_messages import EngineFacts, MemberProgress

FILE = "coordinator.state"


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
    """UPDATE, START: the weights that it waits for."""
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


class _Written(msgspec.Struct, frozen=True, kw_only=True):
    """`Stored` as it is encoded: commands that are done do not change, and are not encoded again."""

    fleet: FleetState
    commands: list[msgspec.Raw]
    members: list[KnownMember]
    wall_ns: int
    monotonic_s: float


class CoordinatorFile:
    """Reads once at start, writes durably at each change."""

    def __init__(self, host: Host, state_dir: Path) -> None:
        self._clock, self._path = host.clock, state_dir / FILE
        self._slots = SlotFile(host.files, self._path, "coordinator", COORDINATOR_STATE_BYTES_MAX)
        self._done: dict[tuple[str, str], tuple[CommandRecord, msgspec.Raw]] = {}

    def load(self) -> tuple[Stored | None, str]:
        """The state as of now, and why there is none. Deadlines are moved to this boot's monotonic clock.

        Raises `OSError`: a disk that fails now has not lost the state, and it must not be written over.
        """
        try:
            body = self._slots.load()
            if body is None:
                return None, f"{self._path} does not exist"
            stored = msgspec.json.decode(body, type=Stored)
        except (ValueError, msgspec.MsgspecError) as error:
            return None, f"{self._path} cannot be read: {error}"
        return self._moved(stored), ""

    def save(self, fleet: FleetState, commands: list[CommandRecord], members: list[KnownMember]) -> None:
        """Raises `OSError`: then nobody may be told."""
        written = _Written(
            fleet=fleet,
            commands=self._encoded(commands),
            members=members,
            wall_ns=self._clock.wall_ns(),
            monotonic_s=self._clock.monotonic_s(),
        )
        self._slots.save(msgspec.json.encode(written))

    def _encoded(self, commands: list[CommandRecord]) -> list[msgspec.Raw]:
        before, self._done, encoded = self._done, {}, []
        for record in commands:
            known = before.get(record.key)
            if known is None or known[0] is not record:
                bare = msgspec.structs.replace(record, members=[])
                known = record, msgspec.Raw(msgspec.json.encode(bare))
            if record.done:
                self._done[record.key] = known
            encoded.append(known[1])
        return encoded

    def _moved(self, stored: Stored) -> Stored:
        """A wall clock that stepped back is taken to have stood still: a deadline then comes later, never earlier."""
        clock = self._clock
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
