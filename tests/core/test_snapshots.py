"""One scope: what is erased is read by nobody and seen nowhere, whoever is late; what was accepted is durable or reported failed."""

import timeit
from collections.abc import Callable

import msgspec
import pytest

from interlock.core import snapshots
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
    Effect,
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
from interlock.core.snapshot_state import Directory, Item, Load, Phase, Scope, scope_name
from interlock.core.snapshots import TABLE, transition

NEW = Scope("a", 7, 3)
FIRST, SECOND = Directory("a", 7, 0), Directory("a", 7, 1)
ITEM = Item(0, 256, 10, FIRST, 5.0)
SAVE = Save(256, 10, 5.0)
WRITTEN, UNWRITTEN = WriteEnded(0, True), WriteEnded(0, False, "ENOSPC")
KEPT = (SAVE, CallDone(), WRITTEN)
ERASE = (Erase(), CallDone())


def told(*events: Event, scope: Scope = NEW) -> tuple[Scope, list[Effect]]:
    """The scope after all events, and what followed from the last."""
    effects: tuple[Effect, ...] = ()
    for event in events:
        scope, effects = transition(scope, event)
    return scope, list(effects)


PHASES: dict[Phase, Scope] = {
    Phase.EMPTY: NEW,
    Phase.MAKING: told(SAVE)[0],
    Phase.LIVE: told(*KEPT)[0],
    Phase.MOVING: told(*KEPT, Erase())[0],
    Phase.PROMOTING: told(*KEPT, Promote(256))[0],
    Phase.CLOSED: told(*KEPT, Close())[0],
}
EVENTS: list[Event] = [
    SAVE, CallDone(), CallFailed("EIO"), WRITTEN, Erase(), RootMoved(4), LoadAsked(1, 256), LoadRead(1, True), Promote(256),
    Reaped(FIRST), Tick(9.0), Close(),
]  # fmt: skip

# --- saving ------------------------------------------------------------------------------------------------------


def test_the_directory_is_made_under_the_lock_before_anything_is_queued() -> None:
    making, effects = told(SAVE)
    assert making.phase is Phase.MAKING
    assert effects == [Charged(10), MakeDirectory(FIRST, 3)]
    live, effects = told(CallDone(), scope=making)
    assert effects == [Accepted(ITEM, is_new=True)]
    assert live.staged_at(256) == ITEM


def test_a_written_item_is_durable_and_its_memory_free() -> None:
    live, effects = told(*KEPT)
    assert effects == [Freed(memory_bytes=10), Durable(ITEM)]
    assert live.durable_at(256) == ITEM
    assert live.staged_at(256) is None


def test_a_failed_write_reaches_the_owner_and_gives_all_its_room_back() -> None:
    live, effects = told(SAVE, CallDone(), UNWRITTEN)
    assert effects == [Freed(memory_bytes=10), Failed(ITEM, "ENOSPC"), Freed(items=1, disk_bytes=10)]
    assert told(LoadAsked(1, 256), scope=live)[1] == [Missed(1, "no state is kept at this position")]


def test_what_a_failed_write_left_behind_stays_charged_until_its_directory_is_reaped() -> None:
    left = WriteEnded(0, False, "EIO", left_behind=True)
    live, effects = told(SAVE, CallDone(), left)
    assert effects == [Freed(memory_bytes=10), Failed(ITEM, "EIO")]
    _, effects = told(*ERASE, Reaped(FIRST), scope=live)
    assert effects == [Freed(items=1, disk_bytes=10)]


def test_the_same_position_is_kept_once_in_one_epoch() -> None:
    live, _ = told(SAVE, CallDone())
    assert told(SAVE, scope=live) == (live, [Accepted(ITEM, is_new=False)])
    live, _ = told(WRITTEN, scope=live)
    assert told(SAVE, scope=live) == (live, [Accepted(ITEM, is_new=False)])
    _, effects = told(Save(512, 10, 5.0), scope=live)
    assert effects == [Charged(10), Accepted(Item(1, 512, 10, FIRST, 5.0), is_new=True)]


@pytest.mark.parametrize("events", [(), (SAVE, CallDone())], ids=["empty", "live"])
def test_a_save_without_room_is_refused_at_once_and_changes_nothing(events: tuple[Event, ...]) -> None:
    scope, _ = told(*events)
    full = Save(512, 10, 5.0, has_room=False)
    assert told(full, scope=scope) == (scope, [Refused(512, "the snapshot budget is used up")])


