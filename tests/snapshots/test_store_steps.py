"""The store under explicit schedules: each way around the rename that hazards.md names (x1a to x1k), and what oMLX's tests pin.

`Steps` runs one thread at a time; a test says before which file call each of them stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interlock.core.snapshot_book import BUDGET, Amount
from interlock.core.snapshot_state import scope_name
from interlock.snapshots.desk import Notice, SnapshotBusy, SnapshotError
from interlock.snapshots.format import Raw, Snapshot
from interlock.snapshots.store import SnapshotStore
from interlock.testing.sim.folders import SimStorage
from interlock.testing.sim.snapshot_world import run_seed
from interlock.testing.sim.steps import StepHost, Steps, Task

SEEDS_SHORT = 60


class Rig:
    """A store on a simulated disk whose threads run when the test says so."""

    def __init__(self, budget: Amount = BUDGET) -> None:
        self.steps, self.storage = Steps(), SimStorage()
        self.notices: list[Notice] = []
        self.store: SnapshotStore = self.steps.call(
            lambda: SnapshotStore(
                Path("simulated"),
                owner="test",
                on_notice=self.notices.append,
                budget=budget,
                write_seconds_max=2.0,
                host=StepHost(self.steps, self.storage),
            )
        )

    @property
    def writer(self) -> Task:
        return self.steps.find("snapshot-writer")

    def save(self, request: str = "r", position: int = 8, content: bytes = b"one") -> bool:
        value = Raw("U8", (len(content),), memoryview(content))
        accepted: bool = self.steps.call(lambda: self.store.save(request, position, {"x": value})).accepted
        return accepted

    def load(self, request: str = "r", position: int = 8) -> bytes | None:
        found: Snapshot | None = self.steps.call(lambda: self.store.load(request, position))
        return None if found is None else bytes(found.tensors["x"].data)

    def erase(self, request: str = "r") -> None:
        self.steps.call(lambda: self.store.erase(request))

    def live(self, request: str = "r") -> list[str]:
        return [path for path in self.storage.files("live") if scope_name(request) in path]

    def rest(self) -> None:
        """Everybody runs until nothing is left to do; then what must hold at rest is checked."""
        self.steps.settle()
        self.steps.call(self.store.check_integrity)

    def end(self) -> None:
        """A close that erases leaves no file and gives all room back."""
        self.storage.full, self.storage.failing = False, 0.0
        task = self.steps.spawn("close", lambda: self.store.close(erase=True, timeout_s=100))
        self.steps.settle(task)
        assert task.error is None, task.error
        assert self.storage.files("live") == []
        assert self.storage.files("trash") == []
        assert self.store.stats().used == Amount()


WRITE_CALLS = ["open 8.0.tmp", "write 8.0.tmp", "fsync 8.0.tmp", "rename 8.0", "fsync folder"]


@pytest.mark.parametrize("at", WRITE_CALLS)
def test_an_erase_at_each_step_of_a_write_ends_it_in_the_trash(at: str) -> None:
    """x1a, and with the reaper before the writer x1b: nothing is live, nothing readable, nothing reported durable."""
    for reap_first in (False, True):
        rig = Rig()
        assert rig.save()
        rig.steps.until(rig.writer, at)
        rig.erase()
        assert rig.live() == []
        assert rig.load() is None
        if reap_first:
            reaper = rig.steps.find("snapshot-reaper")
            while rig.steps.can_run(reaper):
                rig.steps.step(reaper)
        rig.rest()
        assert rig.live() == []
        assert rig.notices == []
        rig.end()


@pytest.mark.parametrize("at", WRITE_CALLS)
def test_a_reused_id_never_reads_the_old_life_and_the_old_writer_cannot_touch_the_new(at: str) -> None:
    """x1f, and the id reuse (ABA) of #1423: the old writer goes on only after the new life has saved at the same position."""
    rig = Rig()
    assert rig.save(content=b"old")
    old = rig.writer
    rig.steps.until(old, at)
    rig.erase()
    assert rig.save(content=b"new")
    assert rig.load() == b"new"
    rig.rest()
    assert rig.load() == b"new"
    assert len(rig.live()) == 1
    assert [(n.kind, n.position) for n in rig.notices] == [("durable", 8)]
    rig.end()


