"""Who speaks, in which of its lives, and what a receiver remembers of others (DESIGN §4.2, hazards E3).

The incarnation of a life is on disk before its first message. It may be raised only until somebody has accepted it:
who is refused later has a newer life somewhere and stops.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import msgspec

from interlock.core.errors import LocalProtocolError, StaleError
from interlock.core.identity import next_incarnation
from interlock.core.limits import NAME_CHARS_MAX, PEERS_KNOWN_MAX
from interlock.host.base import Clock, Files
from interlock.host.sealed import seal, unseal
from interlock.wire.envelope import Rejected

FILE_BYTES_MAX = 4096


class Identity:
    """A name and one of its lives. `incarnation` may rise until the first channel stands: read it where it is used."""

    def __init__(self, name: str, incarnation: int, life: bytes = b"") -> None:
        if not 0 < len(name) <= NAME_CHARS_MAX or incarnation <= 0:
            raise LocalProtocolError(
                f"({name!r}, {incarnation}) is no identity: a name of 1 to {NAME_CHARS_MAX} characters and a positive number are"
            )
        self._name, self._incarnation, self._life = name, incarnation, life
        self._attempts = 0
        self._accepted = False

    @property
    def name(self) -> str:
        """Which part of the system this is, over all its lives."""
        return self._name

    @property
    def incarnation(self) -> int:
        """Which of its lives; never falls, and is on disk before the first message where the identity is durable."""
        return self._incarnation

    @property
    def life(self) -> bytes:
        """Tells this process from a twin that claims the same name and incarnation."""
        return self._life

    @property
    def accepted(self) -> bool:
        """Whether any peer has accepted this life: from then on it never becomes a newer one."""
        return self._accepted

    def next_attempt(self) -> int:
        """Numbers the connections this life tries to open, from 1."""
        self._attempts += 1
        return self._attempts

    def mark_accepted(self) -> None:
        """To be said when a peer has welcomed this life."""
        self._accepted = True

    def raise_above(self, highest: int, by: str) -> None:
        """A peer (`by`) refused us, knowing the life `highest`. Raises `StaleError` unless we may become a newer one."""
        raise StaleError(
            f"{by} knows a newer life ({highest}) of {self.name}, so this one ({self.incarnation}) is over",
            highest=highest,
            hint="stop this process",
        )

    def outlived(self, highest: int) -> None:
        """A peer knows the newer life `highest` of this name, so this one ends. Who has a next life keeps that for it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and (self.name, self.incarnation) == (
            other.name,
            other.incarnation,
        )

    def __hash__(self) -> int:
        return hash(self._name)

    def __repr__(self) -> str:
        return f"{self._name}@{self._incarnation}"


class _Stored(msgspec.Struct, frozen=True):
    name: str
    incarnation: int
    above: int = 0
    """A life that a peer knew when it refused this one: the next begins above it, whatever the clock says by then."""


class DurableIdentity(Identity):
    """An identity whose incarnation is kept in `path`; made by `load_identity`."""

    def __init__(self, name: str, incarnation: int, files: Files, path: Path, clock: Clock) -> None:
        super().__init__(name, incarnation, life=os.urandom(16))
        self._files, self._path, self._clock = files, path, clock

    def store(self) -> None:
        """Puts name and incarnation on disk, synced. Raises `OSError`."""
        self._keep(_Stored(self._name, self._incarnation))

    def _keep(self, stored: _Stored) -> None:
        self._files.write_durably(self._path, seal(msgspec.json.encode(stored)))

    def raise_above(self, highest: int, by: str) -> None:
        if self._accepted:
            self.outlived(highest)
            super().raise_above(highest, by)
        raised = next_incarnation(stored=self._incarnation, wall_ns=self._clock.wall_ns(), refused=highest)
        self._keep(_Stored(self._name, raised))  # before any message says it
        self._incarnation = raised

    def outlived(self, highest: int) -> None:
        """Else a name whose state was lost and whose clock stepped back would begin lives below the known one for ever."""
        stored = _Stored(self._name, self._incarnation, above=highest)
        with contextlib.suppress(OSError):  # then the next life is refused once more
            self._keep(stored)


def incarnation_in(data: bytes | None) -> int:
    """The life that an identity file names, for whoever saw it end; 0 where the file is absent or not whole."""
    try:
        return msgspec.json.decode(unseal(data), type=_Stored).incarnation if data else 0
    except (msgspec.MsgspecError, ValueError):
        return 0


class MachineState(Protocol):
    """What of a host an identity needs; `RealHost` and `BlockingHost` both have it."""

    @property
    def clock(self) -> Clock:
        """Its wall clock begins an incarnation."""
        ...

    @property
    def files(self) -> Files:
        """Where the last one is kept."""
        ...


def load_identity(host: MachineState, state_dir: Path, name: str) -> DurableIdentity:
    """A new life of `name`: its incarnation is above that of every life known in `state_dir`, and stored before return.

    Raises `LocalProtocolError` when the directory holds the identity of another name or something unreadable.
    """
    path = state_dir / "identity.json"
    stored = 0
    data = host.files.read(path, FILE_BYTES_MAX)
    if data is not None:
        try:
            found = msgspec.json.decode(unseal(data), type=_Stored)
        except (msgspec.MsgspecError, ValueError) as error:
            raise LocalProtocolError(
                f"{path} is unreadable: {error}", hint="remove it: the wall clock then stands in"
            ) from error
        if found.name != name:
            raise LocalProtocolError(
                f"{path} belongs to {found.name}, not to {name}",
                hint="give each process a state directory of its own",
            )
        stored = max(found.incarnation, found.above)
    identity = DurableIdentity(
        name, next_incarnation(stored=stored, wall_ns=host.clock.wall_ns()), host.files, path, host.clock
    )
    identity.store()
    return identity


def passing_identity(host: MachineState, kind: str) -> Identity:
    """For a process that is nobody twice (a command, a probe): a name that no other has, and no state directory."""
    life = os.urandom(16)
    return Identity(f"{kind}-{os.getpid()}-{life[:4].hex()}", max(1, host.clock.wall_ns()), life)


class Claim(msgspec.Struct, frozen=True):
    """What a receiver remembers of one name: its highest life, and which process lives it."""

    incarnation: int
    life: bytes
    pid: int | None


class KnownPeers:
    """The highest incarnation of each name, as heard here. Bounded: the name heard least recently is forgotten first."""

    def __init__(self) -> None:
        self._claims: OrderedDict[str, Claim] = OrderedDict()

    def highest(self, name: str) -> int:
        """The highest life heard of `name`; 0: none."""
        claim = self._claims.get(name)
        return claim.incarnation if claim else 0

    def admit(self, name: str, incarnation: int, life: bytes, pid: int | None) -> Rejected | None:
        """None: admitted, several times over if it comes so. Else the refusal to answer with; nothing was changed."""
        known = self._claims.get(name)
        if known and incarnation < known.incarnation:
            return Rejected(f"a newer life of {name} is known", known.incarnation)
        if known and incarnation == known.incarnation and (known.life, known.pid) != (life, pid):
            return Rejected(
                f"two processes claim to be {name}@{incarnation}: {_process(known.life, known.pid)} came first, "
                f"{_process(life, pid)} is refused; give each a state directory of its own"
            )
        self._claims[name] = Claim(incarnation, life, pid)
        self._claims.move_to_end(name)
        if len(self._claims) > PEERS_KNOWN_MAX:
            self._claims.popitem(last=False)
        return None


def _process(life: bytes, pid: int | None) -> str:
    return f"process {pid if pid else 'elsewhere'} (life {life[:4].hex() or 'unmarked'})"
