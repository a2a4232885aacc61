"""KV blocks of this engine in the store: the same keys, layout, checksums and rules as vLLM's connector has.

`StoreScheduler` decides on rank 0; `StoreWorker` (`block_worker`) moves on every rank. `hooks` says when they are called.
Neither raises, and neither waits longer than a look-up may take.

* A request is looked up once; again only while the store says that more is on its way from a disk or a peer, for a second of
  its life at most (`store.waiting`), and other requests' steps go on meanwhile. A block whose bytes are not what was promised is withdrawn; the request goes on from the
  blocks before it, and saves nothing: the next one that computes them does.
* Saved are blocks all of whose tokens are computed and accepted. What the store refused is offered again with the next.
* The layout has every layer. A model of which not every layer can be cut by tokens is not shared.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from interlock.core.layouts import shard_of_rank
from interlock.core.limits import PROMOTION_POLL_SECONDS, REQUESTS_TRACKED_MAX
from interlock.engines.base import Work
from interlock.engines.transformers.block_worker import StoreWorker
from interlock.engines.transformers.hooks import Coming, Found, Hooks
from interlock.engines.transformers.sharing import LoadOrder, SaveOrder, StoreAccess, layout_of
from interlock.host.blocking import BlockingHost
from interlock.host.threads import monotonic_s
from interlock.store.client import StoreClient
from interlock.store.keys import KeyChain, ModelSalt, variant_of
from interlock.store.models import UnknownModelError, model_identity
from interlock.store.told_tokens import pack_tokens
from interlock.store.waiting import ComingWait
from interlock.wire.identity import load_identity
from interlock.wire.locations import as_list

if TYPE_CHECKING:
    from interlock.engines.transformers.computer import Computer
    from interlock.engines.transformers.setup import TransformersConfig

_log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder(enc_hook=as_list)


def open_access_of(config: TransformersConfig, computer: Computer) -> bytes:
    """A new life of this engine at the store, in words for every rank (`open_hooks`); called once, by rank 0.

    Empty where this model's KV cannot be shared: the log says why. Raises `OSError` when the state directory cannot be
    written.
    """
    assert config.store is not None
    try:
        layout = layout_of(config, computer)
        shard_of_rank(0, config.tensor_parallel, layers=layout.layers, heads=layout.heads)
    except ValueError as error:
        _log.warning("the KV of %s is not shared: %s", config.name, error)
        return b""
    host, state = BlockingHost(), Path(config.state_dir)
    host.files.make_private_dir(state)
    incarnation = load_identity(host, state, config.name).incarnation
    text = computer.model.model.config.get_text_config(decoder=True)
    salt = ModelSalt(
        model=config.model_id,
        layout=layout,
        variant=variant_of(text.to_dict(), compute_dtype=layout.dtype),
    )
    access = StoreAccess(
        address=config.store,
        engine=config.name,
        incarnation=incarnation,
        ranks=config.tensor_parallel,
        salt=salt,
        state_dir=str(state),
    )
    return msgspec.msgpack.encode(access)


def open_hooks(access: bytes, computer: Computer, rank: int) -> Hooks:  # noqa: ARG001
    """This rank's part in sharing: on rank 0 also the deciding half."""
    told = msgspec.msgpack.decode(access, type=StoreAccess)
    scheduler = StoreScheduler(told) if rank == 0 else None
    return Hooks(scheduler=scheduler, worker=StoreWorker(told, rank))


class Tracked:
    """One live request: its keys, and how far it is saved."""

    def __init__(self, chain: KeyChain, waits: ComingWait) -> None:
        self.chain, self.waits = chain, waits
        self.offered = 0
        self.saves = True
        self.saved = 0
        """Blocks before this one are stored, or were handed over to be."""