@pytest.mark.parametrize(
    "save", [Save(-1, 10, 5.0), Save(0, 0, 5.0), Save(0, SNAPSHOT_ITEM_BYTES_MAX + 1, 5.0)]
)
@pytest.mark.parametrize("phase", [Phase.EMPTY, Phase.LIVE])
def test_a_save_that_cannot_be_is_a_defect_of_the_caller(save: Save, phase: Phase) -> None:
    with pytest.raises(LocalProtocolError, match="lie outside what can be kept"):
        transition(PHASES[phase], save)


def test_the_largest_item_at_the_first_position_can_be_kept() -> None:
    assert told(Save(0, SNAPSHOT_ITEM_BYTES_MAX, 5.0))[0].phase is Phase.MAKING


def test_a_directory_that_could_not_be_made_refuses_the_save_and_its_name_is_not_tried_again() -> None:
    empty, effects = told(SAVE, CallFailed("EMFILE"))
    assert effects == [
        Refused(256, "its directory could not be made: EMFILE"),
        Freed(items=1, memory_bytes=10, disk_bytes=10),
    ]
    assert told(SAVE, scope=empty)[1] == [Charged(10), MakeDirectory(SECOND, 3)]


def test_a_write_that_is_too_late_is_reported_failed_once_and_what_it_says_later_makes_nothing_readable() -> (
    None
):
    live, _ = told(SAVE, CallDone())
    assert told(Tick(4.9), scope=live) == (live, [])
    late, effects = told(Tick(5.0), scope=live)
    assert effects == [Failed(ITEM, "it was not written by its deadline")]
    assert told(Tick(6.0), scope=late) == (late, [])
    assert isinstance(told(LoadAsked(1, 256), scope=late)[1][0], Missed)
    again, effects = told(SAVE, scope=late)
    assert effects[-1] == Accepted(msgspec.structs.replace(ITEM, number=1), is_new=True)
    ended, effects = told(WRITTEN, scope=again)
    assert effects == [Freed(memory_bytes=10)]
    assert ended.durable == ()


def test_a_late_write_of_an_erased_epoch_is_nobodys_failure() -> None:
    empty, effects = told(SAVE, CallDone(), *ERASE, Tick(9.0))
    assert effects == []
    assert empty.phase is Phase.EMPTY


# --- erasing -----------------------------------------------------------------------------------------------------


def test_erasing_waits_for_no_writer_and_takes_its_directory_with_it() -> None:
    live, _ = told(SAVE, CallDone())
    moving, effects = told(Erase(), scope=live)
    assert effects == [Skip(ITEM), MoveToTrash(FIRST, 3)]
    empty, effects = told(CallDone(), scope=moving)
    assert effects == [Erased()]  # The writer still works through the descriptor.
    ended, effects = told(WRITTEN, scope=empty)
    assert effects == [Freed(memory_bytes=10), CloseDirectory(FIRST)]
    ended, effects = told(Reaped(FIRST), scope=ended)
    assert effects == [Freed(items=1, disk_bytes=10)]
    assert ended.is_forgettable


def test_the_next_life_of_an_id_has_another_directory_and_the_old_writer_does_not_reach_it() -> None:
    scope, effects = told(SAVE, CallDone(), *ERASE, SAVE)
    assert effects == [Charged(10), MakeDirectory(SECOND, 3)]
    scope, effects = told(CallDone(), WRITTEN, scope=scope)
    assert effects == [Freed(memory_bytes=10), CloseDirectory(FIRST)]
    assert scope.durable == ()
    second = msgspec.structs.replace(ITEM, number=1, directory=SECOND)
    assert told(WriteEnded(1, True), scope=scope)[1] == [Freed(memory_bytes=10), Durable(second)]


def test_an_unlinked_file_keeps_its_room_until_the_last_descriptor_is_closed() -> None:
    scope, effects = told(SAVE, CallDone(), *ERASE, Reaped(FIRST))
    assert effects == []
    scope, effects = told(WRITTEN, scope=scope)
    assert effects == [Freed(memory_bytes=10), CloseDirectory(FIRST), Freed(items=1, disk_bytes=10)]
    assert scope.is_forgettable


def test_a_write_that_met_a_removed_directory_gives_its_room_back_once() -> None:
    scope, effects = told(SAVE, CallDone(), *ERASE, Reaped(FIRST), UNWRITTEN)
    assert effects == [Freed(memory_bytes=10), Freed(items=1, disk_bytes=10), CloseDirectory(FIRST)]
    assert scope.is_forgettable


def test_erasing_nothing_is_done_at_once() -> None:
    assert told(Erase()) == (NEW, [Erased()])


