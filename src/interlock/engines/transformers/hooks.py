"""What a KV store does to be used by this engine: one half decides on rank 0, the other moves bytes on every rank.

The halves are cut as vLLM cuts its connectors, and for the same reason: what is to be moved must be decided once, and
each rank moves its own shard. What the deciding half wants its ranks to do travels as opaque bytes inside the step's
plan. All calls come from the engine's own thread, between two forwards: nothing writes a cache meanwhile.

KV of one request lies as the library lays it: per layer `keys` and `values` of shape [1, heads of this rank, tokens, size].
Only layers that can be cut by tokens are offered (`KVView.layers`); a model with others (recurrent, sliding) begins
from a prefix only together with a snapshot of those at the same boundary.

They are found by name. With `TransformersConfig.store` set, once the model is loaded on every rank and before the first
step, rank 0 calls `blocks.open_access_of(config, computer) -> bytes` (empty: nothing can be shared, `computer.nature` says),
then every rank calls `blocks.open_hooks(access, computer, rank) -> Hooks`; `scheduler` of other ranks than 0 is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from interlock.engines.base import Work

if TYPE_CHECKING:
    import torch


class Hooks(msgspec.Struct, frozen=True):
    """What one rank was given; None: that part is not done."""

    scheduler: BlockScheduler | None = None
    worker: BlockWorker | None = None
    boundary: BoundaryHook | None = None


class Found(msgspec.Struct, frozen=True):
    """A prefix that the store holds: `blocks` blocks from the first token on; `orders` tell each rank how to get them."""

    blocks: int
    orders: bytes
    snapshot: bool = False
    """Layers that cannot be cut come from the `BoundaryHook`, at exactly this many blocks, on every rank."""


class Coming(msgspec.Struct, frozen=True):
    """More of a prefix is on its way to the store: the request waits and asks again; nobody else waits for it."""

    again_s: float
    """From now, in seconds."""


class BlockScheduler(Protocol):
    """On rank 0. Must not block: what takes longer than a few milliseconds is a miss. Nothing here may raise."""

    def lookup(self, work: Work, blocks_max: int) -> Found | Coming | None:
        """Asked when the request is about to be computed, once unless the answer is `Coming`; whoever answers so bounds it.

        At most `blocks_max` blocks (the last prompt token is always computed).
        """
        ...

    def completed(self, key: str, tokens: Sequence[int], first_block: int, stop_block: int) -> bytes | None:
        """Blocks [first, stop) of `key` are computed and accepted; `tokens` are all its computed tokens, prompt first.

        The answer goes to every rank's `save` at the beginning of the next step, before anything changes or drops the
        cache; None saves nothing. Never called for blocks that were loaded, nor for a request that lived through a change of weights.
        """
        ...

    def loaded(self, key: str, blocks: int) -> None:
        """Of what `lookup` found, `blocks` blocks were good on every rank; the rest is computed."""
        ...

    def weights_changed(self, path: str) -> None:
        """From now on the engine computes with the checkpoint at `path` (empty: that of its start): name blocks by that."""
        ...

    def counts(self) -> Mapping[str, int]:
        """As `Engine.counts`: `saved_blocks`, `loaded_blocks`, `failed_loads`."""
        ...

    def close(self) -> None: ...

    def ended(self, key: str) -> None:
        """The request is over, however it ended; orders given for it have been carried out on this rank."""
        ...


class KVView(Protocol):
    """The computed KV of one request on this rank, valid during the call it is given to."""

    @property
    def layers(self) -> Sequence[int]:
        """Model layers whose KV can be cut by tokens, ascending."""
        ...

    def read(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and values of tokens [start, stop): shape [heads, stop - start, size]."""
        ...


class BlockWorker(Protocol):
    """On every rank. Must be bounded in time; what fails is a failed block, never an exception."""

    def save(self, orders: bytes, views: dict[str, KVView]) -> None:
        """Copies blocks to the store; `views` holds every request that has a cache. No touch of it after return."""
        ...

    def load(self, orders: bytes, blocks: int) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Gets `blocks` blocks of a prefix: how many are good from the first on, and per cuttable layer their K and V.

        Each of shape [1, heads of this rank, good * block_tokens, size], owned by the engine from then on. The engine
        takes the least number of good blocks over its ranks.
        """
        ...

    def close(self) -> None: ...


class Boundary(msgspec.Struct, frozen=True):
    """What is left of a request at a block boundary besides what can be cut: see `BoundaryHook`."""

    key: str
    tokens: list[int]
    """All tokens up to the boundary."""
    salt: str


class BoundaryHook(Protocol):
    """Snapshots of layers that cannot be cut (issue 06): on every rank, for models that have such layers."""

    def wants(self, boundary: Boundary) -> bool:
        """Whether a snapshot is to be captured here. Asked at each boundary a prefill chunk ends on."""
        ...

    def captured(self, boundary: Boundary, data: bytes) -> None:
        """`data`: what `moving.cache_bytes` makes of the layers that cannot be cut (safetensors, structure in its header)."""
        ...

    def find(self, tokens: Sequence[int], salt: str, blocks: int) -> bytes | None:
        """What was captured after exactly these `tokens` (`blocks` blocks of them), or None."""
        ...
