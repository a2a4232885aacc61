"""Compares eviction policies by simulation: how many blocks of a trace are hit, for stores of several sizes.

    python benchmarks/eviction.py [--trace FILE] [--quick] [--json]

`--trace` is a file of requests, one JSON object a line with `hash_ids` (one number a block; equal numbers share a prefix),
as Mooncake publishes them; `.gz` is understood. Without it only made traces run: *chat* (conversations of Zipf popularity
that grow), *scan* (a hot set of system prompts, and documents read once), *loop* (the same documents again and again, a
little more than fit), *drift* (popularity that moves). A request matches its longest prefix and then saves what is missing,
as the connector does; a store's size is a share of the trace's distinct blocks. Printed is the share of blocks that hit.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from interlock.core.eviction import LeafARC

Key = bytes
Trace = list[list[int]]
SIZES = (0.01, 0.05, 0.1, 0.2, 0.4)


class Policy(Protocol):
    """What a store asks of its order."""

    def add(self, key: Key) -> None: ...
    def evict(self, key: Key) -> object: ...
    def touch(self, keys: Sequence[Key]) -> None: ...
    def hold(self, key: Key) -> None: ...
    def release(self, key: Key) -> None: ...
    def victim(self) -> Key | None: ...


# --- the policies that were not chosen ---------------------------------------------------------------------------


class PlainLRU:
    """Least recently used, blind to who hangs on whom."""

    def __init__(self, _: int) -> None:
        self.order: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        self.order[key] = None

    def evict(self, key: Key) -> None:
        self.order.pop(key, None)

    def touch(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.order.move_to_end(key)

    def hold(self, key: Key) -> None: ...

    def release(self, key: Key) -> None: ...

    def victim(self) -> Key | None:
        return next(iter(self.order), None)


class Leaves:
    """Who holds whom, for policies that keep leaves in queues. `_enter(key, fresh)` offers a candidate, `_leave` takes it back."""

    def __init__(self) -> None:
        self.present: set[Key] = set()
        self.holds: Counter[Key] = Counter()

    def add(self, key: Key) -> None:
        self.present.add(key)
        if not self.holds[key]:
            self._enter(key, fresh=True)

    def evict(self, key: Key) -> None:
        self.present.discard(key)
        self._leave(key)

    def hold(self, key: Key) -> None:
        self.holds[key] += 1
        if key in self.present:
            self._leave(key)

    def release(self, key: Key) -> None:
        self.holds[key] -= 1
        if not self.holds[key]:
            del self.holds[key]
            if key in self.present:
                self._enter(key, fresh=False)

    def _enter(self, key: Key, *, fresh: bool) -> None: ...

    def _leave(self, key: Key) -> None: ...


class LeafS3FIFO(Leaves):
    """S3-FIFO (Yang et al., SOSP 2023): a small queue for newcomers, a main one, and a ghost of what left the small one."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.small: OrderedDict[Key, None] = OrderedDict()
        self.main: OrderedDict[Key, None] = OrderedDict()
        self.ghost: OrderedDict[Key, None] = OrderedDict()
        self.uses: dict[Key, int] = {}
        self.of_main: set[Key] = set()
        self.capacity = capacity
        self.in_small = 0

    def add(self, key: Key) -> None:
        self.uses[key] = 0
        if key in self.ghost:
            del self.ghost[key]
            self.of_main.add(key)
        else:
            self.in_small += 1
        super().add(key)

    def touch(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.uses[key] = min(3, self.uses[key] + 1)

    def evict(self, key: Key) -> None:
        super().evict(key)
        del self.uses[key]
        if key in self.of_main:
            self.of_main.discard(key)
        else:
            self.in_small -= 1
            self.ghost[key] = None
            while len(self.ghost) > self.capacity:
                self.ghost.popitem(last=False)

    def _enter(self, key: Key, *, fresh: bool) -> None:
        queue = self.main if key in self.of_main else self.small
        queue[key] = None
        if not fresh:  # it is older than the child that has just left
            queue.move_to_end(key, last=False)

    def _leave(self, key: Key) -> None:
        self.small.pop(key, None)
        self.main.pop(key, None)

    def victim(self) -> Key | None:
        while True:
            if self.small and (self.in_small > self.capacity // 10 or not self.main):
                key = next(iter(self.small))
                if self.uses[key] <= 1:
                    return key
                del self.small[key]
                self.in_small -= 1
                self.of_main.add(key)
                self.main[key] = None
                self.uses[key] = 0
            elif self.main:
                key = next(iter(self.main))
                if not self.uses[key]:
                    return key
                self.uses[key] -= 1
                self.main.move_to_end(key)
            else:
                return None


class LeafSieve(Leaves):
    """SIEVE (Zhang et al., NSDI 2024): one queue, one bit, a hand that moves from old to new."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.queue: OrderedDict[Key, None] = OrderedDict()
        self.passed: OrderedDict[Key, None] = OrderedDict()
        self.used: set[Key] = set()

    def touch(self, keys: Sequence[Key]) -> None:
        self.used.update(keys)

    def evict(self, key: Key) -> None:
        super().evict(key)
        self.used.discard(key)

    def _enter(self, key: Key, *, fresh: bool) -> None:
        self.queue[key] = None
        if not fresh:
            self.queue.move_to_end(key, last=False)

    def _leave(self, key: Key) -> None:
        self.queue.pop(key, None)
        self.passed.pop(key, None)

    def victim(self) -> Key | None:
        while self.queue or self.passed:
            if not self.queue:  # the hand is back at the oldest
                self.queue, self.passed = self.passed, self.queue
            key = next(iter(self.queue))
            if key not in self.used:
                return key
            self.used.discard(key)
            del self.queue[key]
            self.passed[key] = None
        return None


class LeafLRU:
    """Least recently used of the leaves. What the store had first."""

    def __init__(self, _: int) -> None:
        self.value: dict[Key, tuple[int, int]] = {}
        self.holds: Counter[Key] = Counter()
        self.heap: list[tuple[int, int, Key]] = []
        self.now = 0

    def add(self, key: Key) -> None:
        self.touch([key])

    def rank(self, _: Key) -> int:
        return 0

    def touch(self, keys: Sequence[Key]) -> None:
        self.now += len(keys)
        for index, key in enumerate(keys):
            self.value[key] = (self.rank(key), self.now - index)
            if key not in self.holds:
                heapq.heappush(self.heap, (*self.value[key], key))

    def evict(self, key: Key) -> None:
        del self.value[key]

    def hold(self, key: Key) -> None:
        self.holds[key] += 1

    def release(self, key: Key) -> None:
        self.holds[key] -= 1
        if not self.holds[key]:
            del self.holds[key]
            if key in self.value:
                heapq.heappush(self.heap, (*self.value[key], key))

    def victim(self) -> Key | None:
        while self.heap:
            value, use, key = self.heap[0]
            if self.value.get(key) == (value, use) and key not in self.holds:
                return key
            heapq.heappop(self.heap)
        return None


class LeafLFUDA(LeafLRU):
    """Least frequently used with dynamic aging (Arlitt et al., 2000): a use count plus the value of what left last."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.uses: Counter[Key] = Counter()
        self.age = 0

    def rank(self, key: Key) -> int:
        self.uses[key] += 1
        return self.age + self.uses[key]

    def evict(self, key: Key) -> None:
        self.age = max(self.age, self.value[key][0])
        del self.uses[key]
        super().evict(key)


class Chosen(LeafARC):
    """The store's own, which hands a child's last use on to its parent."""

    inherited = 0

    def evict(self, key: Key) -> int:
        self.inherited = super().evict(key)
        return self.inherited

    def touch(self, keys: Sequence[Key]) -> None:  # type: ignore[override]
        if keys:
            super().touch(keys[-1])

    def release(self, key: Key, _: int = 0) -> None:
        super().release(key, self.inherited)
        self.inherited = 0


POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": PlainLRU,
    "leaf-lru": LeafLRU,
    "leaf-sieve": LeafSieve,
    "leaf-s3fifo": LeafS3FIFO,
    "leaf-lfuda": LeafLFUDA,
    "leaf-arc": lambda _: Chosen(),
}


# --- traces ------------------------------------------------------------------------------------------------------


def read_trace(path: Path) -> Trace:
    """Raises `SystemExit` for a line that is no request."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    try:
        return [[int(number) for number in json.loads(line)["hash_ids"]] for line in text.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no trace of requests with hash_ids: {error}") from error


def _zipf(rng: random.Random, count: int, skew: float) -> Callable[[], int]:
    weights = [1 / (rank + 1) ** skew for rank in range(count)]
    total, sums = 0.0, []
    for weight in weights:
        total += weight
        sums.append(total)
    return lambda: rng.choices(range(count), cum_weights=sums)[0]


def _numbers() -> Callable[[int], list[int]]:
    """Fresh block numbers."""
    last = 0

    def fresh(count: int) -> list[int]:
        nonlocal last
        last += count
        return list(range(last - count, last))

    return fresh


def chat(requests: int, seed: int = 1) -> Trace:
    """Conversations of Zipf popularity under shared system prompts; each turn adds blocks, and long ones begin anew."""
    rng, fresh = random.Random(seed), _numbers()
    prompts = [fresh(rng.randint(2, 20)) for _ in range(20)]
    pick, prompt = _zipf(rng, 400, 0.9), _zipf(rng, 20, 1.0)
    talks: dict[int, list[int]] = {}
    trace = []
    for _ in range(requests):
        who = pick()
        talk = talks.get(who) or list(prompts[prompt()])
        talk = talk + fresh(rng.randint(1, 8))
        talks[who] = [] if len(talk) > 120 else talk
        trace.append(talk)
    return trace


def scan(requests: int, seed: int = 2) -> Trace:
    """Four of five requests read a document once; the rest share hot prompts."""
    rng, fresh = random.Random(seed), _numbers()
    hot = [fresh(30) for _ in range(60)]
    pick = _zipf(rng, 60, 0.7)
    return [hot[pick()] + fresh(2) if rng.random() < 0.2 else fresh(30) for _ in range(requests)]


def loop(requests: int, seed: int = 3) -> Trace:
    """A hundred documents, each asked about in turn, again and again."""
    _, fresh = random.Random(seed), _numbers()
    documents = [fresh(40) for _ in range(100)]
    return [documents[turn % 100] + fresh(1) for turn in range(requests)]


def drift(requests: int, seed: int = 4) -> Trace:
    """What is popular moves on: of 50 documents at a time one in ten requests replaces one."""
    rng, fresh = random.Random(seed), _numbers()
    live = [fresh(25) for _ in range(50)]
    pick = _zipf(rng, 50, 0.8)
    trace = []
    for _ in range(requests):
        if rng.random() < 0.1:
            live[rng.randrange(50)] = fresh(25)
        trace.append(live[pick()] + fresh(1))
    return trace


# --- simulation --------------------------------------------------------------------------------------------------


class Simulated:
    """A store of `capacity` blocks under a policy."""

    def __init__(self, policy: Policy, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.parent: dict[Key, Key] = {}
        self.hit = self.asked = 0

    def serve(self, keys: list[Key]) -> None:
        found = 0
        while found < len(keys) and keys[found] in self.parent:
            found += 1
        self.hit += found
        self.asked += len(keys)
        self.policy.touch(keys[:found])
        parent = keys[found - 1] if found else b""
        for key in keys[found:]:
            if key in self.parent:  # its parent was evicted before it: it is reached again
                parent = key
                continue
            if parent:
                self.policy.hold(parent)
            if len(self.parent) >= self.capacity and not self._evict():
                if parent:
                    self.policy.release(parent)
                return
            self.parent[key] = parent
            self.policy.add(key)
            parent = key

    def _evict(self) -> bool:
        key = self.policy.victim()
        if key is None:
            return False
        self.policy.evict(key)
        parent = self.parent.pop(key)
        if parent:
            self.policy.release(parent)
        return True


def simulate(trace: Trace, policy: Callable[[int], Policy], capacity: int) -> float:
    """The share of blocks that hit."""
    store = Simulated(policy(capacity), capacity)
    for request in trace:
        store.serve([number.to_bytes(8, "big") for number in request])
    return store.hit / store.asked


def rows(
    traces: dict[str, Trace], sizes: Sequence[float]
) -> Iterator[tuple[str, float, int, dict[str, float]]]:
    for name, trace in traces.items():
        distinct = len({number for request in trace for number in request})
        for share in sizes:
            capacity = max(64, int(distinct * share))
            yield name, share, capacity, {n: simulate(trace, p, capacity) for n, p in POLICIES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trace", type=Path, help="requests with hash_ids, one JSON object a line, .gz or plain"
    )
    parser.add_argument("--quick", action="store_true", help="short traces, two sizes")
    parser.add_argument("--json", action="store_true", help="one JSON line a point")
    asked = parser.parse_args()
    count = 600 if asked.quick else 4000
    traces = {made.__name__: made(count) for made in (chat, scan, loop, drift)}
    if asked.trace is not None:
        traces[asked.trace.name.split(".")[0]] = read_trace(asked.trace)
    if not asked.json:
        print(f"{'trace':<26}{'size':>6}{'blocks':>9}" + "".join(f"{name:>13}" for name in POLICIES))
    for name, share, capacity, ratios in rows(traces, SIZES[1::2] if asked.quick else SIZES):
        if asked.json:
            sys.stdout.write(json.dumps({"trace": name, "share": share, "blocks": capacity, **ratios}) + "\n")
        else:
            print(f"{name:<26}{share:>6.0%}{capacity:>9}" + "".join(f"{ratios[p]:>13.4f}" for p in POLICIES))


if __name__ == "__main__":
    main()
