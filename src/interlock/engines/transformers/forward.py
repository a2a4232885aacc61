"""One forward of a model of the library, whatever its family calls its arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers.cache_utils as library


class ModelRefused(Exception):  # noqa: N818 - says what is, as the others do
    """This model cannot be served by this engine; the message says why."""


class Forward:
    """A model, called with tokens and a cache."""

    def __init__(self, model: Any) -> None:
        """Raises `ModelRefused` for a model that keeps its state where no cache of the library holds it."""
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        names = [name for name in ("past_key_values", "cache_params") if name in accepted]
        if not names:
            raise ModelRefused(
                f"{type(model).__name__} keeps its state outside the library's caches, so its requests could be neither "
                "batched nor saved; serve it with another engine"
            )
        self._cache_name = names[0]
        self._positions = "position_ids" in accepted
        self._keeps = "logits_to_keep" in accepted
        # Only columns are ever padded; a family without any (Mamba) takes a mask for that of its prompt.
        self._masks = "attention_mask" in accepted and any(
            isinstance(layer, library.CacheLayerMixin) for layer in self.new_cache().layers
        )

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    def new_cache(self) -> Any:
        return library.DynamicCache(config=self.config)

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def __call__(self, tokens: list[list[int]], cache: Any, positions: list[int], mask: Any) -> Any:
        """Logits [rows, vocabulary] after the last token of each row; the cache holds `tokens` afterwards.

        `tokens`: as many in each row. `positions`: of each row's first token. `mask` [rows, columns]: which columns of
        the cache, with these tokens, are a row's own.
        """
        ids = torch.tensor(tokens, device=self.device)
        arguments: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        if self._masks:
            arguments["attention_mask"] = mask
        if self._positions:
            first = torch.tensor(positions, device=self.device)
            arguments["position_ids"] = first[:, None] + torch.arange(ids.shape[1], device=self.device)
        if self._keeps:
            arguments["logits_to_keep"] = 1
        logits = self.model(input_ids=ids, **arguments).logits
        return logits[:, -1, : self.vocabulary].float()

    def extend(self, tokens: list[int], cache: Any, start: int) -> Any:
        """Logits [vocabulary] of one request after `tokens`, of which `start` are in its cache already."""
        mask = torch.ones((1, start + len(tokens)), dtype=torch.long, device=self.device)
        return self([tokens], cache, [start], mask)[0]
