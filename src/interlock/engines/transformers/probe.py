"""What a model can do is asked of the model itself, at start: some tokens alone, in pieces, and in a batch.

There are two hundred families, each with its own masks and caches; a list of those that batch right would be wrong with the
next release of the library. What does not come out equal is not used: a model whose rows disturb each other decodes one
request at a time, one that cannot continue a prefill computes prompts whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import torch
import transformers.cache_utils as library

from interlock.engines.transformers.batch import BatchCache, batchable
from interlock.engines.transformers.forward import Forward, ModelRefused
from interlock.engines.transformers.moving import Shapes, shapes_of
from interlock.snapshots.caches import UnknownCacheError

SHORT, LONG = 5, 11
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits over the largest logit: float error of another order of additions."""
STATE_TOLERANCE = 1e-2
"""Of recurrent states, over the largest entry of each: a state that was lost differs by far more."""


class Nature(msgspec.Struct, frozen=True):
    """What was found."""

    batches: bool
    """Rows of different lengths decode together as they do alone."""
    continues: bool
    """A prompt may be computed in pieces."""
    cuttable: list[int]
    """Layers whose whole KV lies token by token: a prefix of it is the KV of the prefix."""
    layers: int
    """Layers of its cache; when all are cuttable, a request can begin from KV blocks alone."""

    token_bytes: int
    """Of one token's keys and values on this rank; windows are counted as if they held everything."""

    shapes: Shapes
    """Of its cache's tensors; empty where they cannot be told, and no request can be moved then."""

    @property
    def begins_from_blocks(self) -> bool:
        return self.continues and len(self.cuttable) == self.layers


@torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
def probe(forward: Forward) -> Nature:
    """Raises `ModelRefused` when it cannot even compute one token after another."""
    long, short = _tokens(forward, LONG), _tokens(forward, SHORT + 1)[1:]
    try:
        alone = [_follow(forward, prompt) for prompt in (long, short)]
    except Exception as error:
        raise ModelRefused(
            f"{type(forward.model).__name__} does not compute here: {type(error).__name__}: {error}"
        ) from error
    whole = forward.new_cache()
    last = forward.extend(long, whole, 0)
    if not hasattr(whole, "layers") or not len(whole.layers) or not torch.isfinite(last).all():
        raise ModelRefused(
            f"{type(forward.model).__name__} left nothing in its cache, or logits that are no numbers"
        )
    if not _equal(_interleaved(forward, [long, short]), alone):
        raise ModelRefused(
            f"{type(forward.model).__name__} keeps a request's state in its modules, where the next request overwrites it; "
            "serve it with another engine"
        )
    cuttable = [n for n, layer in enumerate(whole.layers) if type(layer) is library.DynamicLayer]
    return Nature(
        batches=batchable(whole) and _try(lambda: _equal(_together(forward, [long, short]), alone)),
        continues=_try(lambda: _continues(forward, long, whole, last)),
        cuttable=cuttable,
        layers=len(whole.layers),
        token_bytes=sum(_token_bytes(layer) for layer in whole.layers),
        shapes=_shapes(whole),
    )


def _token_bytes(layer: Any) -> int:
    held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return sum(t.element_size() * t[0, :, :1].numel() for t in held if t is not None and t.numel())


def _shapes(cache: Any) -> Shapes:
    try:
        return shapes_of(cache)
    except UnknownCacheError:
        return {}


def _tokens(forward: Forward, count: int) -> list[int]:
    step = max(1, forward.vocabulary // (2 * count))
    return [(7 + n * step) % forward.vocabulary for n in range(count)]


def _next(prompt: list[int], forward: Forward) -> int:
    return (prompt[0] + 3) % forward.vocabulary


def _follow(forward: Forward, prompt: list[int]) -> Any:
    cache = forward.new_cache()
    forward.extend(prompt, cache, 0)
    return forward.extend([_next(prompt, forward)], cache, len(prompt))


def _interleaved(forward: Forward, prompts: list[list[int]]) -> list[Any]:
    caches = [forward.new_cache() for _ in prompts]
    for cache, prompt in zip(caches, prompts, strict=True):
        forward.extend(prompt, cache, 0)
    return [forward.extend([_next(p, forward)], c, len(p)) for c, p in zip(caches, prompts, strict=True)]


def _together(forward: Forward, prompts: list[list[int]]) -> list[Any]:
    batch, arrivals = BatchCache(), []
    for index, prompt in enumerate(prompts):
        cache = forward.new_cache()
        forward.extend(prompt, cache, 0)
        arrivals.append((str(index), cache, len(prompt)))
    batch.reform(arrivals)
    tokens = [[_next(prompt, forward)] for prompt in prompts]
    return list(forward(tokens, batch.cache, batch.lengths, batch.mask(1, forward.device)))


def _continues(forward: Forward, prompt: list[int], whole: Any, last: Any) -> bool:
    """States are compared too: random weights may forget so quickly that logits do not show a lost state (Mamba's scan)."""
    cache = forward.new_cache()
    forward.extend(prompt[:4], cache, 0)
    logits = forward.extend(prompt[4:], cache, 4)
    pairs = [
        (a, b)
        for ours, theirs in zip(cache.layers, whole.layers, strict=True)
        for a, b in _states(ours, theirs)
    ]
    return _equal([logits], [last]) and all(
        bool((a - b).abs().max() <= STATE_TOLERANCE * b.abs().max()) for a, b in pairs
    )


def _states(ours: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    for name in ("conv_states", "recurrent_states"):
        for index, state in getattr(theirs, name, {}).items():
            if state is not None:
                yield getattr(ours, name)[index].float(), state.float()


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    tolerance = TOLERANCE.get(theirs[0].dtype, 1e-4)
    return all(
        bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))
        for a, b in zip(ours, theirs, strict=True)
    )


def _try(question: Any) -> bool:
    try:
        return bool(question())
    except Exception:
        return False