def test_an_erase_that_could_not_rename_says_so_hides_everything_and_can_be_repeated() -> None:
    stuck, effects = told(*KEPT, Erase(), CallFailed("EIO"))
    assert effects == [EraseFailed("EIO"), CloseDirectory(FIRST)]
    assert isinstance(told(LoadAsked(1, 256), scope=stuck)[1][0], Missed)
    assert told(*ERASE, scope=stuck)[1] == [Erased()]
    both, effects = told(SAVE, CallDone(), Erase(), scope=stuck)
    assert effects[-1] == MoveToTrash(FIRST, 3)
    moving, effects = told(CallDone(), scope=both)
    assert effects == [MoveToTrash(SECOND, 3)]
    assert moving.phase is Phase.MOVING
    assert told(CallDone(), scope=moving)[1] == [Erased()]


def test_a_moved_root_erases_what_stood_under_it_without_a_rename_of_its_own() -> None:
    live, _ = told(*KEPT)
    empty, effects = told(RootMoved(4), scope=live)
    assert effects == [CloseDirectory(FIRST)]
    assert (empty.phase, empty.root) == (Phase.EMPTY, 4)
    assert told(SAVE, scope=empty)[1][-1] == MakeDirectory(SECOND, 4)
    assert told(Reaped(FIRST), scope=empty)[0].is_forgettable


def test_a_moved_root_that_is_heard_late_spares_what_stands_under_the_new_one() -> None:
    live, _ = told(SAVE, CallDone(), scope=Scope("a", 7, 4))
    assert told(RootMoved(4), scope=live) == (live, [])
    assert told(RootMoved(3), scope=live) == (live, [])


def test_a_moved_root_takes_a_stranded_directory_and_a_writer_with_it() -> None:
    stuck, _ = told(SAVE, CallDone(), Erase(), CallFailed("EIO"))
    moved, effects = told(RootMoved(4), scope=stuck)
    assert effects == []
    assert told(Erase(), scope=moved)[1] == [Erased()]
    again, _ = told(SAVE, CallDone(), scope=moved)
    assert told(RootMoved(5), scope=again)[1] == [Skip(Item(1, 256, 10, SECOND, 5.0))]


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_load_takes_staged_bytes_before_the_disk_is_asked() -> None:
    scope, effects = told(SAVE, CallDone(), LoadAsked(1, 256))
    assert effects == [ReadStaged(Load(1, ITEM))]
    assert told(LoadRead(1, True), scope=scope)[1] == [Loaded(Load(1, ITEM))]
    assert told(*KEPT, LoadAsked(1, 256))[1] == [ReadFile(Load(1, ITEM))]


@pytest.mark.parametrize("next_life", [(), (SAVE, CallDone(), WriteEnded(1, True))], ids=["erased", "reused"])
def test_a_load_that_outlasts_an_erase_returns_nothing(next_life: tuple[Event, ...]) -> None:
    scope, _ = told(*KEPT, LoadAsked(1, 256), *ERASE, *next_life)
    _, effects = told(LoadRead(1, True), scope=scope)
    assert effects == [Missed(1, "it was erased while it was read"), CloseDirectory(FIRST)]


def test_a_file_that_could_not_be_read_is_not_served_again() -> None:
    scope, effects = told(*KEPT, LoadAsked(1, 256), LoadRead(1, False))
    assert effects == [Missed(1, "its bytes could not be read")]
    assert isinstance(told(LoadAsked(2, 256), scope=scope)[1][0], Missed)


def test_loads_are_told_apart_by_their_numbers() -> None:
    scope, _ = told(*KEPT, LoadAsked(1, 256), LoadAsked(2, 256))
    with pytest.raises(LocalProtocolError, match="load 2 is under way"):
        transition(scope, LoadAsked(2, 256))
    with pytest.raises(LocalProtocolError, match="load 3 is not under way"):
        transition(scope, LoadRead(3, True))
    scope, _ = told(LoadRead(1, True), scope=scope)
    assert [load.number for load in scope.loads] == [2]


# --- promoting ---------------------------------------------------------------------------------------------------


def test_a_promoted_file_belongs_to_the_store_with_its_room() -> None:
    moving, effects = told(*KEPT, Promote(256))
    assert effects == [MoveToStore(ITEM)]
    live, effects = told(CallDone(), scope=moving)
    assert effects == [Promoted(ITEM), Freed(items=1, disk_bytes=10)]
    assert live.durable == ()
    _, effects = told(*ERASE, Reaped(FIRST), scope=live)
    assert effects == []


