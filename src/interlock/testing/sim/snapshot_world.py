"""`SnapshotStore`, unchanged, under a seed: three requests, five callers, its own threads, one at a time in any order.

Between the steps: EIO, a full disk, slow writes that pass their deadline; then the process is killed at any call, perhaps with the
power, and the next life is told what its owner noted. What is checked:
* a load gives what was saved at that position of that request, or nothing; never what was refused, nor what was erased before it;
* what was accepted is readable at once, and what was told durable survives crash and power cut, until it is erased or promoted;
* after `erase` no directory of an earlier epoch stands under the live root;
* each accepted snapshot ends as durable, failed or erased; memory, descriptors and room are exact;
* a close that erases leaves no file.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from interlock.core.snapshot_book import Amount
from interlock.core.snapshot_state import scope_name
from interlock.host.disk import DirectoryBusy
from interlock.snapshots.desk import Notice, SnapshotBusy, SnapshotError
from interlock.snapshots.format import Raw
from interlock.snapshots.start import Claim
from interlock.snapshots.store import SnapshotStore
from interlock.testing.sim.folders import SimStorage
from interlock.testing.sim.steps import StepHost, Steps, Task

REQUESTS = ("r0", "r1", "r2")
POSITIONS = (1, 2)
FILE_BYTES = 8192
CALLS = 7
CALLERS = 4


class Save(msgspec.Struct, eq=False):
    """One save as its caller saw it. Times count steps of the schedule."""

    request: str
    position: int
    content: bytes
    began: int
    ended: int | None = None
    accepted: bool | None = None


class SnapshotRun:
    """One seed. `run()` raises `AssertionError` when something that must hold did not."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.storage = SimStorage(random.Random(seed + 1))
        self.saves: list[Save] = []
        self.erases: list[tuple[str, int, int | None]] = []
        self.notices: list[tuple[int, Notice]] = []
        self.promoted: list[tuple[str, int]] = []
        self.is_gentle = self.rng.random() < 0.4
        """Nothing is erased before the crash: what is durable must be there after it."""
        self.time = 0
        self.next_content = 0
        self.claims: dict[str, Claim] = {}
        self.counts = dict.fromkeys(("saves", "loads", "hits", "crashes", "cuts", "adopted"), 0)

    def run(self) -> dict[str, int]:
        self._life(crash=True)
        survivors = self._survivors()
        if self.rng.random() < 0.5:
            self.storage.power_cut()
            self.counts["cuts"] += 1
        self.counts["crashes"] += 1
        self.storage.full, self.storage.failing = False, 0.0
        self._second_life(survivors)
        return self.counts

    # --- lives -----------------------------------------------------------------------------------------------------

    def _life(self, *, crash: bool) -> None:
        steps = Steps(self.rng)
        store = self._open(steps, [])
        if self.rng.random() < 0.5:
            self.storage.failing = self.rng.choice((0.02, 0.2))
        calls = [steps.spawn(f"caller-{n}", lambda: self._caller(store)) for n in range(CALLERS)]
        budget = self.rng.randrange(40, 1200) if crash else 100_000
        while budget and not all(task.is_done for task in calls):
            self._step(steps)
            budget -= 1
        for task in steps.tasks:
            if task.error is not None:
                raise task.error
        if budget:  # everybody is through: what must hold at rest
            self.storage.full, self.storage.failing = False, 0.0
            self._rest(steps, store)
            self._all_ended()
            self.erases += [(request, self.time, self.time) for request in REQUESTS]
            self.claims.clear()  # an owner that erased names nothing: a power cut may undo the rename
        steps.kill()

    def _step(self, steps: Steps) -> None:
        self.time += 1
        if self.rng.random() < 0.01:
            self.storage.full = not self.storage.full
        able = [task for task in steps.tasks if steps.can_run(task)]
        waits = any(task.deadline_s is not None and not task.is_done for task in steps.tasks)
        if not able or (waits and self.rng.random() < 0.005):
            steps.pass_time()
        else:
            steps.step(self.rng.choice(able))

    def _open(self, steps: Steps, claims: list[Claim]) -> SnapshotStore:
        opened: SnapshotStore = steps.call(
            lambda: SnapshotStore(
                Path("simulated"),
                owner="world",
                claims=claims,
                on_notice=self._noticed,
                budget=Amount(12, 8 * FILE_BYTES, 10 * FILE_BYTES),
                write_seconds_max=2.0,
                host=StepHost(steps, self.storage),
            )
        )
        return opened

    def _noticed(self, notice: Notice) -> None:
        self.notices.append((self.time, notice))

    def _rest(self, steps: Steps, store: SnapshotStore) -> None:
        def rest() -> None:
            assert store.flush(timeout_s=1000), "what was accepted has no end"
            store.check_integrity()
            left = store.close(erase=True, timeout_s=1000)
            assert left == [], f"not written: {left}"

        steps.settle(task := steps.spawn("rest", rest))
        self._raise(steps, task)
        for where in ("live", "trash"):
            assert not self.storage.files(where), f"left in {where}: {self.storage.files(where)}"
        used = store.stats().used
        assert used == Amount(), f"still charged: {used}"

    def _raise(self, steps: Steps, *tasks: Task) -> None:
        for task in (*tasks, *steps.tasks):
            if task.error is not None:
                raise task.error

    def _all_ended(self) -> None:
        told = {(n.request, n.position) for _, n in self.notices}
        for save in self.saves:
            if save.accepted and save.ended is not None:
                is_erased = any(r == save.request for r, _, _ in self.erases)
                key = (save.request, save.position)
                assert is_erased or key in told, f"{key} was accepted and nothing was heard of it"

    # --- callers ---------------------------------------------------------------------------------------------------

    def _caller(self, store: SnapshotStore) -> None:
        for _ in range(CALLS):
            request, position = self.rng.choice(REQUESTS), self.rng.choice(POSITIONS)
            call: Callable[[], Any] = self.rng.choices(
                (
                    lambda r=request, p=position: self._save(store, r, p),
                    lambda r=request, p=position: self._load(store, r, p),
                    lambda r=request: self._erase(store, r),
                    lambda r=request, p=position: self._promote(store, r, p),
                    lambda: self._erase_all(store),
                    lambda r=request: self._claim(store, r),
                ),
                (8, 6, 0, 0.3, 0, 5) if self.is_gentle else (8, 6, 2, 1, 0.5, 2),
            )[0]
            try:
                call()
            except (SnapshotBusy, SnapshotError):
                continue

    def _save(self, store: SnapshotStore, request: str, position: int) -> None:
        content = self.next_content.to_bytes(4, "big")
        self.next_content += 1
        save = Save(request, position, content, self.time)
        self.saves.append(save)
        self.counts["saves"] += 1
        save.accepted = store.save(
            request, position, {"x": Raw("U8", (4,), memoryview(content))}, content.hex()
        ).accepted
        save.ended = self.time

    def _load(self, store: SnapshotStore, request: str, position: int) -> None:
        began = self.time
        self.counts["loads"] += 1
        found = store.load(request, position)
        if found is None:
            self._check_miss(store, request, position, began)
            return
        self.counts["hits"] += 1
        self._check_hit(request, position, began, bytes(found.tensors["x"].data), found.structure)

    def _check_hit(self, request: str, position: int, began: int, content: bytes, structure: Any) -> None:
        save = self.saves[int.from_bytes(content, "big")]
        assert structure == content.hex(), "structure and tensors are of two saves"
        assert (save.request, save.position) == (request, position), "a state of another request or position"
        assert save.accepted is not False, "a refused state was read"
        for who, start, end in self.erases:
            over = end is not None and end < began
            before = save.ended is not None and save.ended < start
            assert not (who == request and over and before), (
                f"{request} was erased at {start} and read at {began}"
            )

    def _check_miss(self, store: SnapshotStore, request: str, position: int, began: int) -> None:
        """A miss needs a reason: never saved, erased, promoted, failed, damaged, or a disk that fails now."""
        saves = [s for s in self.saves if (s.request, s.position) == (request, position)]
        kept = [s for s in saves if s.accepted and s.ended is not None and s.ended < began]
        if not kept or self.storage.failing:
            return
        first = min(s.began for s in kept)
        has_reason = any(who == request and (end is None or end >= first) for who, start, end in self.erases)
        has_reason |= (request, position) in self.promoted
        bad = [n for _, n in self.notices if n.kind != "durable"]
        has_reason |= any((n.request, n.position) == (request, position) for n in bad)
        counts = store.stats().counts
        has_reason |= counts["failed"] + counts["damaged"] > len(bad)  # told, and on its way to the owner
        assert has_reason, f"{request} at {position} was accepted and is missing"

    def _erase(self, store: SnapshotStore, request: str) -> None:
        index, began = len(self.erases), self.time
        self.erases.append((request, began, None))
        current = store.claim(request)
        store.erase(request)
        self.erases[index] = (request, began, self.time)
        self.claims.pop(request, None)
        if current is None:
            return
        name = f"{scope_name(request)}.{current.incarnation}.{current.epoch}"
        roots = [int(each) for each in self.storage.find("live").now]
        standing = self.storage.find(f"live/{max(roots)}").now
        assert name not in standing, f"{name} of {request} stands after its erase"

    def _erase_all(self, store: SnapshotStore) -> None:
        first, began = len(self.erases), self.time
        self.erases += [(request, began, None) for request in REQUESTS]
        self.claims.clear()
        store.erase_all()
        self.claims.clear()  # another caller may have noted one meanwhile; a power cut may undo the rename
        for n, request in enumerate(REQUESTS):
            self.erases[first + n] = (request, began, self.time)

    def _promote(self, store: SnapshotStore, request: str, position: int) -> None:
        self.promoted.append((request, position))
        name = f"{len(self.promoted):032x}"
        if store.promote(request, position, name):
            found = store.kept.load(name)
            assert found is not None or self.storage.failing, "what was promoted is gone"
            if found is not None:
                save = self.saves[int.from_bytes(bytes(found.tensors["x"].data), "big")]
                assert (save.request, save.position) == (request, position), "promoted as something else"

    def _claim(self, store: SnapshotStore, request: str) -> None:
        claim = store.claim(request)
        if claim is not None:
            self.claims[request] = claim

    # --- after the crash -------------------------------------------------------------------------------------------

    def _survivors(self) -> list[Save]:
        """Saves told durable, with nothing since that could have ended them, whose owner noted the directory."""
        found = []
        for when, notice in self.notices:
            key = (notice.request, notice.position)
            saves = [s for s in self.saves if (s.request, s.position) == key and s.accepted is not False]
            other = any((n.request, n.position) == key and n is not notice for _, n in self.notices)
            erased = any(who == notice.request for who, _, _ in self.erases)
            is_alone = len(saves) == 1 and not other and not erased and key not in self.promoted
            if notice.kind == "durable" and is_alone and notice.request in self.claims and when <= self.time:
                found.append(saves[0])
        return found

    def _second_life(self, survivors: list[Save]) -> None:
        steps = Steps(self.rng)
        store = self._open(steps, list(self.claims.values()))

        def look() -> None:
            for save in survivors:
                found = store.load(save.request, save.position)
                assert found is not None, f"{save.request} at {save.position} was durable and is gone"
                assert bytes(found.tensors["x"].data) == save.content
                self.counts["adopted"] += 1
            for request in REQUESTS:
                for position in store.boundaries(request):
                    found = store.load(request, position)
                    if found is not None:
                        content = bytes(found.tensors["x"].data)
                        self._check_hit(request, position, self.time, content, found.structure)

        self.time += 1
        steps.settle(task := steps.spawn("look", look))
        self._raise(steps, task)
        self._rest(steps, store)
        steps.kill()


def run_seed(seed: int) -> dict[str, int]:
    """Raises `AssertionError` with what failed; the same seed fails the same way."""
    try:
        return SnapshotRun(seed).run()
    except DirectoryBusy as error:
        raise AssertionError(f"the next life was refused: {error}") from error


def main(first: int, count: int) -> int:
    """Runs seeds and prints what they did; 1 when one failed."""
    total: dict[str, int] = {}
    for seed in range(first, first + count):
        try:
            for name, number in run_seed(seed).items():
                total[name] = total.get(name, 0) + number
        except AssertionError as error:
            print(f"seed {seed}: {error}")
            return 1
    print(f"{count} seeds: " + ", ".join(f"{number} {name}" for name, number in total.items()))
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
