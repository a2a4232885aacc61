"""The store on this machine's file system: round trips, real crashes, FIFOs, descriptors, room."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interlock.core.limits import SNAPSHOT_HUNG_WRITERS_MAX
from interlock.core.snapshot_book import Amount
from interlock.core.snapshot_state import scope_name
from interlock.host.disk import DirectoryBusy
from interlock.host.trees import Folder, RealFolder, RealThreadHost, RealTree
from interlock.snapshots.desk import Notice, SnapshotError
from interlock.snapshots.format import Snapshot
from interlock.snapshots.store import SnapshotStore
from interlock.snapshots.tensors import to_numpy, to_torch

SECONDS = 20.0


def state(seed: int, count: int = 1000) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    return {
        "a": numbers.standard_normal(count).astype(np.float32),
        "b": np.arange(7, dtype=np.int8) + seed % 50,
    }


def equal(snapshot: Snapshot | None, expected: dict[str, np.ndarray]) -> bool:
    assert snapshot is not None
    found = to_numpy(snapshot.tensors)
    return set(found) == set(expected) and all(np.array_equal(found[n], expected[n]) for n in expected)


def files_below(path: Path) -> list[str]:
    return [
        str(p.relative_to(path))
        for p in path.rglob("*")
        if p.is_file() and p.name not in ("owner", "incarnation")
    ]


@pytest.fixture
def notices() -> list[Notice]:
    return []


@pytest.fixture
def store(tmp_path: Path, notices: list[Notice]) -> Iterator[SnapshotStore]:
    made = SnapshotStore(tmp_path / "s", owner="test", on_notice=notices.append)
    yield made
    made.close(erase=True)


def test_what_was_saved_is_loaded_before_and_after_it_is_durable(
    store: SnapshotStore, notices: list[Notice]
) -> None:
    for position in (1024, 2048, 4096):
        assert store.save("r/../1", position, state(position), {"n": position}).accepted
        assert equal(store.load("r/../1", position), state(position))
    assert store.flush(timeout_s=SECONDS)
    assert store.boundaries("r/../1") == [1024, 2048, 4096]
    for position in (1024, 2048, 4096):
        found = store.load("r/../1", position)
        assert equal(found, state(position))
        assert found is not None
        assert found.structure == {"n": position}
    assert [(n.kind, n.request, n.position) for n in notices] == [
        ("durable", "r/../1", p) for p in (1024, 2048, 4096)
    ]
    assert store.load("r/../1", 512) is None
    assert not store.has("other", 1024)
    store.check_integrity()


def test_an_erased_request_leaves_no_file_and_the_other_stays(store: SnapshotStore, tmp_path: Path) -> None:
    store.save("one", 1, state(1))
    store.save("two", 1, state(2))
    store.flush(timeout_s=SECONDS)
    store.erase("one")
    live = [name for name in files_below(tmp_path / "s/live") if scope_name("one") in name]
    assert not live
    assert store.load("one", 1) is None
    assert equal(store.load("two", 1), state(2))


def test_close_with_erase_leaves_no_file_and_gives_all_room_back(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "s", owner="test")
    for request in range(20):
        store.save(f"r{request}", 1, state(request, 50_000))
        if request % 3 == 0:
            store.erase(f"r{request}")
    assert store.close(erase=True, timeout_s=SECONDS) == []
    assert files_below(tmp_path / "s") == []
    assert store.stats().used == Amount()
    assert not store.save("late", 1, state(1)).accepted
    store.check_integrity()


@pytest.mark.parametrize(
    "kind", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "int64", "bool", "uint8", "float64"]
)
def test_every_dtype_comes_back_bit_for_bit_and_the_official_library_reads_it(
    store: SnapshotStore, tmp_path: Path, kind: str
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    values = torch.randn(3, 5).mul(50).to(getattr(torch, kind))
    told = {"x": values, "strided": values.t(), "zero": values[:0], "scalar": values[0, 0]}
    assert store.save("r", 8, told).accepted
    staged = to_torch(store.load("r", 8).tensors)  # type: ignore[union-attr]
    store.flush(timeout_s=SECONDS)
    loaded = to_torch(store.load("r", 8).tensors)  # type: ignore[union-attr]
    (path,) = (tmp_path / "s/live").rglob("8.0")
    with safe_open(path, framework="pt") as file:
        for name, value in told.items():
            raw = file.get_tensor(name)
            for found in (staged[name], loaded[name], raw):
                assert found.dtype == value.dtype
                assert found.shape == value.shape
                assert bytes(
                    found.contiguous().view(-1).view(torch.uint8).numpy() if found.numel() else b""
                ) == bytes(value.contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b"")


def test_a_flipped_bit_is_a_miss_that_names_file_and_tensor(
    store: SnapshotStore, tmp_path: Path, notices: list[Notice]
) -> None:
    store.save("r", 8, state(1))
    store.flush(timeout_s=SECONDS)
    (path,) = (tmp_path / "s/live").rglob("8.0")
    data = bytearray(path.read_bytes())
    data[4096 + 17] ^= 1  # in the first tensor
    path.write_bytes(data)
    assert store.load("r", 8) is None
    assert notices[-1].kind == "damaged"
    assert "tensor a of snapshot" in notices[-1].reason
    assert path.name in notices[-1].reason
    assert store.load("r", 8) is None
    assert not store.has("r", 8)


@pytest.mark.parametrize("size", [0, 7, 100, 4096, 5000])
def test_a_truncated_file_is_a_miss(
    store: SnapshotStore, tmp_path: Path, size: int, notices: list[Notice]
) -> None:
    store.save("r", 8, state(1))
    store.flush(timeout_s=SECONDS)
    (path,) = (tmp_path / "s/live").rglob("8.0")
    os.truncate(path, size)
    assert store.load("r", 8) is None
    assert notices[-1].kind == "damaged"


def test_a_file_of_another_request_put_in_its_place_is_a_miss(store: SnapshotStore, tmp_path: Path) -> None:
    store.save("r", 8, state(1))
    store.save("q", 8, state(2))
    store.flush(timeout_s=SECONDS)
    one, two = sorted((tmp_path / "s/live").rglob("8.0"))
    one.write_bytes(two.read_bytes())
    found = [store.load("r", 8), store.load("q", 8)]
    assert sum(each is None for each in found) == 1


def test_a_full_budget_refuses_at_once_and_takes_again_when_erased(tmp_path: Path) -> None:
    with_room = Amount(10, 200_000, 200_000)
    store = SnapshotStore(tmp_path / "s", owner="test", budget=with_room)
    accepted = [store.save("r", n, state(n, 10_000)).accepted for n in range(8)]
    assert accepted == [True] * 4 + [False] * 4
    store.flush(timeout_s=SECONDS)
    assert not store.save("r", 9, state(9, 10_000)).accepted, "what is on disk counts"
    store.erase("r")
    deadline = threading.Event()
    while store.stats().used != Amount() and not deadline.wait(0.01):
        pass  # the reaper gives the room back
    assert store.save("r", 10, state(10, 10_000)).accepted
    store.check_integrity()
    store.close(erase=True)


def test_a_promoted_snapshot_outlives_its_request_and_a_restart(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "s", owner="test")
    store.save("r", 8, state(3))
    assert not store.promote("r", 9, "ab" * 16)
    store.flush(timeout_s=SECONDS)
    assert store.promote("r", 8, "ab" * 16)
    store.erase("r")
    assert equal(store.kept.load("ab" * 16), state(3))
    with pytest.raises(ValueError, match="no hash"):
        store.promote("r", 8, "../evil")
    store.close(erase=True)
    again = SnapshotStore(tmp_path / "s", owner="test")
    assert equal(again.kept.load("ab" * 16), state(3))
    again.close(erase=True)


def test_a_second_owner_is_refused_by_name_while_the_first_lives(
    store: SnapshotStore, tmp_path: Path
) -> None:
    with pytest.raises(DirectoryBusy, match="test"):
        SnapshotStore(tmp_path / "s", owner="second")


def test_the_next_life_takes_over_what_its_owner_names_and_sweeps_the_rest(tmp_path: Path) -> None:
    first = SnapshotStore(tmp_path / "s", owner="test")
    for request in ("wanted", "unwanted"):
        first.save(request, 8, state(len(request)))
    first.flush(timeout_s=SECONDS)
    claim = first.claim("wanted")
    assert claim is not None
    first.close(erase=False)
    second = SnapshotStore(tmp_path / "s", owner="test", claims=[claim])
    assert equal(second.load("wanted", 8), state(6))
    assert second.boundaries("unwanted") == []
    assert second.save("wanted", 16, state(16)).accepted
    assert second.close(erase=True) == []
    assert files_below(tmp_path / "s") == []


CRASH = """
import sys, numpy as np
from pathlib import Path
from interlock.snapshots.store import SnapshotStore
store = SnapshotStore(Path(sys.argv[1]), owner="crashed")
for n in range(10000):
    store.save(f"r{n % 7}", n, {"a": np.full(20000, n, np.int32)})
    if n % 5 == 4:
        store.erase(f"r{n % 7}")
    if n == 60:
        print("working", flush=True)
