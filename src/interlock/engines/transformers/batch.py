"""The caches of all decoding requests as one cache of the library, right-aligned; rows come and go between steps.

          begin                      end          a row of T tokens stands in columns [end - T, end); what is before it
            |..........xxxxxxxxxxxxxxx|           is masked. So is the library's own batch, padded on the left: masks,
            |xxxxxxxxxxxxxxxxxxxxxxxxx|           sliding windows and recurrent layers need nothing special.
            |.....xxxxxxxxxxxxxxxxxxxx|

One decode step writes one column. Columns stand in storage with room to grow, so nothing is copied but when the room is
used up, when a row longer than all others comes, or (sliding windows) when the window has run through its room.
Recurrent states have no columns: rows are stacked.

A row whose request has ended stays, dead, until another takes its place: to make the batch anew costs a copy of it all.

Only layers whose class is known exactly are batched (`batchable`): a subclass may keep more than we would carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers.cache_utils as library

ROOM_COLUMNS = 256
"""Columns added at a time: a copy of the whole batch every so many steps."""


class _Columns:
    """Keys and values of one layer, rows by columns; the part of a batched attention layer that differs from the library's.

    `window`: how many columns are ever looked back on, or None. Never more than `span` columns are advertised, which is
    what the library's mask then covers.
    """

    keys: Any
    values: Any

    def begin_rows(self, window: int | None) -> None:
        self.window = window
        self.store_k: Any = None
        self.store_v: Any = None
        self.begin = self.end = 0
        self.length = 0
        self.is_initialized = True

    # --- what the library calls ----------------------------------------------------------------------------------

    def update(self, key_states: Any, value_states: Any, *_: object, **__: object) -> tuple[Any, Any]:
        """One more column for every row; returns all that a query may look at."""
        count = key_states.shape[-2]
        self._make_room(count)
        self.store_k[:, :, self.end : self.end + count] = key_states
        self.store_v[:, :, self.end : self.end + count] = value_states
        self.end += count
        self.length += count
        keys, values = self.visible()
        if self.window is not None:
            self.begin = max(self.begin, self.end - self.window + 1)
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.end - self.begin
        return held + query_length, self.length - held

    # --- rows ----------------------------------------------------------------------------------------------------

    def visible(self) -> tuple[Any, Any]:
        return self.store_k[:, :, self.begin : self.end], self.store_v[:, :, self.begin : self.end]

    def replace(self, rows: Sequence[tuple[Any, Any]], length: int) -> None:
        """Makes the layer anew of these rows ([1, heads, tokens, size], each with its last tokens), right-aligned."""
        held = length if self.window is None else min(length, self.window - 1)
        capacity = held + ROOM_COLUMNS
        for name, part in (("store_k", 0), ("store_v", 1)):
            like = rows[0][part]
            store = torch.zeros(
                (len(rows), like.shape[1], capacity, like.shape[3]), dtype=like.dtype, device=like.device
            )
            for index, row in enumerate(rows):
                tokens = min(row[part].shape[-2], held)
                if tokens:
                    store[index, :, held - tokens : held] = row[part][0, :, row[part].shape[-2] - tokens :]
            setattr(self, name, store)
        self.begin, self.end, self.length = 0, held, length

    def fill(self, index: int, keys: Any, values: Any) -> None:
        """Puts another request's tokens (no more than the layer's length) in the place of one row's."""
        tokens = min(keys.shape[-2], self.end - self.begin)
        self.store_k[index, :, self.end - tokens : self.end] = keys[0, :, keys.shape[-2] - tokens :]
        self.store_v[index, :, self.end - tokens : self.end] = values[0, :, values.shape[-2] - tokens :]

    def row(self, index: int, tokens: int) -> tuple[Any, Any]:
        """Views of one row's last `tokens` tokens, or of as many as are held."""
        first = max(self.begin, self.end - tokens)
        return (
            self.store_k[index : index + 1, :, first : self.end],
            self.store_v[index : index + 1, :, first : self.end],
        )

    def _make_room(self, count: int) -> None:
        if self.end + count <= self.store_k.shape[2]:
            return
        held = self.end - self.begin
        if self.window is not None and self.begin >= held + count:
            for store in (self.store_k, self.store_v):
                store[:, :, :held] = store[:, :, self.begin : self.end]
        else:
            for name in ("store_k", "store_v"):
                old = getattr(self, name)
                shape = (*old.shape[:2], held + count + ROOM_COLUMNS, old.shape[3])
                grown = torch.zeros(shape, dtype=old.dtype, device=old.device)
                grown[:, :, :held] = old[:, :, self.begin : self.end]
                setattr(self, name, grown)
        self.begin, self.end = 0, held


