"""Which tokens a KV block stands for (keys), and which published blocks form the longest prefix of a prompt (index).

What can go wrong. A block is reused where *anything* it depends on differs: other tokens before it, other weights, an
other dtype or layout, another adapter, another image, another tenant. Every such case is a wrong token with a valid
checksum, so all of it goes into the key, and the encoding is injective: each field carries its length, so that no two
different salts or chains make the same bytes (a key of concatenated strings does: ("ab", "c") and ("a", "bc")).

A key is blake2b(parent key, token ids, salt): it stands for the whole prefix up to and including its block. Keys are
computed over full blocks only. The tensor-parallel degree is not part of it (`core/layouts`: blocks have one canonical
layout). vLLM's own block hashes are not used: their seed is random per process.

The index is a plain mutable table, tested against a slow model. It moves no bytes and knows no time.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import cast

import msgspec

from interlock.core.packed_sums import unpack_sums

KEY_BYTES = 32
NO_PARENT = b""
"""What stands for the parent of a chain's first block."""


class KeySalt(msgspec.Struct, frozen=True, kw_only=True):
    """All that the contents of a KV block depend on besides the tokens up to its end.

    Strings are compared as they are. `layout_digest` is `KVLayout.digest()`; `extra` holds (name, value) pairs for what
    has no field yet, in the caller's order.
    """

    model: str
    """Path or hub name, with the revision: whatever names these weights at start."""
    weights_version: str = ""
    """The fleet's weights version (RL updates); requests that lived through a change save nothing (hazards W4)."""
    dtype: str
    layout_digest: bytes
    lora: str = ""
    tenant: str = ""
    multimodal: tuple[str, ...] = ()
    """Hashes of images, audio, … that stand in the prompt, in order."""
    extra: tuple[tuple[str, str], ...] = ()

    def digest(self) -> bytes:
        """32 bytes, equal for equal salts and (up to a collision of blake2b) for no others."""
        hasher = hashlib.blake2b(digest_size=KEY_BYTES, person=b"interlock-salt")
        for field in (
            self.model,
            self.weights_version,
            self.dtype,
            self.layout_digest,
            self.lora,
            self.tenant,
        ):
            hasher.update(_counted(field))
        for group in (self.multimodal, tuple(part for pair in self.extra for part in pair)):
            hasher.update(len(group).to_bytes(8, "little"))
            for part in group:
                hasher.update(_counted(part))
        return hasher.digest()


def _counted(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(8, "little") + data


def chain_keys(
    token_ids: Sequence[int], block_tokens: int, salt: KeySalt | bytes, *, parent: bytes = NO_PARENT
) -> list[bytes]:
    """Keys of the full blocks of `token_ids`, each chained to the one before; the rest (< one block) has no key.

    To go on where a chain ended, pass the last key as `parent` and only the tokens after it. `salt` may be a digest
    computed once. Raises `ValueError` for a block size below 1, a parent that is no key, or an id that is no token
    (negative or above 2**32 - 1).
    """
    if block_tokens < 1:
        raise ValueError(f"a block of {block_tokens} tokens holds nothing; use at least 1")
    if parent and len(parent) != KEY_BYTES:
        raise ValueError(f"a parent key has {KEY_BYTES} bytes, not {len(parent)}")
    digest = salt.digest() if isinstance(salt, KeySalt) else salt
    if len(digest) != KEY_BYTES:
        raise ValueError(f"a salt's digest has {KEY_BYTES} bytes, not {len(digest)}")
    full = len(token_ids) // block_tokens * block_tokens
    try:
        words = array("I", token_ids[:full])
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids are integers from 0 to 2**32 - 1: {error}") from error
    # salt and block size are the same for all, so they are hashed once; the parent's length is told by its first byte.
    seeded = hashlib.blake2b(digest_size=KEY_BYTES, person=b"interlock-block")
    seeded.update(digest)
    seeded.update(block_tokens.to_bytes(8, "little"))
    keys = []
    data = memoryview(words.tobytes())
    step = block_tokens * words.itemsize
    for start in range(0, len(data), step):
        hasher = seeded.copy()
        hasher.update(b"\x01" + parent if parent else b"\x00")
        hasher.update(data[start : start + step])
        parent = hasher.digest()
        keys.append(parent)
    return keys


class Block(msgspec.Struct, frozen=True, gc=False):
    """A published block. There are millions, and none is part of a cycle: the garbage collector need not walk them. `layout` and `slot` are the owner's words for where it lies, `sums` the checksums of all its heads, packed (core/packed_sums)."""

    key: bytes
    parent: bytes
    layout: int
    slot: int
    sums: bytes
    tenant: str = ""
    """For whom it was saved; counts against that tenant's quota."""

    @property
    def checksums(self) -> tuple[int, ...]:
        """One unsigned 64-bit number for each (layer group, head), groups outermost."""
        return unpack_sums(self.sums)


_KEYS_AT_ONCE = 64
"""Looked up in one sweep without a question in between, which takes a third off a long prefix and costs a miss little."""


class PrefixIndex:
    """Published blocks by key. Which of them have children that stay is `core/eviction`'s to know."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: object) -> bool:
        return key in self._blocks

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    def get(self, key: bytes) -> Block | None:
        return self._blocks.get(key)

    def add(self, block: Block) -> None:
        """Raises `KeyError` when a block of that key is there: whoever publishes asks first."""
        if block.key in self._blocks:
            raise KeyError(f"a block with key {block.key.hex()[:12]} is published already")
        self._blocks[block.key] = block

    def remove(self, key: bytes) -> Block:
        """Raises `KeyError` when it is not there. Its children stay; no prefix reaches them until it is back."""
        return self._blocks.pop(key)

    def longest_prefix(self, keys: Sequence[bytes]) -> list[Block]:
        """The blocks of the first keys, up to the first that is not here."""
        found: list[Block] = []
        for at in range(0, len(keys), _KEYS_AT_ONCE):
            some = list(map(self._blocks.get, keys[at : at + _KEYS_AT_ONCE]))
            if not all(some):
                some = some[: some.index(None)]
            found += cast("list[Block]", some)
            if len(some) < _KEYS_AT_ONCE:
                break
        return found
