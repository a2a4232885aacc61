"""The disk of `store.py`: packs written and read as the node does it, against fio with the same pattern.

Ours: files of 32 MiB written by two threads, each block checked against its checksum on the way, synced and renamed; read by
two threads in pieces of 8 MiB, each block checked. fio: as many jobs, the same sizes, O_DIRECT, one fsync a file. The page
cache is passed by on both sides.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from harness import NotRun, Options, Side, compare, line
from store_ours import fresh_keys, layout_of, seconds

from interlock.core.limits import (
    DISK_PACK_BYTES,
    DISK_READ_BYTES,
    DISK_READS_AT_ONCE_MAX,
    DISK_WRITES_AT_ONCE_MAX,
)
from interlock.host.real import RealHost
from interlock.store.checksums import Binding, block_checksums
from interlock.store.packs.files import PackFiles, SourceBlock
from interlock.store.packs.staging import Staging

BLOCK = 512 * 1024


class Packs:
    """The store's pack files in a directory, without a node around them."""

    def __init__(self, directory: Path, packs: int) -> None:
        self.host = RealHost()
        self.directory = self.host.open_directory(directory, "bench")
        self.files = PackFiles(self.directory, 1, Staging(8 * DISK_PACK_BYTES))
        self.files.open()
        self.layout, self.packs = layout_of(BLOCK), packs
        each = (DISK_PACK_BYTES - (1 << 20)) // BLOCK
        self.slab = np.random.default_rng(1).integers(0, 256, each * BLOCK, dtype=np.uint8)
        self.shared = self.host.create_memory("bench", each * BLOCK)
        self.shared.write_at(0, self.slab.data)
        self.sources = []
        for number, key in enumerate(fresh_keys(each)):
            binding = Binding(key, number * BLOCK // 4096, 1, 1)
            sums = block_checksums(
                binding, self.layout, self.slab[number * BLOCK : (number + 1) * BLOCK].data
            )
            self.sources.append(SourceBlock(binding, b"", tuple(sums)))
        self.bytes = packs * each * BLOCK
        self.numbers = count(1)
        self.there: list[int] = []
        self.memory = Staging(4 * DISK_READ_BYTES)

    def write(self) -> float:
        for number in self.there:
            self.files.delete(number)
        self.there = [next(self.numbers) for _ in range(self.packs)]
        with ThreadPoolExecutor(DISK_WRITES_AT_ONCE_MAX) as threads:
            return self.bytes / 1e9 / seconds(lambda: list(threads.map(self._write, self.there)))

    def _write(self, number: int) -> None:
        toc = self.files.write(number, self.layout, self.sources, self.shared)
        assert toc is not None
        assert len(toc.blocks) == len(self.sources)

    def read(self) -> float:
        with ThreadPoolExecutor(DISK_READS_AT_ONCE_MAX) as threads:
            return self.bytes / 1e9 / seconds(lambda: list(threads.map(self._read, self.there)))

    def _read(self, number: int) -> None:
        toc, _ = self.files.toc(number)
        step = max(1, DISK_READ_BYTES // toc.stride)
        for at in range(0, len(toc.blocks), step):
            some = toc.blocks[at : at + step]
            with self.memory.take(len(some) * toc.stride) as into:
                assert all(self.files.read(toc, some, into))

    def close(self) -> None:
        self.directory.close()
        self.shared.close()
        self.host.close()


class Fio:
    def __init__(self, directory: Path, files: int) -> None:
        self.directory, self.files = directory, files
        self.program = shutil.which("fio")

    def write(self) -> float:
        return self._run("write", DISK_WRITES_AT_ONCE_MAX, DISK_PACK_BYTES)

    def read(self) -> float:
        return self._run("read", DISK_READS_AT_ONCE_MAX, DISK_READ_BYTES)

    def _run(self, kind: str, jobs: int, piece: int) -> float:
        if self.program is None:
            raise NotRun("fio is not installed")
        command = [
            self.program, "--name=bench", f"--directory={self.directory}", f"--rw={kind}", f"--bs={piece}",
            f"--filesize={DISK_PACK_BYTES}", f"--nrfiles={self.files // jobs}", f"--numjobs={jobs}", "--direct=1",
            "--ioengine=psync", "--file_service_type=sequential", "--group_reporting", "--output-format=json",
            "--thread", "--overwrite=0", *(["--fsync_on_close=1", "--create_on_open=1", "--unlink=0"] if kind == "write" else []),
        ]  # fmt: skip
        if kind == "write":
            for old in self.directory.glob("bench.*"):
                os.unlink(old)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise NotRun(f"fio failed: {done.stderr.strip()[:200]}")
        return float(json.loads(done.stdout)["jobs"][0][kind]["bw_bytes"]) / 1e9


def run(given: Options) -> None:
    packs = 4 if given.quick else 16
    where = given.arguments.fio_directory
    with tempfile.TemporaryDirectory(dir=where) as top:
        ours, theirs = Path(top) / "packs", Path(top) / "fio"
        for folder in (ours, theirs):
            folder.mkdir(mode=0o700)
        line({"disk": "file system of the directory", "bytes_a_round": packs * DISK_PACK_BYTES})
        mine, fio = Packs(ours, packs), Fio(theirs, packs)
        try:
            for what in ("write", "read"):
                sides = [Side("fio", getattr(fio, what)), Side("interlock packs", getattr(mine, what))]
                compare(f"disk {what}", "GB/s", sides, given.rounds, base="fio")
        finally:
            mine.close()