class _FullRows(_Columns, library.DynamicLayer): ...


class _SlidingRows(_Columns, library.DynamicSlidingWindowLayer): ...


class _HybridRows(_Columns, library.LinearAttentionAndFullAttentionLayer): ...


class _HybridSlidingRows(_Columns, library.LinearAttentionAndSlidingWindowAttentionLayer): ...


def _is_recurrent(layer: Any) -> bool:
    return isinstance(layer, library.LinearAttentionCacheLayerMixin)


def _has_columns(layer: Any) -> bool:
    return isinstance(layer, library.CacheLayerMixin)


KNOWN = {
    library.DynamicLayer,
    library.DynamicSlidingWindowLayer,
    library.LinearAttentionLayer,
    library.LinearAttentionAndFullAttentionLayer,
    library.LinearAttentionAndSlidingWindowAttentionLayer,
}


def batchable(cache: Any) -> bool:
    """Whether every layer is of a class whose rows can be joined and parted without loss."""
    return type(cache) is library.DynamicCache and all(type(layer) in KNOWN for layer in cache.layers)


def cache_of(layers: list[Any]) -> Any:
    """A `DynamicCache` of exactly these layers."""
    cache = library.DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache


DEAD = "\0"
"""In the place of a key: the row is nobody's."""


class BatchCache:
    """`cache` is what the model is given; `keys` name its rows, `lengths` count each row's tokens."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.lengths: list[int] = []
        self.cache: Any = None
        self.columns = 0
        """Tokens of the longest row there was since the batch was made."""

    @property
    def live(self) -> list[str]:
        return [key for key in self.keys if key != DEAD]

    def bury(self, key: str) -> None:
        """The row's request has ended. It goes on being computed, as one token, until the row is taken or the batch made anew."""
        index = self.keys.index(key)
        self.keys[index], self.lengths[index] = DEAD, 1
        if not self.live:
            self.reform([])

    def join(self, arrivals: Sequence[tuple[str, Any, int]]) -> None:
        """Takes in requests (key, its own cache, its tokens): in the place of dead rows if they fit, else by a new batch."""
        dead = [index for index, key in enumerate(self.keys) if key == DEAD]
        if len(arrivals) > len(dead) or any(tokens > self.columns for _, _, tokens in arrivals):
            self.reform(arrivals)
            return
        for index, (key, cache, tokens) in zip(dead, arrivals, strict=False):
            for layer, own in zip(self.cache.layers, cache.layers, strict=True):
                _fill_row(layer, index, own)
            self.keys[index], self.lengths[index] = key, tokens

    def trim(self) -> None:
        """Makes the batch anew where most of it is dead rows or columns that only the dead had."""
        longest = max((n for key, n in zip(self.keys, self.lengths, strict=True) if key != DEAD), default=0)
        if len(self.keys) > 2 * len(self.live) or self.columns > 2 * longest + ROOM_COLUMNS:
            self.reform([])

    def reform(self, arrivals: Sequence[tuple[str, Any, int]]) -> None:
        """A new batch of the living rows and the arrivals."""
        parts = [(key, self.lone(key), self.lengths[self.keys.index(key)]) for key in self.live]
        parts += arrivals
        self.keys = [key for key, _, _ in parts]
        self.lengths = [tokens for _, _, tokens in parts]
        self.columns = max(self.lengths, default=0)
        caches = [cache for _, cache, _ in parts]
        self.cache = _joined(caches, self.columns) if caches else None

    def advanced(self) -> None:
        """The forward has added a token to every row."""
        self.columns += 1
        self.lengths = [
            1 if key == DEAD else tokens + 1 for key, tokens in zip(self.keys, self.lengths, strict=True)
        ]

    def mask(self, query_tokens: int, device: Any) -> Any:
        """[rows, columns] of the step to come: which columns are a row's own."""
        columns = torch.arange(self.columns + query_tokens, device=device)
        starts = torch.tensor([self.columns - tokens for tokens in self.lengths], device=device)
        return (columns[None, :] >= starts[:, None]).long()

    def lone(self, key: str) -> Any:
        """One row as a cache of the library's own kind: views of the batch, to be copied before the next step."""
        index = self.keys.index(key)
        layers = [_row_of(layer, index, self.lengths[index]) for layer in self.cache.layers]
        return cache_of(layers)


