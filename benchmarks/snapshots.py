"""The snapshot store against a straightforward one of the same format: a lock around each write, and an erase that waits for it.

    python benchmarks/snapshots.py [--quick] [--only erase|save|disk] [--directory DIR]

erase   time of `erase` while the writer is stalled for seconds: by a folder whose writes wait, and in the kernel, in a FIFO
save    time of `save` beyond one copy of the same bytes into memory that is there already, 1 to 64 MiB
disk    bytes a second to disk, against fio's sequential direct writes of the same size with an fsync each
The sides take turns within each round. One point is one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from interlock.core.snapshot_book import Amount
from interlock.host.trees import RealFolder, RealThreadHost, RealTree, page_memory
from interlock.snapshots import format as file_format
from interlock.snapshots.store import SnapshotStore
from interlock.snapshots.tensors import Staging, describe

MIB = 1 << 20
ROOM = Amount(100_000, 4 << 30, 64 << 30)


class LockAndWait:
    """What one writes first: a queue, a writer that holds a lock while it writes, an erase that takes it and removes by name."""

    def __init__(self, root: Path, write: Callable[[Path, memoryview], None]) -> None:
        self._root, self._write = root, write
        self._busy = threading.Lock()
        self._queue: queue.Queue[Any] = queue.Queue(128)
        self._erased: set[str] = set()
        threading.Thread(target=self._run, daemon=True).start()

    def save(self, request: str, position: int, tensors: dict[str, Any]) -> None:
        layout = file_format.lay_out({name: describe(value) for name, value in tensors.items()})
        memory = page_memory(layout.total_bytes)[: layout.total_bytes]
        staging = Staging()
        for entry in layout.entries:
            if entry.name in tensors:
                staging.copy(tensors[entry.name], memory[layout.header_bytes :][entry.start : entry.stop])
        self._queue.put((request, position, layout, memory))

    def _run(self) -> None:
        while True:
            request, position, layout, memory = self._queue.get()
            with self._busy:
                if request not in self._erased:
                    (self._root / request).mkdir(exist_ok=True)
                    file_format.seal(layout, memory)
                    self._write(self._root / request / f"{position}.safetensors", memory)
            self._queue.task_done()

    def erase(self, request: str) -> None:
        self._erased.add(request)
        with self._busy:
            shutil.rmtree(self._root / request, ignore_errors=True)
            self._erased.discard(request)

    def flush(self) -> None:
        self._queue.join()


def plain_write(path: Path, data: memoryview) -> None:
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path.with_suffix(".tmp"), path)


class Stall:
    """Holds one write up, by `wait`, until `end`."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.fifo = kind, folder / "fifo"
        self.began, self.over = threading.Event(), threading.Event()
        self.is_on = False
        if kind == "fifo":
            os.mkfifo(self.fifo)

    def wait(self) -> None:
        if not self.is_on:
            return
        self.began.set()
        if self.kind == "fifo":
            os.close(os.open(self.fifo, os.O_RDONLY))
        else:
            self.over.wait(120)

    def end(self) -> None:
        self.is_on = False
        if self.kind == "fifo":
            os.close(os.open(self.fifo, os.O_WRONLY))
        self.over.set()


