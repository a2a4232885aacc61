"""The caches of the Transformers library as (tensors, structure) and back, exact: dtypes, lengths, counters, nesting.

Classes are named by words of our own in tables below, so a file chooses among classes we know and never names one to import. A
layer comes back without its constructor: its attributes are exactly those that were dumped, each of a kind we know. A class that
is in no table is an error that names it. Layers of models' own modules are looked up where the program has imported that module.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LAYERS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "StaticIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
)
_MODEL_LAYERS = {
    "DeepseekV4HCACache": "transformers.models.deepseek_v4.modeling_deepseek_v4",
    "DeepseekV4CSACache": "transformers.models.deepseek_v4.modeling_deepseek_v4",
    "MiniMaxM3VLSparseCacheLayer": "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl",
    "MiniMaxM3VLSparseStaticCacheLayer": "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl",
}
_CACHES = ("Cache", "DynamicCache", "StaticCache", "MtpCache", "DFlashCache", "EncoderDecoderCache")
_MODEL_CACHES = {"MiniMaxCache": "transformers.models.minimax.modeling_minimax"}
DEPTH_MAX = 8
"""Nesting of values in one layer, and of caches in one another."""


class UnknownCacheError(TypeError):
    """A cache, or something in one, that is not known how to be kept."""


def dump_cache(cache: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The cache's tensors by name (not copied) and what is no tensor, for JSON. Raises `UnknownCacheError`."""
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _dump_object(cache, "", tensors, 0)


def load_cache(structure: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """A new cache that is what was dumped; it owns `tensors`. Raises `UnknownCacheError`, `ValueError`."""
    used: set[str] = set()
    cache = _load_value(structure, tensors, used, 0)
    if used != set(tensors):
        raise ValueError(f"tensors {sorted(set(tensors) - used)[:4]} belong to no layer of this cache")
    if _word_of(type(cache)) not in (*_CACHES, *_MODEL_CACHES):
        raise ValueError("what was kept is no cache")
    return cache


# --- classes ----------------------------------------------------------------------------------------------------------


def _class_of(word: str) -> type:
    """The class that `word` stands for in our tables."""
    import transformers.cache_utils as library

    if word in _LAYERS or word in _CACHES:
        found = getattr(library, word, None)
        if found is None:
            raise UnknownCacheError(f"the installed Transformers library has no {word}")
        return found  # type: ignore[no-any-return]
    home = _MODEL_LAYERS.get(word) or _MODEL_CACHES.get(word)
    if home is None:
        raise UnknownCacheError(f"{word!r} is no cache or layer that can be rebuilt")
    module = sys.modules.get(home)
    if module is None:
        raise UnknownCacheError(f"{word} belongs to {home}: load that model before its snapshots")
    return getattr(module, word)  # type: ignore[no-any-return]


def _word_of(kind: type) -> str | None:
    word = kind.__name__
    known = word in _LAYERS or word in _CACHES or word in _MODEL_LAYERS or word in _MODEL_CACHES
    if not known or not kind.__module__.startswith("transformers."):
        return None
    try:
        return word if _class_of(word) is kind else None
    except UnknownCacheError:
        return None


# --- values -----------------------------------------------------------------------------------------------------------


def _dump_object(thing: Any, name: str, tensors: dict[str, torch.Tensor], depth: int) -> dict[str, Any]:
    word = _word_of(type(thing))
    if word is None:
        raise UnknownCacheError(
            f"a {type(thing).__module__}.{type(thing).__qualname__} at {name or 'the top'} cannot be kept in a snapshot"
        )
    if vars(thing).get("offloading"):
        raise UnknownCacheError("a cache that is being offloaded cannot be kept; turn offloading off")
    held = {
        key: _dump_value(value, f"{name}.{key}", tensors, depth + 1) for key, value in vars(thing).items()
    }
    return {"object": word, "held": held}


def _dump_value(value: Any, name: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    import torch

    name = name.removeprefix(".")
    if depth > DEPTH_MAX:
        raise UnknownCacheError(f"{name} is nested deeper than {DEPTH_MAX}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        same = next((known for known, tensor in tensors.items() if tensor is value), None)
        if same is None:
            tensors[name] = value
        return {"tensor": same or name, "device": str(value.device)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list | tuple):
        inner = [_dump_value(each, f"{name}.{i}", tensors, depth + 1) for i, each in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": inner}
    if isinstance(value, dict):
        if not all(type(key) in (int, str) for key in value):
            raise UnknownCacheError(f"{name} has keys that are neither numbers nor words")
        return {"dict": [[k, _dump_value(v, f"{name}.{k}", tensors, depth + 1)] for k, v in value.items()]}
    if isinstance(value, type):
        word = _word_of(value)
        if word is None:
            raise UnknownCacheError(f"{name} names the class {value.__qualname__}, which is not known")
        return {"class": word}
    return _dump_object(value, name, tensors, depth)


def _load_value(told: Any, tensors: Mapping[str, torch.Tensor], used: set[str], depth: int) -> Any:
    import torch

    if depth > DEPTH_MAX:
        raise ValueError(f"the structure is nested deeper than {DEPTH_MAX}")
    if told is None or isinstance(told, bool | int | float | str):
        return told

    def inner(each: Any) -> Any:
        return _load_value(each, tensors, used, depth + 1)

    match told:
        case {"tensor": str(name), **rest} if name in tensors:
            used.add(name)
            wanted = str(rest.get("device", "cpu"))
            return tensors[name] if wanted == str(tensors[name].device) else tensors[name].to(_device(wanted))
        case {"dtype": str(word)} if isinstance(kind := getattr(torch, word, None), torch.dtype):
            return kind
        case {"device": str(word)}:
            return _device(word)
        case {"list": list(items)}:
            return [inner(each) for each in items]
        case {"tuple": list(items)}:
            return tuple(inner(each) for each in items)
        case {"dict": list(pairs)} if all(
            isinstance(p, list) and len(p) == 2 and type(p[0]) in (int, str) for p in pairs
        ):
            return {key: inner(value) for key, value in pairs}
        case {"class": str(word)}:
            return _class_of(word)
        case {"object": str(word), "held": dict(held)}:
            return _make(_class_of(word), {key: inner(value) for key, value in held.items()})
    raise ValueError(f"the structure names something that cannot be rebuilt: {str(told)[:80]}")


def _device(word: str) -> torch.device:
    """The device that it lay on, or the CPU where that one is not here."""
    import torch

    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise ValueError(f"{word!r} is no device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu")
    return device


def _make(kind: type, held: dict[str, Any]) -> Any:
    made: Any = object.__new__(kind)
    vars(made).update(held)
    return made