def test_a_save_stopped_before_its_mkdir_holds_the_erase_and_leaves_nothing(  # x1e
) -> None:
    rig = Rig()
    value = {"x": Raw("U8", (1,), memoryview(b"x"))}
    save = rig.steps.spawn("save", lambda: rig.store.save("r", 8, value))
    rig.steps.until(save, "mkdir live")
    erase = rig.steps.spawn("erase", lambda: rig.store.erase("r"))
    rig.steps.until(erase, "wait")
    assert not rig.steps.can_run(erase), "an erase passed a save that is making its directory"
    rig.steps.finish(save)
    rig.steps.finish(erase)
    assert rig.live() == []
    rig.rest()
    assert rig.live() == []
    assert rig.load() is None
    rig.end()


def test_a_save_that_hangs_in_mkdir_makes_erase_an_error_in_time_and_not_a_lie() -> None:
    rig = Rig()
    value = {"x": Raw("U8", (1,), memoryview(b"x"))}
    save = rig.steps.spawn("save", lambda: rig.store.save("r", 8, value))
    rig.steps.until(save, "mkdir live")
    erase = rig.steps.spawn("erase", lambda: rig.store.erase("r"))
    rig.steps.until(erase, "wait")
    while not rig.steps.can_run(erase):
        rig.steps.pass_time()
    with pytest.raises(SnapshotBusy, match="request r are held"):
        rig.steps.finish(erase)
    assert rig.save("other"), "others are not held up"
    rig.steps.finish(save)
    rig.end()


def test_the_reaper_comes_again_when_a_writer_put_something_in_while_it_listed() -> None:
    """x1d: rmdir finds the directory not empty."""
    rig = Rig()
    assert rig.save()
    rig.steps.until(rig.writer, "open 8.0.tmp")
    rig.erase()
    reaper = rig.steps.find("snapshot-reaper")
    rig.steps.until(reaper, "rmdir")
    rig.steps.until(rig.writer, "write")
    rig.rest()
    for _ in range(20):
        rig.steps.pass_time()
        rig.rest()
    assert rig.storage.files("trash") == []
    assert rig.store.stats().used == Amount()
    rig.end()


def test_a_descriptor_is_not_closed_under_its_writer() -> None:
    """x1g: were it closed by erase, its number would be the next directory's. The simulated folder answers EBADF then."""
    rig = Rig()
    assert rig.save()
    rig.steps.until(rig.writer, "rename 8.0")
    before = dict(rig.store._desk.handles)
    rig.erase()
    assert all(folder._is_open for folder in before.values())  # type: ignore[attr-defined]
    assert rig.save("other")
    rig.rest()
    assert not any(folder._is_open for folder in before.values())  # type: ignore[attr-defined]
    assert [n.request for n in rig.notices] == ["other"]
    rig.end()


@pytest.mark.parametrize("at", ["open for reading", "read"])
def test_a_load_that_an_erase_overtakes_hands_out_nothing(at: str) -> None:
    """x1h: the reader holds the descriptor over erase and reaper."""
    rig = Rig()
    assert rig.save()
    rig.rest()
    load = rig.steps.spawn("load", lambda: rig.store.load("r", 8))
    rig.steps.until(load, at)
    rig.erase()
    assert rig.steps.finish(load) is None
    rig.end()


def test_a_staged_load_that_an_erase_overtakes_hands_out_nothing() -> None:
    rig = Rig()
    assert rig.save()
    load = rig.steps.spawn("load", lambda: rig.store.load("r", 8))
    rig.steps.step(load)
    while "mutex" in load.at and rig.store._desk.book.get(scope_name("r")).loads == ():  # type: ignore[union-attr]
        rig.steps.step(load)
    while load.at == "mutex" and rig.store._desk._held:
        rig.steps.step(load)
    rig.erase()
    assert rig.steps.finish(load) is None
    rig.end()