class StoreScheduler:
    """`hooks.BlockScheduler` over a store node."""

    def __init__(self, access: StoreAccess, client: StoreClient | None = None) -> None:
        self._access = access
        self._salt: ModelSalt | None = access.salt
        self._block_tokens = access.layout.block_tokens
        self._client = client if client is not None else access.client(None)
        self._requests: dict[str, Tracked] = {}
        self._sessions = 0
        self._counts: Counter[str] = Counter()
        self._client.start()

    def weights_changed(self, path: str) -> None:
        """Requests alive now neither read nor save any more. Weights that cannot be told from others share nothing."""
        self._requests.clear()
        self._salt = self._access.salt
        if path:
            cache = Path(self._access.state_dir) / "digests.json"
            try:
                model = model_identity(path, None, files=BlockingHost().files, cache=cache)
                self._salt = msgspec.structs.replace(self._access.salt, model=model)
            except (UnknownModelError, OSError) as error:
                _log.warning("the KV of these weights is not shared: %s", error)
                self._salt = None

    def lookup(self, work: Work, blocks_max: int) -> Found | Coming | None:
        before = self._requests.get(work.key)
        if before is None and len(self._requests) >= REQUESTS_TRACKED_MAX:
            self._counts["untracked_full"] += 1
            return None
        if self._salt is None:
            return None
        waits = before.waits if before is not None else ComingWait()
        tracked = Tracked(KeyChain(self._salt.of(work.cache_salt), self._block_tokens), waits)
        self._requests[work.key] = tracked
        keys = tracked.chain.upto(blocks_max, work.prompt)[:blocks_max]
        if not keys:
            return None
        found = self._client.match(keys)
        if found is not None and found.coming and waits.may_wait(monotonic_s()):
            self._counts["asked_again"] += 1
            return Coming(PROMOTION_POLL_SECONDS)
        self._counts["asked_blocks"] += len(keys)
        self._counts["lookup_unanswered"] += found is None
        if found is None or not found.locations:
            return None
        tracked.offered = len(found.locations)
        return Found(tracked.offered, _encoder.encode(LoadOrder(keys[: tracked.offered], found)))

    def loaded(self, key: str, blocks: int) -> None:
        tracked = self._requests.get(key)
        if tracked is None:
            return
        self._counts["loaded_blocks"] += blocks
        tracked.saved = max(tracked.saved, blocks)
        if blocks < tracked.offered:
            self._counts["failed_loads"] += 1
            tracked.saves = False

    def completed(
        self,
        key: str,
        tokens: Sequence[int],
        first_block: int,  # noqa: ARG002
        stop_block: int,
    ) -> bytes | None:
        """Also blocks before `first_block` whose save the store had refused: the request still holds them."""
        tracked = self._requests.get(key)
        if tracked is None or not tracked.saves:
            return None
        first = tracked.saved
        if stop_block <= first:
            return None
        keys = tracked.chain.upto(stop_block, tokens)[first:stop_block]
        parents = [tracked.chain.parent(block) for block in range(first, stop_block)]
        size = self._block_tokens
        told = [
            pack_tokens(tokens[block * size : (block + 1) * size])
            for block in range(first, stop_block)
            if self._client.wants_tokens
        ]
        self._sessions += 1
        grant = self._client.start_write(f"save-{self._sessions}", 1, keys, parents, tokens=told)
        if grant is None:
            self._counts["save_refused"] += 1
            return None
        tracked.saved = stop_block
        if not grant.grants:
            return None
        self._counts["saved_blocks"] += len(grant.grants)
        chosen = [given.index for given in grant.grants]
        order = SaveOrder(key, grant, [keys[i] for i in chosen], [first + i for i in chosen])
        return _encoder.encode(order)

    def ended(self, key: str) -> None:
        self._requests.pop(key, None)

    def counts(self) -> dict[str, int]:
        """What happened since the start, by name; `saved_blocks` were handed to the ranks."""
        return {name: count for name, count in self._counts.items() if count}

    def close(self) -> None:
        self._client.close()
