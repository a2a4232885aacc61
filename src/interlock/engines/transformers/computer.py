"""One rank's model and caches: does what a command says, decides nothing. The same on every rank.

A request's cache is its own while its prompt is computed, and a row of the batch afterwards, where the model batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from interlock.engines.transformers.batch import BatchCache
from interlock.engines.transformers.forward import Forward
from interlock.engines.transformers.hooks import BlockWorker, Boundary, BoundaryHook, KVView
from interlock.engines.transformers.moving import cache_bytes, cache_from
from interlock.engines.transformers.plans import Chunk, Load, Put, Step
from interlock.engines.transformers.probe import Nature, probe

_log = logging.getLogger(__name__)


class View:
    """`hooks.KVView` over one request's own cache, or over its row."""

    def __init__(self, cache: Any, tokens: int, cuttable: Sequence[int]) -> None:
        self._cache, self.tokens, self._cuttable = cache, tokens, cuttable

    @property
    def layers(self) -> Sequence[int]:
        return self._cuttable

    def read(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= start < stop <= self.tokens:
            raise ValueError(f"tokens [{start}, {stop}) are not among the {self.tokens} that are computed")
        held = self._cache.layers[layer]
        return held.keys[0, :, start:stop], held.values[0, :, start:stop]


class Computer:
    """Every request that has a cache on this rank, and the model."""

    def __init__(
        self,
        load_model: Callable[[str], Any],
        *,
        block_tokens: int,
        agree: Callable[[int], int] = int,
    ) -> None:
        """`load_model(path)` loads ("" names the checkpoint of the start). `agree`: the least of every rank's number.

        Raises `ModelRefused`, and whatever loading raises.
        """
        self._load_model, self._agree = load_model, agree
        self.block_tokens = block_tokens
        self.forward: Forward | None = Forward(load_model(""))
        self.nature: Nature = probe(self.forward)
        self.worker: BlockWorker | None = None
        self.boundary: BoundaryHook | None = None
        self._own: dict[str, Any] = {}
        self._tokens: dict[str, int] = {}
        self._prefix: dict[str, list[int]] = {}
        """Tokens computed of prompts, where boundaries are captured."""
        self._batch = BatchCache()
        self._shapes = _shapes(self.forward.model)

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, step: Step) -> dict[str, Any]:
        """Logits [vocabulary] of every request that the step asked an answer for."""
        if step.saves and self.worker is not None:
            views = self._views()
            for orders in step.saves:
                self.worker.save(orders, views)
        self.forget(step.drops)
        answers = {}
        salts = dict(step.boundaries)
        for chunk in step.chunks:
            logits = self._chunk(chunk)
            if chunk.key in salts:
                self._capture(chunk.key, salts[chunk.key])
            if chunk.answer:
                answers[chunk.key] = logits
        if step.decode:
            answers.update(self._decode(step.decode))
        return answers

    def empty_forward(self) -> None:
        """One forward of one token that belongs to nobody: what a rank without work does where others meet it in theirs."""
        self.model.extend([0], self.model.new_cache(), 0)

    @property
    def model(self) -> Forward:
        if self.forward is None:
            raise RuntimeError("a step was asked for while the weights are given up")
        return self.forward

    def _chunk(self, chunk: Chunk) -> Any:
        held = self._tokens.get(chunk.key, 0)
        if held != chunk.start:
            raise RuntimeError(f"{chunk.key} holds {held} tokens here, and its chunk begins at {chunk.start}")
        cache = self._own.get(chunk.key)
        if cache is None:
            cache = self._own[chunk.key] = self.model.new_cache()
        logits = self.model.extend(chunk.tokens, cache, held)
        self._tokens[chunk.key] = held + len(chunk.tokens)
        if self.boundary is not None:
            self._prefix.setdefault(chunk.key, []).extend(chunk.tokens)
        return logits

    def _capture(self, key: str, salt: str) -> None:
        """Gives the boundary hook a copy of what cannot be cut, where it wants one."""
        boundary = Boundary(key, list(self._prefix[key]), salt)
        try:
            if self.boundary is not None and self.boundary.wants(boundary):
                self.boundary.captured(boundary, cache_bytes(self._own[key], leave_out=self.nature.cuttable))
        except Exception:  # nobody needs it now; the request goes on
            _log.exception("the boundary after %d tokens could not be captured", len(boundary.tokens))

    def _decode(self, rows: Sequence[tuple[str, int]]) -> dict[str, Any]:
        if not self.nature.batches:
            return {key: self._one(key, token) for key, token in rows}
        wanted = dict(rows)
        self._regroup(wanted)
        keys = list(self._batch.keys)
        tokens = [[wanted.get(key, 0)] for key in keys]
        model = self.model
        logits = model(tokens, self._batch.cache, self._batch.lengths, self._batch.mask(1, model.device))
        self._batch.advanced()
        for key in wanted:
            self._tokens[key] += 1
        return {key: row for key, row in zip(keys, logits, strict=True) if key in wanted}

    def _one(self, key: str, token: int) -> Any:
        logits = self.model.extend([token], self._own[key], self._tokens[key])
        self._tokens[key] += 1
        return logits

    def _regroup(self, wanted: dict[str, int]) -> None:
        """The living rows of the batch become exactly those of `wanted`."""
        for key in self._batch.live:
            if key not in wanted:
                self._own[key] = self._restored(cache_bytes(self._batch.lone(key)))
                self._batch.bury(key)
        arrivals = [(key, self._own.pop(key), self._tokens[key]) for key in wanted if key in self._own]
        if arrivals:
            self._batch.join(arrivals)
        self._batch.trim()

    # --- requests come and go ------------------------------------------------------------------------------------

    def forget(self, keys: Sequence[str]) -> None:
        """Nothing of these requests is used again."""
        for key in keys:
            self._own.pop(key, None)
            self._tokens.pop(key, None)
            self._prefix.pop(key, None)
            if key in self._batch.keys:
                self._batch.bury(key)

    def load(self, load: Load) -> int:
        """Begins a request from a stored prefix; how many of its blocks were good on every rank."""
        try:
            good, parts, cache = self._stored(load)
        except (
            Exception
        ):  # a prefix is an offer: every rank must hear what came of it, and the engine goes on without
            _log.exception("a stored prefix of %d blocks cannot be used; it is computed", load.blocks)
            good, parts, cache = 0, [], None
        good = self._agree(good)
        if not good or (load.snapshot and good < load.blocks):
            return 0
        tokens = good * self.block_tokens
        for layer, (keys, values) in zip(self.nature.cuttable, parts, strict=False):
            held = cache.layers[layer]
            held.keys, held.values = keys[:, :, :tokens], values[:, :, :tokens]
            held.dtype, held.device, held.is_initialized = keys.dtype, keys.device, True
        self._own[load.key], self._tokens[load.key] = cache, tokens
        if self.boundary is not None:
            self._prefix[load.key] = load.tokens[:tokens]
        return good

    def _stored(self, load: Load) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor]], Any]:
        """(Good blocks, KV of the layers that can be cut, a cache with what the others are): what this rank can get."""
        good, parts = load.blocks, list[tuple[torch.Tensor, torch.Tensor]]()
        if self.nature.cuttable:  # a model without any has no blocks to get
            good, parts = self.worker.load(load.orders, load.blocks) if self.worker is not None else (0, [])
        if not load.snapshot:
            return good, parts, self.model.new_cache()
        found = self.boundary.find(load.tokens, load.salt, load.blocks) if self.boundary is not None else None
        if found is None or good < load.blocks:
            return 0, [], None
        return good, parts, self._restored(found)

    def _restored(self, data: bytes) -> Any:
        return cache_from(data, self.model, self.nature.shapes)

    def take(self, key: str) -> bytes:
        """This rank's cache of the request, which is forgotten; empty when it has none."""
        if key not in self._tokens:
            return b""
        cache = self._own.get(key) or self._batch.lone(key)
        data = cache_bytes(cache)
        self.forget([key])
        return data

    def put(self, put: Put, rank: int) -> None:
        """Raises `ValueError` when what this rank is given is no cache of this model."""
        cache = self._restored(put.caches[rank])
        for layer in self.nature.cuttable:
            held = cache.layers[layer].get_seq_length()
            if held != put.computed:
                raise ValueError(f"its layer {layer} holds {held} tokens, not {put.computed}")
        self._own[put.key], self._tokens[put.key] = cache, put.computed

    def _views(self) -> dict[str, KVView]:
        views: dict[str, KVView] = {}
        for key, tokens in self._tokens.items():
            cache = self._own.get(key) or self._batch.lone(key)
            views[key] = View(cache, tokens, self.nature.cuttable)
        return views

    # --- weights -------------------------------------------------------------------------------------------------

    def update(self, path: str, drop_caches: bool) -> None:
        """Other weights of the same architecture. The old ones stay until the new ones are whole: memory for both.

        Raises `ValueError` when the shapes differ, and whatever loading raises; the old weights are in place then.
        """
        fresh = Forward(self._load_model(path))
        differing = sorted(set(_shapes(fresh.model).items()) ^ set(self._shapes.items()))
        if differing:
            raise ValueError(
                f"the weights at {path or 'the start'} are of another architecture: {differing[0][0]} differs, "
                f"and {len(differing) - 1} more"
            )
        self.forward = fresh
        if drop_caches:
            self.forget(list(self._tokens))

    def release(self) -> None:
        """Gives up weights and caches."""
        self.forget(list(self._tokens))
        self.forward = None


def _shapes(model: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()}
