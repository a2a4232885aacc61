"""From an engine's model and a request's salt to the keys of its blocks: the same words, whatever the engine.

Two engines share a block when every word here is equal and the tokens are. So each engine describes what its KV depends on
with these functions; what one kind of engine cannot name exactly, it does not share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from interlock.core.layouts import KVLayout
from interlock.core.prefixes import NO_PARENT, KeySalt, chain_keys

NOT_IN_KV = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict"}
)
"""Fields of a Hugging Face configuration that move with the place or the library, or are told apart elsewhere (dtype)."""


class ModelSalt(msgspec.Struct, frozen=True, kw_only=True):
    """What all blocks of one engine have in common."""

    model: str
    """Identity of the weights' content (`store/models`)."""
    layout: KVLayout
    tenant: str = ""
    variant: tuple[tuple[str, str], ...] = ()
    """`variant_of`: what changes KV besides the weights' files."""

    def of(self, cache_salt: str, *, lora: str = "", multimodal: tuple[str, ...] = ()) -> bytes:
        """The salt's digest for one request. `cache_salt` carries what the front put there: tenant and weights version."""
        return KeySalt(
            model=self.model,
            dtype=self.layout.dtype,
            layout_digest=self.layout.digest(),
            tenant=self.tenant,
            lora=lora,
            multimodal=multimodal,
            extra=(*self.variant, ("cache_salt", cache_salt)),
        ).digest()


def variant_of(
    configuration: Mapping[str, Any], *, compute_dtype: str, quantization: str = ""
) -> tuple[tuple[str, str], ...]:
    """Overrides (rope scaling, quantization, …) change KV without changing a file of the checkpoint.

    `configuration` is the text model's Hugging Face configuration as the engine runs it, as a dictionary.
    """
    described = {name: value for name, value in configuration.items() if name not in NOT_IN_KV}
    text = json.dumps(described, sort_keys=True, default=str)
    return (
        ("compute_dtype", compute_dtype),
        ("quantization", quantization),
        ("configuration", hashlib.sha256(text.encode()).hexdigest()),
    )


class KeyChain:
    """Keys of one request's full blocks, computed once each and only as far as asked."""

    def __init__(self, salt: bytes, block_tokens: int) -> None:
        self._salt = salt
        self._block_tokens = block_tokens
        self.keys: list[bytes] = []

    def upto(self, blocks: int, token_ids: Sequence[int]) -> list[bytes]:
        """Extends the chain to `blocks` blocks of `token_ids` (a request's tokens only ever grow) and returns it."""
        done = len(self.keys)
        if blocks > done:
            fresh = list(token_ids[done * self._block_tokens : blocks * self._block_tokens])
            self.keys += chain_keys(fresh, self._block_tokens, self._salt, parent=self.parent(done))
        return self.keys

    def parent(self, block: int) -> bytes:
        """The key before block `block`, empty for the first."""
        return self.keys[block - 1] if block else NO_PARENT
