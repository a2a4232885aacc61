"""The ring outlives its process; what is lost of it is seen by its name and its numbers."""

from __future__ import annotations

from pathlib import Path

from interlock.host.files import RealFiles
from interlock.host.real import RealClock
from interlock.telemetry.events import EventLog
from interlock.telemetry.kept import FILE, open_event_log


def begin(folder: Path, kept_max: int = 8) -> EventLog:
    return open_event_log(RealFiles(), RealClock(), folder, kept_max)


def test_numbers_go_on_in_the_next_life_and_nothing_that_is_kept_is_lost(tmp_path: Path) -> None:
    first = begin(tmp_path)
    for n in range(3):
        first.emit("step", at=n)
    second = begin(tmp_path)
    assert second.ring == first.ring
    assert [event.fields["at"] for event in second.since(0)] == [0, 1, 2]
    assert second.emit("step", at=3).number == 4
    assert [event.number for event in begin(tmp_path).since(0)] == [1, 2, 3, 4]


def test_files_stay_bounded_and_the_newest_are_kept_over_a_rotation(tmp_path: Path) -> None:
    log = begin(tmp_path, kept_max=4)
    for n in range(1, 31):
        log.emit("step", at=n)
    again = begin(tmp_path, kept_max=4)
    assert [event.number for event in again.since(0)] == [27, 28, 29, 30]
    assert again.missed(20) == 6
    lines = [len(path.read_bytes().splitlines()) for path in tmp_path.iterdir()]
    assert max(lines) <= 5, "a header and four events"


def test_half_a_line_of_a_killed_process_costs_that_event_alone(tmp_path: Path) -> None:
    log = begin(tmp_path)
    log.emit("one")
    log.emit("two")
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-9])
    again = begin(tmp_path)
    assert [event.name for event in again.since(0)] == ["one"]
    again.emit("three")
    assert [event.name for event in begin(tmp_path).since(0)] == ["one", "three"]


def test_a_file_that_is_none_of_ours_begins_another_ring(tmp_path: Path) -> None:
    ring = begin(tmp_path).ring
    (tmp_path / FILE).write_bytes(b"\xff\xfe no ring\n")
    again = begin(tmp_path)
    assert again.ring != ring
    assert again.since(0) == []


def test_without_a_file_events_are_kept_in_memory(tmp_path: Path) -> None:
    log = begin(tmp_path / "no such folder")
    log.emit("one")
    assert [event.name for event in log.since(0)] == ["one"]


async def test_a_waiter_is_woken_by_the_next_event_and_not_before() -> None:
    import asyncio

    log = EventLog(RealClock())
    waiting = asyncio.create_task(log.wait(0, 30.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    log.emit("one")
    await asyncio.wait_for(waiting, 5.0)
    await log.wait(0, 30.0)  # it is there already
    await log.wait(1, 0.01)  # and then the time is over