def test_an_erased_state_is_never_promoted() -> None:
    """x1i: the promotion waits for its rename under the scope's lock, so an erase comes before it or after it."""
    name = "ab" * 16
    rig = Rig()
    assert rig.save()
    rig.rest()
    promote = rig.steps.spawn("promote", lambda: rig.store.promote("r", 8, name))
    rig.steps.until(promote, "move")
    erase = rig.steps.spawn("erase", lambda: rig.store.erase("r"))
    rig.steps.until(erase, "wait")
    assert not rig.steps.can_run(erase)
    assert rig.steps.finish(promote) is True
    rig.steps.finish(erase)
    assert rig.storage.files("kept") == [f"kept/{name}"]
    assert rig.save(content=b"two")
    rig.rest()
    rig.erase()
    assert rig.steps.call(lambda: rig.store.promote("r", 8, "cd" * 16)) is False
    assert rig.storage.files("kept") == [f"kept/{name}"]
    rig.end()


def test_erase_all_is_one_rename_and_a_save_meanwhile_is_erased_or_stays_whole() -> None:
    """x1j and x1k: a save stopped at its mkdir when the root changes, one that comes after, and a writer at work."""
    for at in ("mkdir live/1", "rename live/0"):
        rig = Rig()
        assert rig.save("a")
        assert rig.save("b", content=b"bee")
        rig.steps.until(rig.writer, "rename 8.0")
        everything = rig.steps.spawn("erase all", rig.store.erase_all)
        rig.steps.until(everything, at)
        assert rig.save("c", content=b"two")
        rig.steps.finish(everything)
        assert rig.load("a") is None
        assert rig.load("b") is None
        assert rig.live("a") == rig.live("b") == []
        rig.rest()
        # Before the switch it went with the rest, after it it stays: never accepted and lost.
        assert rig.load("c") == (None if at.startswith("mkdir") else b"two")
        rig.end()


@pytest.mark.parametrize("stand", WRITE_CALLS)
def test_a_full_disk_or_a_broken_one_is_told_and_leaves_nothing(stand: str) -> None:
    for fault in ("full", "failing"):
        rig = Rig()
        assert rig.save()
        rig.steps.until(rig.writer, stand)
        setattr(rig.storage, fault, True if fault == "full" else 1.0)
        if fault == "full" and stand not in ("open 8.0.tmp", "write 8.0.tmp"):
            continue
        rig.steps.step(rig.writer)
        rig.steps.until(rig.writer, "mutex")
        setattr(rig.storage, fault, False if fault == "full" else 0.0)
        rig.rest()
        assert [n.kind for n in rig.notices] == ["failed"]
        assert rig.load() is None
        assert rig.save(content=b"again"), "the position may be saved again"
        rig.rest()
        assert rig.load() == b"again"
        rig.end()


def test_a_writer_that_dies_is_told_and_replaced_and_the_rest_is_written() -> None:
    rig = Rig()
    assert rig.save("a")
    assert rig.save("b")
    first = rig.writer
    rig.steps.until(first, "write")
    folder = rig.store._desk.handles

    def die(*_: Any) -> None:
        raise SystemExit("the writer's thread ends here")

    for each in folder.values():
        each._before = die  # type: ignore[attr-defined]
    while not first.is_done:
        rig.steps.step(first)
    for each in folder.values():
        del each._before  # type: ignore[attr-defined]
    assert [(n.kind, n.request) for n in rig.notices] == [("failed", "a")]
    rig.rest()
    rig.steps.pass_time()
    rig.rest()
    assert [(n.kind, n.request) for n in rig.notices] == [("failed", "a"), ("durable", "b")]
    assert rig.load("b") == b"one"
    first.error = None
    rig.end()


def test_a_writer_that_hangs_is_told_at_its_deadline_and_what_it_writes_later_is_not_served() -> None:
    rig = Rig()
    assert rig.save("a")
    assert rig.save("b")
    hung = rig.writer
    rig.steps.until(hung, "fsync")
    others = [t for t in rig.steps.tasks if t is not hung]

    def others_run() -> None:
        for _ in range(400):
            able = [t for t in rig.steps.tasks if t is not hung and rig.steps.can_run(t)]
            if not able:
                rig.steps.pass_time()
                if rig.steps.now_s > 5:
                    return
            for task in able[:1]:
                rig.steps.step(task)

    others_run()
    assert others
    told = {(n.request, n.kind) for n in rig.notices}
    assert ("a", "failed") in told
    assert rig.store.stats().hung_writers == 1
    assert rig.store.stats().replaced_writers == 1
    assert rig.load("a") is None
    charged = rig.store.stats().used.memory_bytes
    assert charged > 0, "a writer that hangs may still read its memory"
    rig.rest()
    assert rig.load("a") is None
    assert rig.store.stats().used.memory_bytes == 0
    rig.end()


