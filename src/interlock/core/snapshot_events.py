"""What a scope of the snapshot store is told, and what follows from it. The rules are core/snapshots.

A driver does effects in the order in which they come, and those marked *now, under the lock* before it lets anything else
reach the scope.
"""

from __future__ import annotations

import msgspec

from interlock.core.snapshot_state import Directory, Item, Load

# --- events ------------------------------------------------------------------------------------------------------


class Save(msgspec.Struct, frozen=True):
    """Keep `bytes` bytes of state at `position`. `has_room`: they fit into the budget, which is charged by `Charged`."""

    position: int
    bytes: int
    deadline_s: float
    has_room: bool = True


class CallDone(msgspec.Struct, frozen=True):
    """The metadata call made under the lock succeeded."""


class CallFailed(msgspec.Struct, frozen=True):
    """The call under the scope's lock (make, move or promote) failed; `reason` is the system's word."""

    reason: str


class WriteEnded(msgspec.Struct, frozen=True):
    """The writer will not touch this item again. `left_behind`: it failed and could not remove what it had written."""

    item: int
    is_written: bool
    reason: str = ""
    left_behind: bool = False


class Erase(msgspec.Struct, frozen=True):
    """The request is over: nothing of it may be read from now on."""


class RootMoved(msgspec.Struct, frozen=True):
    """The live root is live/<root> now; directories in older ones are erased with them."""

    root: int


class LoadAsked(msgspec.Struct, frozen=True):
    """Somebody wants the state at `position`. `load` is a number of the driver's, not in use for another load."""

    load: int
    position: int


class LoadRead(msgspec.Struct, frozen=True):
    """The bytes are in the loader's memory and their checksum is right (`is_good`), or not."""

    load: int
    is_good: bool


class Promote(msgspec.Struct, frozen=True):
    """Move the durable file at `position` into the store."""

    position: int


class Reaped(msgspec.Struct, frozen=True):
    """The reaper removed this directory from the trash."""

    directory: Directory


class Tick(msgspec.Struct, frozen=True):
    """Time goes on. Monotonic clock, seconds."""

    now_s: float


class Close(msgspec.Struct, frozen=True):
    """No more saves, loads or erasures. What is being written may still end; files stay for the next start."""


Event = (
    Save | CallDone | CallFailed | WriteEnded | Erase | RootMoved | LoadAsked | LoadRead | Promote | Reaped | Tick | Close
)  # fmt: skip

# --- effects -----------------------------------------------------------------------------------------------------


class MakeDirectory(msgspec.Struct, frozen=True):
    """Now, under the lock: make this directory in live/<root> and open it. Then `CallDone` or `CallFailed`."""

    directory: Directory
    root: int


class MoveToTrash(msgspec.Struct, frozen=True):
    """Now, under the lock: rename this directory of live/<root> into the trash. Then `CallDone` or `CallFailed`."""

    directory: Directory
    root: int


class MoveToStore(msgspec.Struct, frozen=True):
    """Now, under the lock: rename this item's file, by its directory's descriptor, into the store. Then as above."""

    item: Item


class Accepted(msgspec.Struct, frozen=True):
    """Readable from now on. `is_new`: queue its bytes for a writer, which writes through the directory's descriptor; else the
    same state is kept already."""

    item: Item
    is_new: bool


class Refused(msgspec.Struct, frozen=True):
    """Nothing was kept; the caller still has the state."""

    position: int
    reason: str


class Durable(msgspec.Struct, frozen=True):
    """An accepted state is on disk, synced. To the owner."""

    item: Item


class Failed(msgspec.Struct, frozen=True):
    """An accepted state will not become durable. To the owner."""

    item: Item
    reason: str


class Skip(msgspec.Struct, frozen=True):
    """Nobody wants this any more: a writer that has not begun should end it unwritten. Only a saving, nothing hangs on it."""

    item: Item


class Erased(msgspec.Struct, frozen=True):
    """Erasure is complete: nothing under the live root, nothing readable."""


class EraseFailed(msgspec.Struct, frozen=True):
    """Nothing is readable, but files are still under the live root. Repeat `Erase`; at the next start they are trash."""

    reason: str


class ReadStaged(msgspec.Struct, frozen=True):
    """Take the item's bytes from memory, then tell `LoadRead`."""

    load: Load


class ReadFile(msgspec.Struct, frozen=True):
    """Read the item's file through its directory's descriptor and check it, then tell `LoadRead`."""

    load: Load


class Loaded(msgspec.Struct, frozen=True):
    """Hand the bytes out."""

    load: Load


class Missed(msgspec.Struct, frozen=True):
    """Hand out nothing, and drop what was read."""

    load: int
    reason: str


class Promoted(msgspec.Struct, frozen=True):
    """The store owns the file now, and its bytes."""

    item: Item


class NotPromoted(msgspec.Struct, frozen=True):
    """The state at `position` stays what it was, for this reason (a sentence)."""

    position: int
    reason: str


class CloseDirectory(msgspec.Struct, frozen=True):
    """Nobody works through this directory's descriptor any more: close it."""

    directory: Directory


class Charged(msgspec.Struct, frozen=True):
    """One item of so many bytes counts from now on, in memory and on disk."""

    bytes: int


class Freed(msgspec.Struct, frozen=True):
    """Give this back to the budget."""

    items: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0


Effect = (
    MakeDirectory | MoveToTrash | MoveToStore | Accepted | Refused | Durable | Failed | Skip | Erased | EraseFailed | ReadStaged
    | ReadFile | Loaded | Missed | Promoted | NotPromoted | CloseDirectory | Charged | Freed
)  # fmt: skip
Effects = tuple[Effect, ...]
