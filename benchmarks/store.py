"""Measures the store against memcpy, the disk and its peers, in alternated rounds (`harness`).

    python benchmarks/store.py [--quick] [--only ram|calls|look-ups|disk] [--peers DIRECTORY] [--round-mib N]
                               [--fio-directory DIRECTORY]

* *ram*: put and get of many values in one call, checksums on (the default of the product) and off (exists for this only),
  against memcpy of the same bytes between the same two memories: the most that one copy can reach. Put ends when every
  process can read the values, get when they lie checked in the caller's memory.
* *calls*: the same, one value a call: what a call costs.
* *look-ups*: match of 1,000 keys among a million blocks, start_write, and what a save costs the thread that submits it.
* *disk*: packs written and read against fio with the same pattern.

`--peers` names a directory with an interpreter each: `moon/bin/python` (mooncake-transfer-engine-non-cuda), `lmc/bin/python`
(lmcache), `redis/bin/python` (redis, hiredis, and redis-server on the path). What is not there is named as not run.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import store_disk
import store_lookups
from harness import Child, NotRun, Options, Point, Side, begin, compare, not_run, options, report
from store_ours import PATIENCE_S, fresh_keys, layout_of, node, seconds

from interlock.store.api import Store

KIB = 1024
PEERS = {"mooncake": "moon", "lmcache": "lmc", "redis": "redis"}
PEERS_FILE = Path(__file__).parent / "store_peers.py"
RAM_SIZES = (4 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB)


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", type=Path, help="directory with the peers' virtual environments")
    parser.add_argument(
        "--round-mib", type=int, default=64, help="MiB moved in one round of a RAM comparison (default 64)"
    )
    parser.add_argument(
        "--fio-directory", type=Path, help="where fio and the packs write (default: a temporary one)"
    )


class Memcpy:
    """One copy between private memory and mapped shared memory, both larger than the caches."""

    def __init__(self, size: int, count: int) -> None:
        self.shared = np.frombuffer(mmap.mmap(-1, size * count), dtype=np.uint8).reshape(count, size)
        self.source = np.random.default_rng(size).integers(0, 256, (count, size), dtype=np.uint8)
        self.into = np.zeros((count, size), dtype=np.uint8)

    def put(self) -> float:
        return seconds(lambda: [np.copyto(a, b) for a, b in zip(self.shared, self.source, strict=True)])

    def get(self) -> float:
        return seconds(lambda: [np.copyto(a, b) for a, b in zip(self.into, self.shared, strict=True)])


class Ours:
    """A chain of `count` blocks, put and got by the public client in one call or one by one."""

    def __init__(self, address: str, size: int, count: int, *, checksums: bool) -> None:
        self.store = Store.open(address, layout_of(size), name="on" if checksums else "off", verify=checksums)
        self.store.wait_warm(PATIENCE_S)  # as the others' memory is from their first round on
        self.source = np.random.default_rng(size).integers(0, 256, (count, size), dtype=np.uint8)
        self.into = np.zeros((count, size), dtype=np.uint8)
        self.count, self.keys = count, fresh_keys(count)

    def put(self, single: bool = False) -> float:
        self.store.remove(self.keys, timeout_s=PATIENCE_S)
        self.keys = fresh_keys(self.count)
        stored: list[int] = []
        if not single:
            took = seconds(lambda: stored.append(self.store.put(self.keys, self.source).stored))
        else:
            took = seconds(
                lambda: stored.extend(
                    self.store.put([key], value).stored
                    for key, value in zip(self.keys, self.source, strict=True)
                )
            )
        assert sum(stored) == self.count, (stored, self.store.counts())
        return took

    def get(self, single: bool = False) -> float:
        self.into[:, :64] = 0
        if not single:
            took = seconds(lambda: self.store.get(self.keys, self.into))
        else:
            took = seconds(
                lambda: [self.store.get([key], into) for key, into in zip(self.keys, self.into, strict=True)]
            )
        assert np.array_equal(self.into[:, :64], self.source[:, :64]), self.store.counts()
        return took

    def close(self) -> None:
        self.store.remove(self.keys, timeout_s=PATIENCE_S)
        self.store.close()


@contextlib.contextmanager
def peers(given: Options) -> Iterator[dict[str, Child]]:
    """Those that can run here; the others are named."""
    found: dict[str, Child] = {}
    folder = given.arguments.peers
    for name, place in PEERS.items():
        python = folder / place / "bin" / "python" if folder is not None else None
        if python is None or not python.exists():
            not_run(
                name,
                f"no interpreter {place}/bin/python under --peers" if folder else "--peers was not given",
            )
            continue
        try:
            found[name] = Child(name, [str(python), str(PEERS_FILE), name])
        except NotRun as reason:
            not_run(name, str(reason))
    try:
        yield found
    finally:
        for one in found.values():
            one.close()


def ram(given: Options, address: str, *, single: bool) -> None:
    total = given.arguments.round_mib * KIB * KIB
    sizes = RAM_SIZES if not given.quick else RAM_SIZES[1:4]
    with peers(given) as others:
        for size in sizes:
            count = max(8, min(total // size, 256 if single else 4096))
            one_size(given, address, others, size, count, single=single)


def one_size(
    given: Options, address: str, others: dict[str, Child], size: int, count: int, *, single: bool
) -> None:
    """All sides with values of one size: what each put in its last round is what it gets in the comparison after."""
    copy = Memcpy(size, count)
    mine = [
        ("interlock, checksums on", Ours(address, size, count, checksums=True)),
        ("interlock, checksums off", Ours(address, size, count, checksums=False)),
    ]
    for other in others.values():
        other.ask(do="prepare", size=size, count=count)

    def rate(took: float) -> float:
        return size * count / took / 1e9

    def ours(name: str, side: Ours, what: str) -> Side:
        return Side(name, lambda: rate(getattr(side, what)(single)))

    def theirs(name: str, other: Child, what: str) -> Side:
        return Side(name, lambda: rate(other.ask(do=what, single=single)["seconds"]))

    how = "one a call" if single else f"{count} in one call"
    for what in ("put", "get"):
        sides = [Side("memcpy", lambda what=what: rate(getattr(copy, what)()))]  # type: ignore[misc]
        sides += [ours(name, side, what) for name, side in mine]
        sides += [theirs(name, other, what) for name, other in others.items()]
        found = compare(
            f"{what} {size // KIB} KiB, {how}", "GB/s", sides, given.rounds, base="memcpy", size=size
        )
        if single:
            cost_of_a_call(found, size)
    for _, side in mine:
        side.close()


def cost_of_a_call(found: dict[str, Point], size: int) -> None:
    """The same rounds as microseconds a call, which is what small values are about."""
    for name, point in found.items():
        calls = [size / value / 1e3 for value in point.values]
        report(Point(f"{point.bench}: a call", name, "us", calls))


def main() -> None:
    given = options(__doc__, rounds=9, quick_rounds=3, more=more)
    begin(given, "store")
    if given.only in ("", "ram", "calls"):
        with tempfile.TemporaryDirectory() as directory, node(Path(directory), 1 << 30) as address:
            if given.only != "calls":
                ram(given, address, single=False)
            if given.only != "ram":
                ram(given, address, single=True)
    if given.only in ("", "look-ups"):
        store_lookups.run(given)
    if given.only in ("", "disk"):
        store_disk.run(given)


if __name__ == "__main__":
    main()
