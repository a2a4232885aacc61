"""What was decided is read back as it was meant, and what is kept is bounded."""

from pathlib import Path

import msgspec
import pytest

from interlock.core.fleet_state import FleetState, Phase
from interlock.core.identity import Epoch
from interlock.core.limits import COMMANDS_KEPT_MAX
from interlock.core.roster import MemberRecord, Sight
from interlock.core.targets import Hold, Mode, State
from interlock.fleet import coordinator_state
from interlock.fleet.command_book import CommandBook, judge
from interlock.fleet.coordinator_state import CommandRecord, CoordinatorFile, KnownMember
from interlock.host.files import RealFiles
from interlock.wire.fleet_messages import EngineFacts

FLEET = FleetState(
    Phase.LEADING, Epoch(3, 4), State.PAUSED, "7", holds=(Hold("t", Mode.ABORT, 110.0), Hold("u", Mode.KEEP))
)


class Clock:
    def __init__(self, monotonic_s: float, wall_s: float) -> None:
        self.monotonic, self.wall = monotonic_s, wall_s

    def monotonic_s(self) -> float:
        return self.monotonic

    def wall_ns(self) -> int:
        return int(self.wall * 1e9)


class Machine:
    """Files that are real, clocks that are told."""

    def __init__(self, monotonic_s: float, wall_s: float) -> None:
        self.clock, self.files = Clock(monotonic_s, wall_s), RealFiles()


def file(directory: Path, monotonic_s: float, wall_s: float) -> CoordinatorFile:
    return CoordinatorFile(Machine(monotonic_s, wall_s), directory)  # type: ignore[arg-type]


def record(number: int = 1, *, done: bool = False, deadline_s: float = 150.0) -> CommandRecord:
    return CommandRecord(
        owner="t",
        command_id=str(number),
        command="PAUSE",
        epoch=FLEET.epoch,
        wanted="PAUSED",
        deadline_s=deadline_s,
        done=done,
    )


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    members = [KnownMember("a", 5, EngineFacts("unix:/a", "m", 9, "vllm"))]
    file(tmp_path, 100, 1000).save(FLEET, [record()], members)
    stored, why = file(tmp_path, 100, 1000).load()
    assert (stored.fleet, stored.commands, stored.members, why) == (FLEET, [record()], members, "")


@pytest.mark.parametrize(
    ("monotonic_s", "wall_s", "left_s"),
    [(104, 1004, 6), (3, 1004, 6), (3, 1020, -10), (104, 900, 10)],
    ids=["same boot", "another boot", "over meanwhile", "the wall clock stepped back: later, never earlier"],
)
def test_a_deadline_means_the_same_moment_after_a_restart(
    tmp_path: Path, monotonic_s: float, wall_s: float, left_s: float
) -> None:
    file(tmp_path, 100, 1000).save(FLEET, [record()], [])
    stored, _ = file(tmp_path, monotonic_s, wall_s).load()
    timed, untimed = stored.fleet.holds
    assert timed.deadline_s - monotonic_s == pytest.approx(left_s)
    assert untimed.deadline_s is None
    assert stored.commands[0].deadline_s - monotonic_s == pytest.approx(left_s + 40)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"fleet": {"phase": "DREAMING"}}'])
def test_what_cannot_be_read_is_no_state_and_says_why(tmp_path: Path, content: bytes) -> None:
    (tmp_path / coordinator_state.FILE).write_bytes(content)
    stored, why = file(tmp_path, 1, 1).load()
    assert stored is None
    assert coordinator_state.FILE in why


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file(tmp_path, 100, 1000).save(FLEET, [], [])
    monkeypatch.setattr(coordinator_state, "COORDINATOR_STATE_BYTES_MAX", 10)
    with pytest.raises(OSError, match="would keep"):
        file(tmp_path, 100, 1000).save(FLEET, [record()], [])
    monkeypatch.undo()
    assert file(tmp_path, 100, 1000).load()[0].commands == []


def test_the_book_forgets_the_oldest_finished_command_and_never_one_under_way() -> None:
    book = CommandBook([record(0)])
    for number in range(1, COMMANDS_KEPT_MAX + 5):
        book.put(record(number, done=True))
    assert len(book.records()) == COMMANDS_KEPT_MAX
    assert book.get("t", "0") is not None
    assert book.get("t", "1") is None
    assert book.get("t", str(COMMANDS_KEPT_MAX + 4)) is not None


STANDING = MemberRecord("a", 1, State.PAUSED, FLEET.epoch, FLEET.epoch)
AWAY = MemberRecord("b", 1, State.RUNNING, sight=Sight.SUSPECT)


def test_a_command_is_done_when_everybody_stands() -> None:
    after, _ = judge(record(), FLEET, [STANDING], now_s=100)
    assert (after.done, after.ok) == (True, True)


def test_a_command_waits_for_the_silent_until_its_deadline_and_then_names_them() -> None:
    assert not judge(record(), FLEET, [STANDING, AWAY], now_s=149)[0].done
    after, _ = judge(record(), FLEET, [STANDING, AWAY], now_s=150)
    assert (after.done, after.ok) == (True, False)
    assert "b cannot be seen" in after.message
    assert {m.name: m.outcome for m in after.members} == {"a": "standing", "b": "unknown"}


def test_a_command_that_another_has_overtaken_says_so() -> None:
    running = msgspec.structs.replace(FLEET, state=State.RUNNING, holds=())
    after, _ = judge(record(), running, [STANDING], now_s=100)
    assert (after.done, after.ok) == (True, False)
    assert "superseded: the fleet's target is RUNNING" in after.message


def test_a_stop_by_way_of_a_pause_is_not_done_at_the_pause() -> None:
    stopping = msgspec.structs.replace(FLEET, stop_for="t")
    stop = msgspec.structs.replace(record(), command="STOP", wanted="STOPPED")
    assert not judge(stop, stopping, [STANDING], now_s=100)[0].done
    late, _ = judge(stop, stopping, [STANDING], now_s=150)
    assert (late.done, late.ok) == (True, False)
