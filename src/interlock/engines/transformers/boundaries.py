"""Boundary snapshots: models whose layers cannot all be cut by tokens find their prefixes again, too.

At block boundaries of a prefill the state of the layers that cannot be cut goes to the snapshot store, and with it the KV blocks of
those that can. When the request ends, what is durable of it is promoted: named by a hash chain over its tokens, it is found by any
later prompt that begins so, also after a restart. A later prompt resumes at the last boundary where everything is stored; whatever
is missing or damaged is computed. Saving and promoting hold up no step: the copies are written behind, by the store's threads.

One rank only; the hooks are `hooks.BlockScheduler`, `BlockWorker` and `BoundaryHook`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from interlock.core.limits import REQUESTS_TRACKED_MAX, SNAPSHOT_MEMORY_BYTES_MAX
from interlock.core.snapshot_book import BUDGET
from interlock.engines.base import EngineStartError, Work
from interlock.engines.transformers.hooks import Boundary, Found, Hooks, KVView
from interlock.host.blocking import BlockingHost
from interlock.host.threads import Worker, WorkerBusyError
from interlock.snapshots.desk import SnapshotBusy, SnapshotError
from interlock.snapshots.store import SnapshotStore
from interlock.snapshots.tensors import to_torch

if TYPE_CHECKING:
    import torch

    from interlock.engines.transformers.computer import Computer
    from interlock.engines.transformers.setup import TransformersConfig

_log = logging.getLogger(__name__)
FLUSH_SECONDS = 10.0
CLOSE_SECONDS = 5.0
WRITING_SHARE = 4
"""One part in so many of a bounded directory is for requests that still run; the rest is for what is kept."""
STATE, KV = b"state", b"kv"


class SaveOrder(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of `key` to be saved: (block, name)."""

    key: str
    blocks: list[tuple[int, str]]


def open_boundaries(config: TransformersConfig, computer: Computer) -> Hooks:
    """Hooks over a snapshot store in `config.snapshots`. Raises `EngineStartError`."""
    assert config.snapshots is not None
    import transformers

    if config.tensor_parallel != 1:
        raise EngineStartError("boundary snapshots need tensor_parallel 1: each rank would need its own")
    if not computer.nature.continues:
        _log.warning("%s cannot continue a prefill, so it takes no boundary snapshots", config.name)
        return Hooks()
    try:
        store = _open_store(Path(config.snapshots), f"engine {config.name}", config.snapshot_bytes)
    except OSError as error:  # a cache that cannot be had keeps no engine from serving
        _log.warning("%s takes no boundary snapshots: %s", config.name, error)
        return Hooks()
    made = Boundaries(
        store,
        # Names must differ wherever the state would: the model, how it is computed, the grid.
        salt=msgspec.json.encode(
            [
                config.model_id,
                config.dtype,
                config.block_tokens,
                computer.nature.cuttable,
                transformers.__version__,
            ]
        ),
        block_tokens=config.block_tokens,
        needs_state=not computer.nature.begins_from_blocks,
        needs_kv=bool(computer.nature.cuttable),
    )
    return Hooks(scheduler=made, worker=made, boundary=made)