def test_saves_after_close_are_refused_and_close_reports_what_was_not_written() -> None:
    rig = Rig()
    assert rig.save("a")
    rig.steps.until(rig.writer, "fsync")
    close = rig.steps.spawn("close", lambda: rig.store.close(erase=False, timeout_s=1.0))
    stuck = rig.writer
    for _ in range(2000):
        able = [t for t in rig.steps.tasks if t is not stuck and rig.steps.can_run(t)]
        if close.is_done:
            break
        rig.steps.step(able[0]) if able else rig.steps.pass_time()
    assert close.is_done
    assert [(n.request, n.position) for n in close.result] == [("a", 8)]
    assert not rig.save("b")


def test_close_with_erase_erases_before_it_stops_and_in_this_order() -> None:
    """The contract of #1423's `shutdown(cleanup=True)`: refuse saves, erase, then stop."""
    rig = Rig()
    assert rig.save()
    rig.steps.until(rig.writer, "write")
    close = rig.steps.spawn("close", lambda: rig.store.close(erase=True, timeout_s=100))
    rig.steps.until(close, "rename live/0")
    assert not rig.save("late")
    assert not rig.writer.is_done
    rig.steps.settle(close)
    assert close.result == []
    assert rig.storage.files("live") == rig.storage.files("trash") == []


def test_a_rename_that_fails_makes_nothing_readable_and_is_an_error_to_repeat() -> None:
    rig = Rig()
    assert rig.save()
    rig.rest()
    rig.storage.failing = 1.0
    with pytest.raises(SnapshotError, match="erase it again"):
        rig.erase()
    assert rig.load() is None
    rig.storage.failing = 0.0
    rig.erase()
    assert rig.live() == []
    rig.end()


def test_two_saves_at_one_position_are_kept_once() -> None:
    rig = Rig()
    assert rig.save(content=b"one")
    before = rig.store.stats().used
    assert rig.save(content=b"one")
    assert rig.store.stats().used == before
    rig.rest()
    assert rig.save(content=b"one")
    assert rig.store.stats().used.items == 1
    rig.end()


def test_an_owner_whose_notices_fail_loses_no_writer() -> None:
    rig = Rig()

    def broken(notice: Notice) -> None:
        raise RuntimeError("the owner's defect")

    rig.store._desk._deliver = broken
    for position in range(4):
        assert rig.save(position=position)
    rig.rest()
    assert rig.store._desk.failed_deliveries == 4
    assert rig.store.boundaries("r") == [0, 1, 2, 3]
    rig.end()


def test_many_erases_and_saves_of_one_id_leave_one_life() -> None:
    """oMLX's counters: two clean-ups that timed out discarded the next saves under that id."""
    rig = Rig()
    for turn in range(12):
        assert rig.save(content=b"%d" % turn)
        if turn % 3:
            rig.steps.until(rig.writer, "open")
            rig.steps.step(rig.writer)
        if turn < 11:
            rig.erase()
            rig.erase()
    assert rig.load() == b"11"
    rig.rest()
    assert rig.load() == b"11"
    assert len(rig.live()) == 1
    rig.end()


@pytest.mark.parametrize("seed", range(SEEDS_SHORT))
def test_seeded_lives_hold_what_the_store_promises(seed: int) -> None:
    run_seed(seed)


def test_the_simulated_world_finds_a_store_that_serves_erased_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world's checks can fail: an erase that only pretends."""
    monkeypatch.setattr(SnapshotStore, "erase", lambda self, request: None)
    with pytest.raises(AssertionError):
        for seed in range(200):
            run_seed(seed)


def test_the_simulated_world_finds_a_writer_that_does_not_sync_its_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from interlock.snapshots.writers import Writers

    monkeypatch.setattr(Writers, "_sync_name", lambda self, directory: None)
    with pytest.raises(AssertionError, match="was durable and is gone"):
        for seed in range(3000):
            run_seed(seed)
