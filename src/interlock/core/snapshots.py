"""Snapshots: one request's states, written behind to disk, and erased for good when the request ends.

What can go wrong. In jundot/omlx #1423 a writer checked that its request was alive, the request was erased, and the writer put the
file back: mkdir and rename by name. The repair counted cancellations per request id, took a lock around each write, and
waited for it two seconds; two waits that timed out pinned the counter, so that the next saves under that id vanished;
a reused id let the writer take the new save's entry for the old one's and write the old bytes under it; and one slow
write held up everybody's erase. Five ways lead around a mere rename, too (hazards M4): a directory made after the erase; a
directory of the same name made by the next life of the id; a descriptor closed and its number reused by another request;
a read that outlasts the erase; a promotion by descriptor.

Why it cannot here.
* A directory's name, (scope, incarnation, epoch), is used once. `Save` makes and opens it under the scope's lock, *before* the
  bytes are queued; the writer opens nothing by name, so it cannot make anything appear in another life of the id.
* `Erase` raises the epoch and renames the directory to the trash. A write in flight goes with it. It waits for no writer and
  counts nothing; there is nothing to time out. What is late belongs to an item by *number* and to its own directory.
* A descriptor is closed when its directory is not current any more and no write and no load works through it; never by erase.
* A load, from memory or disk, ends by asking again: the same epoch, or a miss. A promotion renames under the lock, after the
  check, and only what is durable in the current epoch.
* `RootMoved` (from erase_all) erases whatever stands under an older root: that root was, or will be, renamed to the trash whole.
* Accepted means readable at once, then `Durable` or `Failed`, or erased. A writer that is too late is reported as failure;
  its memory counts until it really let go. Disk room is reserved at acceptance and given back when the trash was emptied and
  the last descriptor closed, for an unlinked file keeps its blocks.

The lock. MAKING, MOVING and PROMOTING are its three metadata calls (mkdir and open, rename, rename): the driver holds the
scope's lock from the event that leads there to `CallDone` or `CallFailed`, and nothing else is possible meanwhile. It
never holds it over data.

What lies in one scope stands here; room, roots and adoption at start in core/snapshot_book.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import SNAPSHOT_ITEM_BYTES_MAX
from interlock.core.snapshot_events import (
    Accepted,
    CallDone,
    CallFailed,
    Charged,
    Close,
    CloseDirectory,
    Durable,
    Effects,
    Erase,
    Erased,
    EraseFailed,
    Event,
    Failed,
    Freed,
    LoadAsked,
    Loaded,
    LoadRead,
    MakeDirectory,
    Missed,
    MoveToStore,
    MoveToTrash,
    NotPromoted,
    Promote,
    Promoted,
    ReadFile,
    ReadStaged,
    Reaped,
    Refused,
    RootMoved,
    Save,
    Skip,
    Tick,
    WriteEnded,
)
from interlock.core.snapshot_state import Directory, Folder, Item, Load, Phase, Scope

Outcome = tuple[Scope, Effects]
_NOTHING: Effects = ()
_replace = msgspec.structs.replace

# --- saving ------------------------------------------------------------------------------------------------------


def _checked(scope: Scope, event: Save) -> None:
    if event.position < 0 or not 0 < event.bytes <= SNAPSHOT_ITEM_BYTES_MAX:
        _refuse(
            scope, event, f": {event.bytes} bytes at position {event.position} lie outside what can be kept"
        )


def _save_first(scope: Scope, event: Save) -> Outcome:
    _checked(scope, event)
    if not event.has_room:
        return scope, (Refused(event.position, "the snapshot budget is used up"),)
    directory = Directory(scope.name, scope.incarnation, scope.epoch)
    item = Item(scope.next_item, event.position, event.bytes, directory, event.deadline_s)
    making = _replace(scope, phase=Phase.MAKING, under_lock=item)
    return making, (Charged(event.bytes), MakeDirectory(directory, scope.root))


def _made(scope: Scope, _: CallDone) -> Outcome:
    item = scope.under_lock
    assert item is not None
    folders = (*scope.folders, Folder(item.directory, scope.root))
    live = _replace(
        scope, phase=Phase.LIVE, directory=item.directory, under_lock=None, folders=folders, durable=()
    )
    return _accept(live, item)


def _not_made(scope: Scope, event: CallFailed) -> Outcome:
    """The epoch is raised: a name that may be half made is not tried again."""
    item = scope.under_lock
    assert item is not None
    empty = _replace(scope, phase=Phase.EMPTY, under_lock=None, epoch=scope.epoch + 1)
    refused = Refused(item.position, f"its directory could not be made: {event.reason}")
    return empty, (refused, Freed(1, item.bytes, item.bytes))


def _save(scope: Scope, event: Save) -> Outcome:
    _checked(scope, event)
    kept = scope.staged_at(event.position) or scope.durable_at(event.position)
    if kept is not None:
        return scope, (Accepted(kept, is_new=False),)
    if not event.has_room:
        return scope, (Refused(event.position, "the snapshot budget is used up"),)
    assert scope.directory is not None
    item = Item(scope.next_item, event.position, event.bytes, scope.directory, event.deadline_s)
    kept_now, effects = _accept(scope, item)
    return kept_now, (Charged(event.bytes), *effects)


def _accept(scope: Scope, item: Item) -> Outcome:
    folder = scope.folder_of(item.directory)
    charged = _replace(folder, items=folder.items + 1, bytes=folder.bytes + item.bytes)
    scope = _replace(scope.with_folder(charged), next_item=item.number + 1, writing=(*scope.writing, item))
    return scope, (Accepted(item, is_new=True),)


def _save_closed(scope: Scope, event: Save) -> Outcome:
    return scope, (Refused(event.position, "the snapshot store is closed"),)


def _write_ended(scope: Scope, event: WriteEnded) -> Outcome:
    item = next((each for each in scope.writing if each.number == event.item), None)
    if item is None:
        _refuse(scope, event, f": item {event.item} is not being written")
    scope = _replace(scope, writing=tuple(each for each in scope.writing if each is not item))
    effects: Effects = (Freed(memory_bytes=item.bytes),)
    is_wanted = item.directory == scope.directory and not item.overdue
    if is_wanted and event.is_written:
        scope = _replace(scope, durable=tuple(sorted((*scope.durable, item))))
        effects += (Durable(item),)
    elif is_wanted:
        effects += (Failed(item, event.reason),)
    if not event.is_written and not event.left_behind:
        scope, freed = _uncharge(scope, item)
        effects += freed
    scope, more = _let_go(scope, item.directory)
    return scope, effects + more


def _uncharge(scope: Scope, item: Item) -> Outcome:
    """This item has nothing on disk, or not with us."""
    folder = scope.folder_of(item.directory)
    left = _replace(folder, items=folder.items - 1, bytes=folder.bytes - item.bytes)
    return scope.with_folder(left), (Freed(items=1, disk_bytes=item.bytes),)


def _let_go(scope: Scope, directory: Directory) -> Outcome:
    """Something about this directory ended: close its descriptor, give its room back, when it is time."""
    if scope.is_used(directory):
        return scope, _NOTHING
    folder = scope.folder_of(directory)
    effects: Effects = (CloseDirectory(directory),) if folder.is_open else _NOTHING
    if not folder.reaped:
        return scope.with_folder(_replace(folder, is_open=False)), effects
    gone = _replace(scope, folders=tuple(each for each in scope.folders if each is not folder))
    freed = (Freed(items=folder.items, disk_bytes=folder.bytes),) if folder.items else _NOTHING
    return gone, effects + freed


def _tick(scope: Scope, event: Tick) -> Outcome:
    """Reports what its writer did not end in time. Its memory stays charged: the writer may still read it."""
    late = [
        item
        for item in scope.writing
        if item.directory == scope.directory and not item.overdue and event.now_s >= item.deadline_s
    ]
    if not late:
        return scope, _NOTHING
    writing = tuple(_replace(item, overdue=True) if item in late else item for item in scope.writing)
    return _replace(scope, writing=writing), tuple(
        Failed(item, "it was not written by its deadline") for item in late
    )


# --- erasing -----------------------------------------------------------------------------------------------------


def _leave(scope: Scope) -> Outcome:
    """The current epoch is over: nothing of it is readable any more."""
    left = _replace(scope, epoch=scope.epoch + 1, directory=None, durable=(), phase=Phase.EMPTY)
    return left, tuple(Skip(item) for item in scope.writing if item.directory == scope.directory)


def _erase(scope: Scope, _: Erase) -> Outcome:
    left, effects = _leave(scope)
    moving, more = _move_next(left)
    return moving, effects + more


def _erase_empty(scope: Scope, _: Erase) -> Outcome:
    return _move_next(scope)


def _move_next(scope: Scope) -> Outcome:
    """What is not current and still under the live root is renamed, one directory after the other."""
    folder = _in_the_way(scope)
    if folder is None:
        return _replace(scope, phase=Phase.EMPTY), (Erased(),)
    return _replace(scope, phase=Phase.MOVING), (MoveToTrash(folder.name, folder.root),)


def _in_the_way(scope: Scope) -> Folder | None:
    return next((f for f in scope.folders if not f.trashed), None)


def _moved(scope: Scope, _: CallDone) -> Outcome:
    folder = _in_the_way(scope)
    assert folder is not None
    scope, effects = _let_go(scope.with_folder(_replace(folder, trashed=True)), folder.name)
    scope, more = _move_next(scope)
    return scope, effects + more


def _not_moved(scope: Scope, event: CallFailed) -> Outcome:
    folder = _in_the_way(scope)
    assert folder is not None
    scope, effects = _let_go(scope, folder.name)
    return _replace(scope, phase=Phase.EMPTY), (EraseFailed(event.reason), *effects)


def _root_moved(scope: Scope, event: RootMoved) -> Outcome:
    effects = _NOTHING
    if scope.directory is not None and scope.folder_of(scope.directory).root < event.root:
        scope, effects = _leave(scope)
    for folder in scope.folders:
        if folder.root < event.root and not folder.trashed:
            scope, more = _let_go(scope.with_folder(_replace(folder, trashed=True)), folder.name)
            effects += more
    return _replace(scope, root=max(scope.root, event.root)), effects


def _reaped(scope: Scope, event: Reaped) -> Outcome:
    folder = next((each for each in scope.folders if each.name == event.directory), None)
    if folder is None or not folder.trashed:
        _refuse(scope, event, f": {event.directory} was not in the trash")
    return _let_go(scope.with_folder(_replace(folder, reaped=True)), event.directory)


# --- reading -----------------------------------------------------------------------------------------------------


def _load(scope: Scope, event: LoadAsked) -> Outcome:
    if any(load.number == event.load for load in scope.loads):
        _refuse(scope, event, f": load {event.load} is under way")
    staged = scope.staged_at(event.position)
    item = staged or scope.durable_at(event.position)
    if item is None:
        return _miss(scope, event)
    load = Load(event.load, item)
    begun = _replace(scope, loads=(*scope.loads, load))
    return begun, (ReadFile(load) if staged is None else ReadStaged(load),)


def _miss(scope: Scope, event: LoadAsked) -> Outcome:
    return scope, (Missed(event.load, "no state is kept at this position"),)


def _load_read(scope: Scope, event: LoadRead) -> Outcome:
    load = next((each for each in scope.loads if each.number == event.load), None)
    if load is None:
        _refuse(scope, event, f": load {event.load} is not under way")
    scope = _replace(scope, loads=tuple(each for each in scope.loads if each is not load))
    effects: Effects
    if load.item.directory != scope.directory:
        effects = (Missed(event.load, "it was erased while it was read"),)
    elif event.is_good:
        effects = (Loaded(load),)
    else:  # Not served again: the file is damaged, or was moved into the store while it was opened.
        kept = tuple(item for item in scope.durable if item != load.item)
        scope, effects = _replace(scope, durable=kept), (Missed(event.load, "its bytes could not be read"),)
    scope, more = _let_go(scope, load.item.directory)
    return scope, effects + more


# --- promoting ---------------------------------------------------------------------------------------------------


def _promote(scope: Scope, event: Promote) -> Outcome:
    item = scope.durable_at(event.position)
    if item is None:
        return _promote_nothing(scope, event)
    return _replace(scope, phase=Phase.PROMOTING, under_lock=item), (MoveToStore(item),)


def _promote_nothing(scope: Scope, event: Promote) -> Outcome:
    return scope, (NotPromoted(event.position, "no durable state is kept at this position"),)


def _promoted(scope: Scope, _: CallDone) -> Outcome:
    item = scope.under_lock
    assert item is not None
    kept = tuple(each for each in scope.durable if each != item)
    scope = _replace(scope, phase=Phase.LIVE, under_lock=None, durable=kept)
    scope, effects = _uncharge(scope, item)
    return scope, (Promoted(item), *effects)


def _not_promoted(scope: Scope, event: CallFailed) -> Outcome:
    assert scope.under_lock is not None
    said = NotPromoted(scope.under_lock.position, f"its file could not be moved: {event.reason}")
    return _replace(scope, phase=Phase.LIVE, under_lock=None), (said,)


# --- the end -----------------------------------------------------------------------------------------------------


def _close(scope: Scope, _: Close) -> Outcome:
    closed = _replace(scope, phase=Phase.CLOSED)
    return (closed, _NOTHING) if scope.directory is None else _let_go(closed, scope.directory)


def _refuse(scope: Scope, event: Event, why: str = "") -> NoReturn:
    raise LocalProtocolError(
        f"scope {scope.name} is {scope.phase} and {type(event).__name__} is not possible{why}",
        scope=scope.name,
        epoch=scope.epoch,
        state=str(scope.phase),
        event=type(event).__name__,
    )


class Move(msgspec.Struct, frozen=True):
    """A row's right-hand side: what is done, and the phases it may lead to."""

    does: Callable[[Scope, Any], Outcome]
    to: tuple[Phase, ...]