def _open_store(path: Path, owner: str, bytes_max: int | None) -> SnapshotStore:
    BlockingHost().files.make_private_dir(path)
    if bytes_max is None:
        return SnapshotStore(path, owner=owner)
    writing = max(1, bytes_max // WRITING_SHARE)
    budget = msgspec.structs.replace(
        BUDGET, memory_bytes=min(writing, SNAPSHOT_MEMORY_BYTES_MAX), disk_bytes=writing
    )
    return SnapshotStore(path, owner=owner, budget=budget, kept_bytes_max=bytes_max - writing)


class Tracked:
    """One live request: the scope it saves under, and where its snapshots go when it ends."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.names: dict[int, str] = {}
        """Position in the scope -> name."""


class Boundaries:
    """All three hooks. Its methods are called from the engine's thread; promotion runs in a thread of its own."""

    def __init__(
        self, store: SnapshotStore, *, salt: bytes, block_tokens: int, needs_state: bool, needs_kv: bool
    ) -> None:
        self.store = store
        self._base, self._salt, self._block_tokens = salt, salt, block_tokens
        self._life = os.urandom(8).hex()
        self._needs_state, self._needs_kv = needs_state, needs_kv
        self._requests: dict[str, Tracked] = {}
        self._salts: dict[str, str] = {}
        self._numbers = itertools.count()
        self._counts: Counter[str] = Counter()
        self._promoter = Worker("snapshot-promoter", REQUESTS_TRACKED_MAX)

    # --- names -----------------------------------------------------------------------------------------------------

    def _chain(self, tokens: Sequence[int], cache_salt: str, blocks: int) -> list[bytes]:
        """A digest for each of the first `blocks` blocks, each over all tokens up to its end."""
        digest, chain = hashlib.blake2b(self._salt + b"|" + cache_salt.encode(), digest_size=16).digest(), []
        for block in range(blocks):
            part = tokens[block * self._block_tokens : (block + 1) * self._block_tokens]
            digest = hashlib.blake2b(digest + np.asarray(part, "<i8").tobytes(), digest_size=16).digest()
            chain.append(digest)
        return chain

    @staticmethod
    def _name(kind: bytes, digest: bytes) -> str:
        return hashlib.blake2b(kind + digest, digest_size=16).hexdigest()

    # --- BlockScheduler --------------------------------------------------------------------------------------------

    def lookup(self, work: Work, blocks_max: int) -> Found | None:
        if len(self._requests) >= REQUESTS_TRACKED_MAX:
            return None
        self._requests[work.key] = Tracked(f"{work.key}#{next(self._numbers)}")
        self._salts[work.key] = work.cache_salt
        chain = self._chain(work.prompt, work.cache_salt, blocks_max)
        kept, best = self.store.kept, 0
        for block, digest in enumerate(chain):
            if self._needs_kv and self._name(KV, digest) not in kept:
                break
            if not self._needs_state or self._name(STATE, digest) in kept:
                best = block + 1
        self._counts["asked_blocks"] += blocks_max
        if not best:
            return None
        names = [self._name(KV, digest) for digest in chain[:best]] if self._needs_kv else []
        return Found(best, msgspec.msgpack.encode(names), self._needs_state)

    def completed(self, key: str, tokens: Sequence[int], first_block: int, stop_block: int) -> bytes | None:
        tracked = self._requests.get(key)
        if tracked is None or not self._needs_kv:
            return None
        chain = self._chain(tokens, self._salts[key], stop_block)
        blocks = [(block, self._name(KV, chain[block])) for block in range(first_block, stop_block)]
        wanted = [(block, name) for block, name in blocks if name not in self.store.kept]
        return msgspec.msgpack.encode(SaveOrder(key, wanted)) if wanted else None

    def loaded(self, key: str, blocks: int) -> None:
        self._counts["loaded_blocks"] += blocks
        self._counts["failed_loads"] += not blocks and key in self._requests

    def weights_changed(self, path: str) -> None:
        """What live requests hold is of two weights: none of it is kept."""
        for key in list(self._requests):
            self._leave(key, is_kept=False)
        # A path may hold other weights the next time, in another life too: each change is a world of its own.
        self._salt = self._base + (f"|{path}|{self._life}|{next(self._numbers)}".encode() if path else b"")

    def ended(self, key: str) -> None:
        self._leave(key, is_kept=True)

    def counts(self) -> Mapping[str, int]:
        return {name: count for name, count in self._counts.items() if count}

    def close(self) -> None:
        if self._promoter.close(CLOSE_SECONDS):
            left = self.store.close(erase=True, timeout_s=CLOSE_SECONDS)
            if left:
                _log.warning("%d snapshots were not written before the end", len(left))

    def _leave(self, key: str, *, is_kept: bool) -> None:
        tracked = self._requests.pop(key, None)
        self._salts.pop(key, None)
        if tracked is None or not tracked.names:
            return
        try:
            self._promoter.submit(self._finish, tracked, is_kept)
        except WorkerBusyError as error:
            _log.warning("snapshots of %s are not kept: %s", key, error)

    def _finish(self, tracked: Tracked, is_kept: bool) -> None:
        """In the promoter's thread."""
        try:
            if is_kept:
                self.store.flush(tracked.scope, FLUSH_SECONDS)
                for position, name in sorted(tracked.names.items()):
                    self._counts["promoted"] += self.store.promote(tracked.scope, position, name)
            self.store.erase(tracked.scope)
        except (SnapshotBusy, SnapshotError) as error:
            _log.warning("snapshots of %s are lost: %s", tracked.scope, error)

    # --- BlockWorker -----------------------------------------------------------------------------------------------

    def save(self, orders: bytes, views: dict[str, KVView]) -> None:
        order = msgspec.msgpack.decode(orders, type=SaveOrder)
        view = views.get(order.key)
        if view is None:
            return
        for block, name in order.blocks:
            start, stop = block * self._block_tokens, (block + 1) * self._block_tokens
            tensors = {}
            for layer in view.layers:
                tensors[f"{layer}.k"], tensors[f"{layer}.v"] = view.read(layer, start, stop)
            self._keep(order.key, 2 * block + 1, name, tensors)

    def _keep(self, key: str, position: int, name: str, tensors: Mapping[str, object]) -> None:
        tracked = self._requests.get(key)
        if tracked is None:
            return
        saved = self.store.save(tracked.scope, position, tensors)
        self._counts["saved_blocks" if saved.accepted else "save_refused"] += 1
        if saved.accepted:
            tracked.names[position] = name

    def load(self, orders: bytes, blocks: int) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        import torch

        names = msgspec.msgpack.decode(orders, type=list[str])
        parts: list[dict[str, torch.Tensor]] = []
        for name in names[:blocks]:
            snapshot = self.store.kept.load(name)
            if snapshot is None:
                break
            parts.append(to_torch(snapshot.tensors))
        if not parts:
            return 0, []
        layers = sorted({int(name.partition(".")[0]) for name in parts[0]})
        whole = [[torch.cat([p[f"{n}.{kv}"] for p in parts], dim=-2)[None] for kv in "kv"] for n in layers]
        return len(parts), [(keys, values) for keys, values in whole]

    # --- BoundaryHook ----------------------------------------------------------------------------------------------

    def _state_name(self, tokens: Sequence[int], salt: str) -> str:
        chain = self._chain(tokens, salt, len(tokens) // self._block_tokens)
        return self._name(STATE, chain[-1])

    def wants(self, boundary: Boundary) -> bool:
        is_new = self._state_name(boundary.tokens, boundary.salt) not in self.store.kept
        return self._needs_state and boundary.key in self._requests and is_new

    def captured(self, boundary: Boundary, data: bytes) -> None:
        blocks = len(boundary.tokens) // self._block_tokens
        name = self._state_name(boundary.tokens, boundary.salt)
        self._counts["captured"] += 1
        self._keep(boundary.key, 2 * blocks, name, {"state": np.frombuffer(data, np.uint8)})

    def find(self, tokens: Sequence[int], salt: str, blocks: int) -> bytes | None:
        snapshot = self.store.kept.load(self._state_name(tokens[: blocks * self._block_tokens], salt))
        return None if snapshot is None else bytes(snapshot.tensors["state"].data)
