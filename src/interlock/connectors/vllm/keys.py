"""From a vLLM request to the keys of its blocks. What cannot be named exactly gets no key, and so is never shared.

vLLM's own block hashes are not used: they are seeded per process (hazards §2 item 9).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from interlock.store.keys import ModelSalt
from interlock.store.models import UnknownModelError


class Salts(msgspec.Struct, frozen=True):
    """What all blocks of this engine have in common, and how an adapter's weights are told."""

    engine: ModelSalt
    adapter_identity: Callable[[Path], str]

    def of(self, request: Any, weights: str = "") -> bytes | None:
        """The salt's digest for one vLLM request, or None when its KV depends on something without a name.

        `cache_salt` carries what the front put there: tenant and weights version. `weights` tells weights apart that neither it
        nor the model's identity names: those of an engine that changed them in place.
        """
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            return None  # embeddings given by the client: their tokens are placeholders
        if request.pooling_params is not None or request.resumable:
            return None  # a resumable session rewrites tokens that had keys
        lora = self._adapter(request.lora_request)
        if lora is None:
            return None
        engine = self.engine
        if weights:
            engine = msgspec.structs.replace(engine, variant=(*engine.variant, ("weights", weights)))
        return engine.of(
            request.cache_salt or "",
            lora=lora,
            multimodal=tuple(
                f"{feature.identifier}@{feature.mm_position.offset}+{feature.mm_position.length}"
                for feature in request.mm_features
            ),
        )

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