def test_a_load_that_meets_a_promotion_is_a_miss_and_harms_nothing() -> None:
    scope, effects = told(*KEPT, LoadAsked(1, 256), Promote(256), CallDone(), LoadRead(1, False))
    assert effects == [Missed(1, "its bytes could not be read")]
    assert scope.phase is Phase.LIVE


def test_a_failed_promotion_leaves_the_file_where_it_was() -> None:
    live, effects = told(*KEPT, Promote(256), CallFailed("EXDEV"))
    assert effects == [NotPromoted(256, "its file could not be moved: EXDEV")]
    assert live == PHASES[Phase.LIVE]


@pytest.mark.parametrize("events", [(), (SAVE, CallDone()), (*KEPT, *ERASE), (*KEPT, Close())])
def test_only_what_is_durable_in_this_epoch_is_promoted(events: tuple[Event, ...]) -> None:
    scope, _ = told(*events)
    assert told(Promote(256), scope=scope) == (
        scope,
        [NotPromoted(256, "no durable state is kept at this position")],
    )


# --- the end, and what must not be -------------------------------------------------------------------------------


def test_a_closed_scope_refuses_saves_and_still_hears_its_writers() -> None:
    closed, effects = told(SAVE, CallDone(), Close())
    assert effects == []
    assert told(SAVE, scope=closed)[1] == [Refused(256, "the snapshot store is closed")]
    assert isinstance(told(LoadAsked(1, 256), scope=closed)[1][0], Missed)
    assert told(WRITTEN, scope=closed)[1] == [Freed(memory_bytes=10), Durable(ITEM), CloseDirectory(FIRST)]
    assert told(Close())[0].is_forgettable


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_what_is_in_no_row_is_refused_naming_state_and_event_and_changes_nothing(
    phase: Phase, event: Event
) -> None:
    scope = PHASES[phase]
    if (phase, type(event)) in TABLE:
        return
    before = msgspec.json.encode(scope)
    with pytest.raises(LocalProtocolError, match=f"is {phase} and {type(event).__name__} is not possible"):
        transition(scope, event)
    assert msgspec.json.encode(scope) == before


@pytest.mark.parametrize(("phase", "kind"), TABLE)
def test_every_row_leads_where_it_says(phase: Phase, kind: type) -> None:
    event = next(event for event in EVENTS if type(event) is kind)
    scope = PHASES[phase]
    if kind in (WriteEnded, LoadRead, Reaped):  # For these something must be under way.
        scope, _ = told(SAVE, CallDone(), Erase(), CallDone())
        scope = msgspec.structs.replace(scope, phase=phase, loads=(Load(1, ITEM),))
    after, _ = transition(scope, event)
    assert after.phase in TABLE[phase, kind].to


def test_under_the_lock_only_the_end_of_the_call_is_possible() -> None:
    for phase in (Phase.MAKING, Phase.MOVING, Phase.PROMOTING):
        assert {event for at, event in TABLE if at is phase} == {CallDone, CallFailed}


@pytest.mark.parametrize("event", [WriteEnded(9, True), Reaped(SECOND), Reaped(FIRST)])
def test_an_item_or_directory_that_is_unknown_or_not_in_the_trash_is_refused(event: Event) -> None:
    with pytest.raises(LocalProtocolError, match=r"not being written|not in the trash"):
        transition(PHASES[Phase.LIVE], event)


def test_a_request_id_never_becomes_part_of_a_path() -> None:
    name = scope_name("../../etc/passwd")
    assert len(name) == 32
    assert set(name) <= set("0123456789abcdef")
    assert scope_name("a") != scope_name("b")
    assert str(Directory(name, 7, 2)) == f"{name}.7.2"
    assert ITEM.file == "256.0"


@pytest.mark.parametrize("events", [(SAVE,), KEPT, (*KEPT, Erase()), (*KEPT, LoadAsked(1, 256))])
def test_a_transition_costs_microseconds(events: tuple[Event, ...]) -> None:
    """Ten on an idle machine (docs/protocols/snapshots.md); ten times that is a defect on any."""
    scope, _ = told(*events[:-1])
    step: Callable[[], object] = lambda: transition(scope, events[-1])  # noqa: E731
    cost = min(timeit.repeat(step, number=500, repeat=5)) / 500
    assert cost < 100e-6


def test_every_row_names_a_phase_it_may_lead_to() -> None:
    assert all(move.to for move in TABLE.values())
    assert {phase for phase, _ in TABLE} == set(Phase)
    assert snapshots.TABLE is TABLE