def _joined(caches: Sequence[Any], length: int) -> Any:
    layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        first = parts[0]
        layer = _empty_rows(first)
        if _has_columns(first) and any(part.keys is not None for part in parts):
            layer.replace([(part.keys, part.values) for part in parts], length)
        if _is_recurrent(first):
            _stack_states(layer, parts)
        layers.append(layer)
    return cache_of(layers)


def _empty_rows(like: Any) -> Any:
    window = getattr(like, "sliding_window", None)
    if not _has_columns(like):
        return library.LinearAttentionLayer(number_of_states=like.number_of_states)
    if _is_recurrent(like):
        kwargs = {"number_of_states": like.number_of_states}
        layer: Any = _HybridSlidingRows(window, **kwargs) if window else _HybridRows(**kwargs)
    else:
        layer = _SlidingRows(window) if window else _FullRows()
    layer.begin_rows(window)
    return layer


def _stack_states(layer: Any, parts: Sequence[Any]) -> None:
    for name in ("conv_states", "recurrent_states"):
        for index, state in getattr(parts[0], name).items():
            if state is not None:
                getattr(layer, name)[index] = torch.cat([getattr(part, name)[index] for part in parts])
    _copy_flags(layer, parts[0])


def _fill_row(layer: Any, index: int, own: Any) -> None:
    if _has_columns(layer) and layer.store_k is not None:
        layer.fill(index, own.keys, own.values)
    if _is_recurrent(layer):
        for name in ("conv_states", "recurrent_states"):
            for state_index, state in getattr(layer, name).items():
                if state is not None:
                    state[index] = getattr(own, name)[state_index][0]


def _copy_flags(layer: Any, like: Any) -> None:
    for name in (
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "has_previous_state",
        "conv_kernel_size",
    ):
        setattr(layer, name, dict(getattr(like, name)))
    layer.device, layer.dtype = like.device, like.dtype


def _row_of(layer: Any, index: int, tokens: int) -> Any:
    """One row of a batched layer as the library's own layer."""
    window = getattr(layer, "window", None)
    if not _has_columns(layer):
        row: Any = library.LinearAttentionLayer(number_of_states=layer.number_of_states)
    elif _is_recurrent(layer):
        kwargs = {"number_of_states": layer.number_of_states}
        row = (
            library.LinearAttentionAndSlidingWindowAttentionLayer(window, **kwargs)
            if window
            else library.LinearAttentionAndFullAttentionLayer(**kwargs)
        )
    else:
        row = library.DynamicSlidingWindowLayer(window) if window else library.DynamicLayer()
    if _has_columns(layer) and layer.store_k is not None:
        row.keys, row.values = layer.row(index, tokens)
        row.dtype, row.device, row.is_initialized = row.keys.dtype, row.keys.device, True
        if window:
            row.cumulative_length = tokens
    if _is_recurrent(layer):
        for name in ("conv_states", "recurrent_states"):
            for state_index, state in getattr(layer, name).items():
                if state is not None:
                    getattr(row, name)[state_index] = state[index : index + 1]
        _copy_flags(row, layer)
    return row
