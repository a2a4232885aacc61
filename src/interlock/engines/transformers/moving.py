"""A request's cache as bytes and back: safetensors, with everything that is no tensor in its header. No pickle anywhere.

What is in a cache is told by `snapshots.caches`, which knows every class of the library's. What comes back must be what this
model would have made: the same layers, dtypes and sizes (`Shapes`), or it is refused before a forward meets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from safetensors.torch import load, save

from interlock.engines.transformers.batch import cache_of
from interlock.engines.transformers.forward import Forward
from interlock.snapshots.caches import UnknownCacheError, dump_cache, load_cache

STRUCTURE = "structure"
Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Of each tensor in a cache: its sizes, 0 for the number of tokens, and its dtype."""


def shapes_of(cache: Any) -> Shapes:
    """What the tensors of such a cache look like, however many tokens it holds. Raises `UnknownCacheError`."""
    return {name: _shape(name, tensor) for name, tensor in dump_cache(cache)[0].items()}


def _shape(name: str, tensor: Any) -> tuple[tuple[int, ...], str]:
    sizes = list(tensor.shape)
    if name.endswith(("keys", "values")) and len(sizes) > 1:
        sizes[-2] = 0
    return tuple(sizes), str(tensor.dtype)


def cache_bytes(cache: Any, leave_out: Sequence[int] = ()) -> bytes:
    """A copy of the cache; the layers `leave_out` as if nothing were computed. Raises `UnknownCacheError`."""
    if leave_out:
        layers = list(cache.layers)
        for index in leave_out:
            layers[index] = type(layers[index])()
        cache = cache_of(layers)
    tensors, structure = dump_cache(cache)
    words = msgspec.json.encode(structure).decode()
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return bytes(save(copies, {STRUCTURE: words}))


def cache_from(data: bytes, forward: Forward, shapes: Shapes) -> Any:
    """Raises `ValueError` when `data` is no cache of this model."""
    try:
        tensors = load(data)
        cache = load_cache(_structure(data), tensors)
    except (ValueError, UnknownCacheError, msgspec.DecodeError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    except Exception as error:  # safetensors' own class is no ValueError
        raise ValueError(f"it is no safetensors: {error}") from error
    mine = [type(layer) for layer in forward.new_cache().layers]
    theirs = [type(layer) for layer in cache.layers]
    if mine != theirs:
        raise ValueError(f"it has {len(theirs)} layers of other kinds than this model's {len(mine)}")
    for name, tensor in tensors.items():
        found, expected = _shape(name, tensor), shapes.get(name)
        if found != expected:
            raise ValueError(f"its {name} is {found}, this model's is {expected}")
    return cache


def _structure(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    words = msgspec.json.decode(data[8 : 8 + size])["__metadata__"][STRUCTURE]
    return msgspec.json.decode(words, type=dict[str, Any])