EMPTY, MAKING, LIVE, MOVING, PROMOTING, CLOSED = Phase
# fmt: off
TABLE: dict[tuple[Phase, type], Move] = {
    (EMPTY, Save):           Move(_save_first,      (EMPTY, MAKING)),
    (EMPTY, WriteEnded):     Move(_write_ended,     (EMPTY,)),
    (EMPTY, Erase):          Move(_erase_empty,     (EMPTY, MOVING)),
    (EMPTY, RootMoved):      Move(_root_moved,      (EMPTY,)),
    (EMPTY, LoadAsked):      Move(_miss,            (EMPTY,)),
    (EMPTY, LoadRead):       Move(_load_read,       (EMPTY,)),
    (EMPTY, Promote):        Move(_promote_nothing, (EMPTY,)),
    (EMPTY, Reaped):         Move(_reaped,          (EMPTY,)),
    (EMPTY, Tick):           Move(_tick,            (EMPTY,)),
    (EMPTY, Close):          Move(_close,           (CLOSED,)),
    (MAKING, CallDone):      Move(_made,            (LIVE,)),
    (MAKING, CallFailed):    Move(_not_made,        (EMPTY,)),
    (LIVE, Save):            Move(_save,            (LIVE,)),
    (LIVE, WriteEnded):      Move(_write_ended,     (LIVE,)),
    (LIVE, Erase):           Move(_erase,           (MOVING,)),
    (LIVE, RootMoved):       Move(_root_moved,      (LIVE, EMPTY)),
    (LIVE, LoadAsked):       Move(_load,            (LIVE,)),
    (LIVE, LoadRead):        Move(_load_read,       (LIVE,)),
    (LIVE, Promote):         Move(_promote,         (LIVE, PROMOTING)),
    (LIVE, Reaped):          Move(_reaped,          (LIVE,)),
    (LIVE, Tick):            Move(_tick,            (LIVE,)),
    (LIVE, Close):           Move(_close,           (CLOSED,)),
    (MOVING, CallDone):      Move(_moved,           (EMPTY, MOVING)),
    (MOVING, CallFailed):    Move(_not_moved,       (EMPTY,)),
    (PROMOTING, CallDone):   Move(_promoted,        (LIVE,)),
    (PROMOTING, CallFailed): Move(_not_promoted,    (LIVE,)),
    (CLOSED, Save):          Move(_save_closed,     (CLOSED,)),
    (CLOSED, WriteEnded):    Move(_write_ended,     (CLOSED,)),
    (CLOSED, LoadAsked):     Move(_miss,            (CLOSED,)),
    (CLOSED, LoadRead):      Move(_load_read,       (CLOSED,)),
    (CLOSED, Promote):       Move(_promote_nothing, (CLOSED,)),
    (CLOSED, Reaped):        Move(_reaped,          (CLOSED,)),
    (CLOSED, Tick):          Move(_tick,            (CLOSED,)),
}
# fmt: on


def transition(state: Scope, event: Event) -> Outcome:
    """The scope after `event`, and what follows from it, to be done in order.

    Raises `LocalProtocolError` for what no table row allows and for an item, load or directory it does not know; the state is
    unchanged then.
    """
    move = TABLE.get((state.phase, type(event)))
    if move is None:
        _refuse(state, event)
    return move.does(state, event)
