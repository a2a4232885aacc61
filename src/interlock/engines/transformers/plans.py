"""What rank 0 tells every rank to do, in words that travel as msgpack: one command at a time, each answered before the next.

Every rank keeps the same requests in the same order, so a command needs to name only what changes. No command carries
logits or KV: each rank has its own.
"""

from __future__ import annotations

import msgspec


class Command(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What rank 0 tells the other ranks to do; what has fields they do not know is refused."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Prompt tokens [start, start + len(tokens)) of one request. With `answer` its last logits are wanted."""

    key: str
    start: int
    tokens: list[int]
    answer: bool


class Step(Command, frozen=True):
    """One engine step, in this order: saves, drops, chunks, decode.

    `saves` are the store's orders for blocks that the step before completed. `drops` ends requests: nothing of theirs
    is left on any rank. `decode` are (key, last token) of every request that is past its prompt.
    """

    saves: list[bytes] = []
    drops: list[str] = []
    chunks: list[Chunk] = []
    boundaries: list[tuple[str, str]] = []
    """Of the chunks' requests, those whose chunk ends on a block boundary that may be captured: (key, salt)."""
    decode: list[tuple[str, int]] = []


class Open(Command, frozen=True):
    """Open the store's hooks by what rank 0 prepared; once, before the first step."""

    access: bytes


class Load(Command, frozen=True):
    """Begin `key` from a stored prefix of at most `blocks` blocks, got by `orders`; answered by how many were good.

    `tokens` are those blocks' tokens; `snapshot`: layers that cannot be cut are taken from a snapshot at exactly there.
    """

    key: str
    blocks: int
    orders: bytes
    tokens: list[int]
    salt: str
    snapshot: bool = False


class Take(Command, frozen=True):
    """Hand out the cache of `key` and forget it; a key without a cache hands out nothing."""

    key: str


class Put(Command, frozen=True):
    """Take over a cache of `computed` tokens: for each rank what `Take` handed out."""

    key: str
    computed: int
    caches: list[bytes]


class Update(Command, frozen=True):
    """Weights from the checkpoint directory `path` (empty: those of the start). With `drop_caches` every cache goes."""

    path: str
    drop_caches: bool


class Release(Command, frozen=True):
    """Give up weights and caches (suspend); the next `Update` brings them back."""


class Leave(Command, frozen=True):
    """End this rank."""


AnyCommand = Step | Open | Load | Take | Put | Update | Release | Leave

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyCommand)


def encode(command: AnyCommand) -> bytes:
    """One command, as it is sent from rank to rank."""
    return _encoder.encode(command)


def decode(data: bytes) -> AnyCommand:
    """Raises `msgspec.MsgspecError` for what is no command."""
    return _decoder.decode(data)


class Moved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payload of a `RequestState`: what besides prompt and tokens it takes to go on."""

    computed: int
    """Tokens whose KV the caches hold."""
    cached_tokens: int
    generator: bytes
    mixed: bool
    """Lived through a change of weights: saves no block."""
    caches: list[bytes]
    """One a rank, as `cache_bytes` makes them; empty before the first step."""
