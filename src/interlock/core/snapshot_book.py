"""The scopes of one snapshot store: the budget they share, the root they stand under, and what a start adopts.

A mutable collection under the bans of core. The rules of one scope are core/snapshots; here stands what lies between scopes:
* Room is charged before anything is made and exact: accepted bytes in memory until their writer let go, on disk until the trash
  holds nothing of them and the last descriptor is closed.
* A scope of which nothing is left is dropped, and its epoch is not: a later scope of any name begins above it.
* erase_all never lists children (hazards M4: 946 directories made meanwhile stayed live): `switch_root`, then `RootMoved` to
  each of `below(root)` under its lock, then one rename of the old root to the trash.
* At start nothing on disk is trusted. Under the new root stands what `adopt` was told: directories that their owner names, moved
  one by one by name; then the old roots are renamed to the trash, whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import (
    SNAPSHOT_DISK_BYTES_MAX,
    SNAPSHOT_ITEMS_MAX,
    SNAPSHOT_MEMORY_BYTES_MAX,
    SNAPSHOT_SCOPES_MAX,
)
from interlock.core.snapshot_events import (
    Charged,
    Effects,
    Erase,
    Erased,
    Event,
    Freed,
    LoadAsked,
    Missed,
    NotPromoted,
    Promote,
    Refused,
    Save,
)
from interlock.core.snapshot_state import Directory, Folder, Item, Phase, Scope
from interlock.core.snapshots import transition


class Amount(msgspec.Struct, frozen=True):
    """What is charged, or may be."""

    items: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.items + other.items,
            self.memory_bytes + other.memory_bytes,
            self.disk_bytes + other.disk_bytes,
        )

    def fits(self, bound: Amount) -> bool:
        """Whether each of the three is within its bound, the bound included."""
        return (
            self.items <= bound.items
            and self.memory_bytes <= bound.memory_bytes
            and self.disk_bytes <= bound.disk_bytes
        )


BUDGET = Amount(SNAPSHOT_ITEMS_MAX, SNAPSHOT_MEMORY_BYTES_MAX, SNAPSHOT_DISK_BYTES_MAX)


class SnapshotBook:
    """All scopes of a store in one of its lives. Methods that tell an event return its effects."""

    def __init__(
        self, incarnation: int, *, root: int, budget: Amount = BUDGET, scopes_max: int = SNAPSHOT_SCOPES_MAX
    ) -> None:
        self.incarnation = incarnation
        self.root = root
        self.used = Amount()
        self._found = Amount()
        self._budget = budget
        self._scopes_max = scopes_max
        self._scopes: dict[str, Scope] = {}
        self._epoch_min = 0

    def __len__(self) -> int:
        return len(self._scopes)

    def __iter__(self) -> Iterator[Scope]:
        return iter(list(self._scopes.values()))

    def get(self, name: str) -> Scope | None:
        return self._scopes.get(name)

    def save(self, name: str, *, position: int, bytes: int, deadline_s: float) -> Effects:
        """As `Save`, with the room that there is. Raises what the transition raises."""
        scope = self._scopes.get(name)
        if scope is None:
            if len(self._scopes) >= self._scopes_max:
                return (Refused(position, f"{len(self._scopes)} requests keep snapshots already"),)
            scope = Scope(name, self.incarnation, self.root, self._epoch_min)
        has_room = (self.used + Amount(1, bytes, bytes)).fits(self._budget)
        return self._tell(scope, Save(position, bytes, deadline_s, has_room))

    def handle(self, name: str, event: Event) -> Effects:
        """Tells one scope. One that is not here has nothing: nothing to read, promote or erase. Raises for other events."""
        scope = self._scopes.get(name)
        if scope is not None:
            return self._tell(scope, event)
        match event:
            case LoadAsked(load, _):
                return (Missed(load, "no state of this request is kept"),)
            case Promote(position):
                return (NotPromoted(position, "no state of this request is kept"),)
            case Erase():
                return (Erased(),)
        raise LocalProtocolError(
            f"there is no scope {name}, and {type(event).__name__} is not possible", scope=name
        )

    def _tell(self, scope: Scope, event: Event) -> Effects:
        after, effects = transition(scope, event)
        for effect in effects:
            match effect:
                case Charged(bytes):
                    self.used += Amount(1, bytes, bytes)
                case Freed(items, memory_bytes, disk_bytes):
                    self.used += Amount(-items, -memory_bytes, -disk_bytes)
        if after.is_forgettable:
            self._scopes.pop(scope.name, None)
            self._epoch_min = max(self._epoch_min, after.epoch + 1)
        else:
            self._scopes[scope.name] = after
        return effects

    # --- erase_all -----------------------------------------------------------------------------------------------

    def switch_root(self) -> int:
        """The number of the new root, which the driver has made: new scopes stand under it from now on."""
        self.root += 1
        return self.root

    def below(self, root: int) -> list[str]:
        """The scopes that have not heard of this root yet."""
        return [scope.name for scope in self._scopes.values() if scope.root < root]

    # --- start ---------------------------------------------------------------------------------------------------

    def adopt(self, directory: Directory, items: Sequence[Item]) -> Scope:
        """Takes up what an owner named and what was found in it, moved to this root. Of two items at a position the later stands.

        Raises `LocalProtocolError` for a directory of this life, or a scope that is here. What is adopted may exceed the budget;
        then nothing is accepted until it fits again.
        """
        if directory.incarnation >= self.incarnation or directory.scope in self._scopes:
            raise LocalProtocolError(
                f"directory {directory} is not adopted: it is not of an earlier life than {self.incarnation}, or its scope "
                "is here already",
                directory=str(directory),
            )
        latest = {item.position: item for item in sorted(items)}
        folder = Folder(directory, self.root, len(items), sum(item.bytes for item in items))
        scope = Scope(
            directory.scope,
            self.incarnation,
            self.root,
            directory.epoch,
            Phase.LIVE,
            directory,
            durable=tuple(sorted(latest.values())),
            folders=(folder,),
            next_item=1 + max((item.number for item in items), default=-1),
        )
        self._scopes[scope.name] = scope
        self.used += Amount(folder.items, 0, folder.bytes)
        return scope

    def trash_found(self, items: int, bytes: int) -> None:
        """So much lay in the trash at start, or (negative) was removed from it since."""
        self._found += Amount(items, 0, bytes)
        self.used += Amount(items, 0, bytes)

    # --- what must hold ------------------------------------------------------------------------------------------

    def unwritten(self) -> list[Item]:
        """Accepted and neither durable nor failed nor erased: what a close that cannot wait longer has to report."""
        return [
            item
            for scope in self._scopes.values()
            for item in scope.writing
            if item.directory == scope.directory and not item.overdue
        ]

    def check_integrity(self) -> None:
        """Raises `AssertionError` unless the room charged is exactly what the scopes account for."""
        total = self._found
        for scope in self._scopes.values():
            total += Amount(0, sum(item.bytes for item in scope.writing), 0)
            if scope.phase is Phase.MAKING and scope.under_lock is not None:
                total += Amount(1, scope.under_lock.bytes, scope.under_lock.bytes)
            for folder in scope.folders:
                total += Amount(folder.items, 0, folder.bytes)
        assert total == self.used, f"charged {self.used}, accounted for {total}"