"""


@pytest.mark.parametrize("whole", [False, True], ids=["erase", "erase_all"])
def test_a_trash_that_somebody_removed_is_made_anew_and_all_room_comes_back(
    tmp_path: Path, whole: bool
) -> None:
    budget = Amount(items=2, memory_bytes=1 << 20, disk_bytes=1 << 20)
    store = SnapshotStore(tmp_path / "s", owner="test", budget=budget)
    for turn in range(3):
        for position in range(2):
            assert store.save(f"r{turn}", position, state(turn)).accepted, turn
        assert store.flush(timeout_s=SECONDS)
        shutil.rmtree(tmp_path / "s" / "trash")
        if whole:
            store.erase_all()
        else:
            store.erase(f"r{turn}")
        assert store.load(f"r{turn}", 0) is None
        room_comes_back(store)
    assert files_below(tmp_path / "s") == []
    store.check_integrity()
    store.close(erase=True)


@pytest.mark.parametrize("whole", [False, True], ids=["erase", "erase_all"])
@pytest.mark.parametrize("trash_too", [False, True], ids=["what was in it", "the trash"])
def test_what_somebody_else_removed_from_the_trash_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trash_too: bool, whole: bool
) -> None:
    store = SnapshotStore(tmp_path / "s", owner="test")
    monkeypatch.setattr(store._desk.tree, "empty", lambda _: False)  # it cannot be emptied by us
    assert store.save("r", 0, state(1)).accepted
    assert store.flush(timeout_s=SECONDS)
    if whole:
        store.erase_all()
    else:
        store.erase("r")
    assert store._desk.book.used.items == 1
    trash = tmp_path / "s" / "trash"
    for erased in [trash] if trash_too else list(trash.iterdir()):
        shutil.rmtree(erased)
    room_comes_back(store)
    store.check_integrity()
    store.close(erase=True)


def test_a_root_that_moves_while_the_reaper_looks_takes_room_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is renamed between the reaper's look at the live roots and its look at the trash."""
    store = SnapshotStore(tmp_path / "s", owner="test")
    tree, reaping = store._desk.tree, threading.current_thread()
    rename, folders = tree.rename, tree.folders
    about_to_move, looked, moved = threading.Event(), threading.Event(), threading.Event()

    def held(source: str, target: str) -> None:
        about_to_move.set()
        assert looked.wait(SECONDS)
        rename(source, target)
        moved.set()

    def interleaved(path: str) -> list[str]:
        names = list(folders(path))
        if threading.current_thread() is reaping and not looked.is_set():
            looked.set()
            assert moved.wait(SECONDS)
        return names

    assert store.save("r", 0, state(1)).accepted
    assert store.flush(timeout_s=SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(tree, "empty", lambda _: False)
        patch.setattr(tree, "rename", held)
        patch.setattr(tree, "folders", interleaved)
        erasing = threading.Thread(target=store.erase_all)
        erasing.start()
        assert about_to_move.wait(SECONDS)
        assert not store._reaper.empty_once()
        erasing.join(SECONDS)
        assert store._desk.book.used.items == 1
    store._desk.wake_reaper()
    room_comes_back(store)
    assert files_below(tmp_path / "s") == []
    store.close(erase=True)


def test_a_root_that_somebody_removed_is_told_by_every_call_and_wedges_none(
    tmp_path: Path, notices: list[Notice]
) -> None:
    store = SnapshotStore(tmp_path / "s", owner="test", on_notice=notices.append)
    assert store.save("r", 0, state(1)).accepted
    assert store.flush(timeout_s=SECONDS)
    shutil.rmtree(tmp_path / "s")
    refused = store.save("other", 0, state(1))
    assert not refused.accepted
    assert "could not be made" in refused.reason
    assert store.save("r", 1, state(1)).accepted, "its directory is open, and nobody can tell yet"
    assert store.flush(timeout_s=SECONDS)
    assert ("failed", "r", 1) in [(n.kind, n.request, n.position) for n in notices]
    assert store.load("r", 0) is None
    with pytest.raises(SnapshotError, match="No such file"):
        store.erase("r")
    with pytest.raises(SnapshotError, match="not all snapshots could be erased"):
        store.close(erase=True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("snapshot")]


def room_comes_back(store: SnapshotStore) -> None:
    deadline_s = time.monotonic() + SECONDS
    while store._desk.book.used != Amount():
        assert time.monotonic() < deadline_s, store._desk.book.used
        time.sleep(0.01)


def test_what_a_killed_owner_left_is_swept_by_the_next(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CRASH, str(tmp_path / "s")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"working\n"
    with pytest.raises(DirectoryBusy, match="crashed"):
        SnapshotStore(tmp_path / "s", owner="too early")
    child.send_signal(signal.SIGKILL)
    child.wait(SECONDS)
    child.stdout.close()
    store = SnapshotStore(tmp_path / "s", owner="next")
    store.save("new", 1, state(1))
    store.flush(timeout_s=SECONDS)
    assert equal(store.load("new", 1), state(1))
    store.close(erase=True, timeout_s=SECONDS)
    assert files_below(tmp_path / "s") == []
    assert store.stats().used == Amount()


class StalledFolder(RealFolder):
    """Its writes wait in the kernel, in the opening of a FIFO, until somebody opens the other end."""

    fifo: Path
    began: threading.Semaphore

    def write(self, name: str, data: memoryview) -> None:
        self.began.release()
        os.close(os.open(self.fifo, os.O_RDONLY))
        super().write(name, data)


class StallingHost(RealThreadHost):
    def __init__(self, fifo: Path) -> None:
        os.mkfifo(fifo)
        self.fifo, self.began = fifo, threading.Semaphore(0)

    def let_go(self) -> None:
        """The next write (it is waited for) goes on."""
        assert self.began.acquire(timeout=SECONDS)
        os.close(os.open(self.fifo, os.O_WRONLY))

    def open_tree(self, path: Path, owner: str) -> RealTree:
        host = self

        class Tree(RealTree):
            def make_opened(self, name: str) -> Any:
                folder = super().make_opened(name)
                folder.__class__ = StalledFolder
                folder.fifo, folder.began = host.fifo, host.began  # type: ignore[attr-defined]
                return folder

        return Tree(path, owner)


def test_erase_returns_while_the_writer_hangs_in_the_kernel_and_the_write_goes_to_the_trash(
    tmp_path: Path,
) -> None:
    host = StallingHost(tmp_path / "fifo")
    store = SnapshotStore(tmp_path / "s", owner="test", host=host)
    store.save("r", 8, state(1))
    assert host.began.acquire(timeout=SECONDS)
    assert equal(store.load("r", 8), state(1))
    store.erase("r")
    assert store.load("r", 8) is None
    assert store.save("r", 8, state(2)).accepted, "the id is used again at once"
    host.began.release()
    host.let_go()
    host.let_go()
    assert store.flush(timeout_s=SECONDS)
    assert equal(store.load("r", 8), state(2))
    store.close(erase=True, timeout_s=SECONDS)
    assert files_below(tmp_path / "s") == []


def test_a_hung_writer_is_reported_and_replaced_and_keeps_its_memory_charged(tmp_path: Path) -> None:
    host = StallingHost(tmp_path / "fifo")
    told = threading.Event()
    notices: list[Notice] = []

    def note(notice: Notice) -> None:
        notices.append(notice)
        told.set()

    store = SnapshotStore(tmp_path / "s", owner="test", host=host, write_seconds_max=0.2, on_notice=note)
    store.save("r", 8, state(1))
    assert told.wait(SECONDS)
    assert [(n.kind, n.position) for n in notices] == [("failed", 8)]
    assert store.load("r", 8) is None, "what was reported failed is not served"
    assert store.stats().used.memory_bytes > 0
    waiting = threading.Event()
    while not store.stats().replaced_writers and not waiting.wait(0.01):
        pass
    assert 1 <= store.stats().hung_writers <= SNAPSHOT_HUNG_WRITERS_MAX
    host.let_go()
    while store.stats().used.memory_bytes and not waiting.wait(0.01):
        pass
    store.close(erase=True, timeout_s=SECONDS)
    assert files_below(tmp_path / "s") == []
    assert store.stats().used == Amount()


def test_descriptors_are_all_given_back(tmp_path: Path, descriptors: Callable[[], set[str]]) -> None:
    before = descriptors()
    store = SnapshotStore(tmp_path / "s", owner="test")
    for request in range(200):
        store.save(f"r{request}", 1, state(request))
    store.flush(timeout_s=SECONDS)
    store.erase_all()
    store.check_integrity()
    for request in range(50):
        store.save(f"r{request}", 1, state(request))
    store.close(erase=False, timeout_s=SECONDS)
    assert descriptors() == before


def test_a_folder_is_the_seam_that_the_store_writes_through(tmp_path: Path) -> None:
    tree = RealTree(tmp_path / "t", "test")
    folder: Folder = tree.make_opened("one")
    tree.rename("one", "two")
    folder.write("file", memoryview(b"x"))
    assert (tmp_path / "t/two/file").read_bytes() == b"x"
    assert tree.empty("two")
    with pytest.raises(FileNotFoundError):
        folder.write("late", memoryview(b"x"))
    folder.close()
    tree.close()