def stalling_host(stall: Stall) -> RealThreadHost:
    class Folder(RealFolder):
        def write(self, name: str, data: memoryview) -> None:
            stall.wait()
            super().write(name, data)

    class Tree(RealTree):
        def open_folder(self, name: str) -> RealFolder:
            made = super().open_folder(name)
            made.__class__ = Folder
            return made

    class Host(RealThreadHost):
        def open_tree(self, path: Path, owner: str) -> RealTree:
            return Tree(path, owner)

    return Host()


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50_ms": round(1e3 * ordered[len(ordered) // 2], 4),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 4),
        "max_ms": round(1e3 * ordered[-1], 4),
    }


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def bench_erase(folder: Path, kind: str, stall_s: float, count: int) -> None:
    root = folder / f"erase-{kind}"
    root.mkdir()
    stall = Stall(kind, root)
    store = SnapshotStore(
        root / "ours", owner="benchmark", host=stalling_host(stall), budget=ROOM, write_seconds_max=60
    )
    state = {"x": np.zeros(16384, np.uint8)}
    for n in range(count):
        store.save(f"r{n}", 1, state)
    store.flush()
    stall.is_on = True
    began = time.perf_counter()
    store.save("stalled", 1, state)
    stall.began.wait(10)
    taken = [timed(lambda: store.erase("stalled"))]
    for n in range(count):  # spread over the whole stall
        taken.append(timed(lambda n=n: store.erase(f"r{n}")))
        time.sleep(max(0.0, began + stall_s * n / count - time.perf_counter()))
    stalled_for = time.perf_counter() - began
    stall.end()
    store.close(erase=True)
    left = [str(p) for name in ("live", "trash") for p in (root / "ours" / name).rglob("*") if p.is_file()]
    say(
        point=f"erase, {kind}",
        side="ours",
        stalled_s=round(stalled_for, 2),
        files_left=len(left),
        **spread(taken),
    )
    naive_stall = Stall(f"{kind}2" if kind != "fifo" else "fifo", _made(root / "naive-fifo"))

    def write(path: Path, data: memoryview) -> None:
        naive_stall.wait()
        plain_write(path, data)

    naive = LockAndWait(_made(root / "naive"), write)
    naive_stall.is_on = True
    naive.save("stalled", 1, state)
    naive_stall.began.wait(10)
    threading.Timer(stall_s, naive_stall.end).start()
    say(point=f"erase, {kind}", side="lock and wait", **spread([timed(lambda: naive.erase("other"))]))


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def bench_save(folder: Path, mib: int, count: int) -> None:
    state = {"x": np.random.default_rng(0).integers(0, 255, mib * MIB, np.uint8)}
    into = page_memory(mib * MIB)
    store = SnapshotStore(folder / f"save-{mib}", owner="benchmark", budget=ROOM)
    naive = LockAndWait(_made(folder / f"naive-{mib}"), plain_write)
    copies, ours, theirs = [], [], []
    target = np.frombuffer(into, np.uint8)
    for n in range(count):
        copies.append(timed(lambda: np.copyto(target, state["x"])))
        store.save(f"warm{n}", 1, state) if n == 0 else None
        store.flush()
        ours.append(timed(lambda n=n: store.save(f"r{n}", 1, state)))
        store.flush()
        store.erase(f"r{n}")
        theirs.append(timed(lambda n=n: naive.save(f"r{n}", 1, state)))
        naive.flush()
        naive.erase(f"r{n}")
    store.close(erase=True, timeout_s=60)
    copy = statistics.median(copies)
    say(point=f"save, {mib} MiB", side="one copy", **spread(copies))
    for side, values in (("ours", ours), ("lock and wait", theirs)):
        beyond = spread([value - copy for value in values])
        say(point=f"save, {mib} MiB", side=side, beyond_copy_p99_ms=beyond["p99_ms"], beyond_copy_p50_ms=beyond["p50_ms"],
            **spread(values))  # fmt: skip


def bench_disk(folder: Path, mib: int, count: int, rounds: int) -> None:
    state = {"x": np.random.default_rng(0).integers(0, 255, mib * MIB - 8192, np.uint8)}
    rates: dict[str, list[float]] = {"ours": [], "fio": []}
    for turn in range(rounds):
        store = SnapshotStore(folder / f"disk-{turn}", owner="benchmark", budget=ROOM)
        warm = [store.save(f"warm{n}", 1, state) for n in range(3)]
        assert all(each.accepted for each in warm)
        store.flush()
        began = time.perf_counter()
        for n in range(count):
            assert store.save(f"r{n % 4}", n, state).accepted
        store.flush(timeout_s=300)
        rates["ours"].append(count * mib / (time.perf_counter() - began))
        store.close(erase=True, timeout_s=60)
        if (rate := fio(folder / f"fio-{turn}", mib, count)) is not None:
            rates["fio"].append(rate)
    if not rates["fio"]:
        say(point=f"disk, {mib} MiB", side="fio", skipped="fio is not installed")
    for side, values in rates.items():
        if values:
            say(
                point=f"disk, {mib} MiB",
                side=side,
                mib_per_s=round(statistics.median(values)),
                rounds=len(values),
            )
    if rates["fio"]:
        share = statistics.median(a / b for a, b in zip(rates["ours"], rates["fio"], strict=True))
        say(point=f"disk, {mib} MiB", side="ours / fio", share=round(share, 3))


def fio(where: Path, mib: int, count: int) -> float | None:
    """MiB a second of one job: as many files of the same size, direct, 4 MiB a call, an fsync at each file's end."""
    if shutil.which("fio") is None:
        return None
    where.mkdir()
    out = subprocess.run(
        ["fio", "--name=w", f"--directory={where}", "--rw=write", "--bs=4M", f"--filesize={mib}M", f"--nrfiles={count}",
         f"--size={mib * count}M", "--direct=1", "--end_fsync=1", "--fsync_on_close=1", "--file_service_type=sequential",
         "--openfiles=1", "--create_on_open=1", "--ioengine=psync", "--output-format=json"],
        capture_output=True, timeout=600, check=True,
    ).stdout  # fmt: skip
    shutil.rmtree(where)
    return float(json.loads(out[out.index(b"{") :])["jobs"][0]["write"]["bw"]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument(
        "--directory", type=Path, help="on the disk to be measured (default: a temporary one)"
    )
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="snapshots-", dir=given.directory))
    quick = given.quick
    try:
        if given.only in ("", "erase"):
            for kind in ("fault", "fifo"):
                bench_erase(folder, kind, 2.0 if quick else 10.0, 200 if quick else 1000)
        if given.only in ("", "save"):
            for mib in (1, 8, 32, 64):
                bench_save(folder, mib, 20 if quick else 100)
        if given.only in ("", "disk"):
            bench_disk(folder, 32, 16 if quick else 48, 2 if quick else 5)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
