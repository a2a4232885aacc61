"""From a vLLM request to the keys of its blocks. What cannot be named exactly gets no key, and so is never shared.

vLLM's own block hashes are not used: they are seeded per process (hazards §2 item 9).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from interlock.connectors.models import UnknownModelError
from interlock.core.layouts import KVLayout
from interlock.core.prefixes import NO_PARENT, KeySalt, chain_keys


class Salts(msgspec.Struct, frozen=True):
    """What all blocks of this engine have in common, and how an adapter's weights are told."""

    model: str
    layout: KVLayout
    tenant: str
    variant: tuple[tuple[str, str], ...]
    adapter_identity: Callable[[Path], str]

    def of(self, request: Any) -> bytes | None:
        """The salt's digest for one vLLM request, or None when its KV depends on something without a name.

        `cache_salt` carries what the front put there: tenant and weights version.
        """
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            return None  # embeddings given by the client: their tokens are placeholders
        if request.pooling_params is not None or request.resumable:
            return None  # a resumable session rewrites tokens that had keys
        lora = self._adapter(request.lora_request)
        if lora is None:
            return None
        return KeySalt(
            model=self.model,
            dtype=self.layout.dtype,
            layout_digest=self.layout.digest(),
            tenant=self.tenant,
            lora=lora,
            multimodal=tuple(
                f"{feature.identifier}@{feature.mm_position.offset}+{feature.mm_position.length}"
                for feature in request.mm_features
            ),
            extra=(*self.variant, ("cache_salt", request.cache_salt or "")),
        ).digest()

    def _adapter(self, lora: Any) -> str | None:
        """Empty without an adapter, else the identity of its content; None when that cannot be told."""
        if lora is None:
            return ""
        path = Path(lora.lora_path).expanduser()
        if not path.exists():
            return None
        try:
            return self.adapter_identity(path)
        except (UnknownModelError, OSError):
            return None


class KeyChain:
    """Keys of one request's full blocks, computed once each and only as far as asked."""

    def __init__(self, salt: bytes, block_tokens: int) -> None:
        self._salt = salt
        self._block_tokens = block_tokens
        self.keys: list[bytes] = []

    def upto(self, blocks: int, token_ids: Any) -> list[bytes]:
        """Extends the chain to `blocks` blocks of `token_ids` (a request's tokens only ever grow) and returns it."""
        done = len(self.keys)
        if blocks > done:
            fresh = list(token_ids[done * self._block_tokens : blocks * self._block_tokens])
            self.keys += chain_keys(fresh, self._block_tokens, self._salt, parent=self.parent(done))
        return self.keys

    def parent(self, block: int) -> bytes:
        """The key before block `block`, empty for the first."""
        return self.keys[block - 1] if block else NO_PARENT
