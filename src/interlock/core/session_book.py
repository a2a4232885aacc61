"""The write sessions of one store node: which keys are under way, which slots are held, what a repeated start answers.

A mutable collection under the bans of core. The rules of one session are core/sessions; here stands what lies between
sessions: a key is written by one session at a time, and a finished session is remembered for a bounded time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from interlock.core.errors import LocalProtocolError
from interlock.core.joins import JoinName
from interlock.core.limits import TOMBSTONES_MAX
from interlock.core.sessions import (
    Effect,
    Event,
    Phase,
    Process,
    ProcessGone,
    ReleaseKey,
    Session,
    Tick,
    transition,
)

_ENDED = (Phase.PUBLISHED, Phase.FREED)


class SessionBook:
    """All write sessions of a node by name. Methods that tell an event return its effects."""

    def __init__(self, *, tombstones_max: int = TOMBSTONES_MAX) -> None:
        self._tombstones_max = tombstones_max
        self._live: dict[JoinName, Session] = {}
        self._ended: dict[JoinName, Session] = {}
        self._under_way: dict[bytes, JoinName] = {}
        self._held: set[int] = set()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        """The sessions that hold slots."""
        return iter(list(self._live.values()))

    def get(self, name: JoinName) -> Session | None:
        """The session of that name, also for a while after its end, so that a repeated start repeats its answer."""
        return self._live.get(name) or self._ended.get(name)

    def missing(self, keys: Sequence[bytes], is_present: Callable[[bytes], bool]) -> list[int]:
        """Indexes into `keys` of those to be written: neither present nor under way, each key once."""
        seen: set[bytes] = set()
        wanted = []
        for index, key in enumerate(keys):
            if key not in seen and key not in self._under_way and not is_present(key):
                wanted.append(index)
            seen.add(key)
        return wanted

    def is_under_way(self, key: bytes) -> bool:
        """Whether some session writes this key: a second one need not."""
        return key in self._under_way

    def add(self, session: Session) -> None:
        """Takes a session from `sessions.start`. Raises `LocalProtocolError` when its name, a key or a slot is taken."""
        fault = None
        if self.get(session.name) is not None:
            fault = "a session of that name exists"
        elif any(key in self._under_way for key in session.keys):
            fault = "a key of it is under way in another session"
        elif not self._held.isdisjoint(session.slots):
            fault = "a slot of it is held by another session"
        if fault is not None:
            raise LocalProtocolError(
                f"session {session.name} is not added: {fault}", session=str(session.name)
            )
        self._live[session.name] = session
        self._under_way.update(dict.fromkeys(session.keys, session.name))
        self._held.update(session.slots)

    def handle(self, name: JoinName, event: Event) -> tuple[Effect, ...]:
        """Tells one session. Raises as `sessions.transition` does, and for a name that is not known; changes nothing then."""
        session = self.get(name)
        if session is None:
            raise LocalProtocolError(f"session {name} is not known here", session=str(name))
        return self._apply(session, event)

    def process_gone(self, process: Process) -> tuple[Effect, ...]:
        """Tells every session that the exit of `process` is proven."""
        return self._apply_all(ProcessGone(process))

    def tick(self, now_s: float) -> tuple[Effect, ...]:
        """Lets time pass for every session."""
        return self._apply_all(Tick(now_s))

    @property
    def held_slots(self) -> frozenset[int]:
        """Slots that are neither free nor published: being written, or in quarantine."""
        return frozenset(self._held)

    def quarantined_slots(self) -> int:
        """Slots of ended sessions that wait for a promise or an exit."""
        return sum(len(s.slots) for s in self._live.values() if s.phase is Phase.QUARANTINED)

    def quarantine_holders(self) -> dict[Process, int]:
        """How many quarantined slots each process keeps from being used: whom to end when they are too many."""
        counts: dict[Process, int] = {}
        for session in self._live.values():
            if session.phase is Phase.QUARANTINED:
                for process in session.holders:
                    counts[process] = counts.get(process, 0) + len(session.slots)
        return counts

    def check_integrity(self) -> None:
        """Raises `AssertionError` when two sessions share a key under way or a slot."""
        slots = [slot for session in self._live.values() for slot in session.slots]
        assert len(slots) == len(set(slots))
        assert set(slots) == self._held
        claimed = [
            key
            for session in self._live.values()
            if session.phase in (Phase.WRITING, Phase.SETTLING)
            for key in session.keys
        ]
        assert len(claimed) == len(set(claimed))
        assert set(claimed) == set(self._under_way)
        assert len(self._ended) <= self._tombstones_max

    def _apply_all(self, event: Event) -> tuple[Effect, ...]:
        effects: list[Effect] = []
        for session in self:
            effects.extend(self._apply(session, event))
        return tuple(effects)

    def _apply(self, session: Session, event: Event) -> tuple[Effect, ...]:
        after, effects = transition(session, event)
        if after is session:
            return effects
        for effect in effects:
            if isinstance(effect, ReleaseKey):
                del self._under_way[effect.key]
            else:
                self._held.remove(effect.slot)
        if after.phase in _ENDED:
            self._live.pop(after.name, None)
            self._ended[after.name] = after
            if len(self._ended) > self._tombstones_max:
                del self._ended[next(iter(self._ended))]
        else:
            self._live[after.name] = after
        return effects
