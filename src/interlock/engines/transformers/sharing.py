"""How one engine's life reaches the store, what its blocks are, and what rank 0 orders the ranks to move."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from interlock.core.layouts import KVLayout, shard_of_rank
from interlock.core.limits import STORE_LOOKUP_SECONDS_MAX
from interlock.store.client import MatchResult, StoreClient, WriteGrant
from interlock.store.keys import ModelSalt
from interlock.wire.identity import Identity
from interlock.wire.store_messages import Attach

if TYPE_CHECKING:
    from interlock.engines.transformers.computer import Computer
    from interlock.engines.transformers.setup import TransformersConfig

LOOKUP_SECONDS = STORE_LOOKUP_SECONDS_MAX


class StoreAccess(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine's life reaches the store, and what its blocks are; the same on every rank."""

    address: str
    engine: str
    """Name of this engine at the store; no two engines there share it."""
    incarnation: int
    ranks: int
    salt: ModelSalt
    state_dir: str

    @property
    def layout(self) -> KVLayout:
        return self.salt.layout

    def client(self, rank: int | None) -> StoreClient:
        """Of the deciding half (None) or of one rank."""
        part = "scheduler" if rank is None else f"rank{rank}"
        layout = self.layout
        shard = (
            None
            if rank is None
            else shard_of_rank(rank, self.ranks, layers=layout.layers, heads=layout.heads)
        )
        attach = Attach(
            engine=self.engine,
            engine_incarnation=self.incarnation,
            rank=rank,
            ranks=self.ranks,
            layout=layout,
            shard=shard,
        )
        me = Identity(f"{self.engine}/{part}", self.incarnation, os.urandom(16))
        return StoreClient(self.address, me, attach, lookup_timeout_s=LOOKUP_SECONDS)


def layout_of(config: TransformersConfig, computer: Computer) -> KVLayout:
    """Raises `ValueError` for a model whose cache is not one shape of full attention in every layer."""
    nature = computer.nature
    if len(nature.cuttable) != nature.layers:
        raise ValueError(
            f"{nature.layers - len(nature.cuttable)} of its {nature.layers} layers keep a state that cannot be cut by "
            "tokens (recurrent, sliding-window)"
        )
    text = computer.model.model.config.get_text_config(decoder=True)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    layout = KVLayout(
        layers=nature.layers,
        heads=heads,
        block_tokens=config.block_tokens,
        content=2 * size,
        dtype=config.dtype,
    )
    if nature.token_bytes * config.tensor_parallel * config.block_tokens != layout.block_bytes:
        raise ValueError("its cache does not hold keys and values of its configured heads in every layer")
    return layout


class SaveOrder(msgspec.Struct, frozen=True, array_like=True):
    """Copy these blocks of request `key` to the granted slots; `keys` and `blocks` run along `grant.grants`."""

    key: str
    grant: WriteGrant
    keys: list[bytes]
    blocks: list[int]


class LoadOrder(msgspec.Struct, frozen=True, array_like=True):
    """Copy these blocks of a prefix out of their slots; `keys` runs along `found.locations`."""

    keys: list[bytes]
    found: MatchResult
