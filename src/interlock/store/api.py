"""The store for programs: put and get blocks of KV cache (or of anything of fixed size) as NumPy arrays or torch tensors.

    with Store.open("unix:/run/user/1000/interlock/store.sock", layout) as store:
        keys = chain_keys(token_ids, layout.block_tokens, salt)
        store.put(keys, blocks)                  # one array a block, or one array whose first axis counts blocks
        found = store.get(keys)                  # the longest prefix that is there, verified

A `Store` is the one rank and the scheduler of an engine of its own: a put is a write session like any engine's, joined,
checked and published by the node, and what this process leaves behind in a crash is freed at its proven exit. Bytes move
by one copy between the caller's memory and the slab; the node is asked twice a put and once a get, whatever the batch.

Every call ends by its deadline. Errors are typed: `StoreAway` (no answer; retryable; after a few in a row the breaker
answers at once), `StoreRefused` (the node says no, with `code`), `LocalProtocolError` (arrays that do not fit the layout).
A block that fails its check is a miss, never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import msgspec
import numpy as np

from interlock.core import limits
from interlock.core.errors import LocalProtocolError
from interlock.core.layouts import KVLayout, Shard
from interlock.core.prefixes import KEY_BYTES
from interlock.host.blocking import BlockingHost
from interlock.host.threads import Lock, monotonic_s
from interlock.store.asking import Asker, StoreAway, StoreError, StoreRefused
from interlock.store.buffers import Array, Bytes, Parts, bytes_of, split
from interlock.store.checksums import verify_block
from interlock.store.copying import SlotCopier, by_two, copy_and_check
from interlock.store.keeper import Link
from interlock.store.putting import Putter
from interlock.wire.identity import Identity, passing_identity
from interlock.wire.locations import Location
from interlock.wire.store_messages import (
    Attach,
    Clear,
    Done,
    GetStats,
    Match,
    Matched,
    Pin,
    Remove,
    StartWrite,
    Stats,
    Unpin,
    Withdraw,
)

SECONDS_DEFAULT = 5.0
SESSION_BYTES_MAX = 256 * 1024 * 1024
"""One write session of a put: a larger batch is cut, so that it never waits for more of the slab than that at a time."""
SESSION_BLOCKS_MAX = 1024


class PutResult(msgspec.Struct, frozen=True):
    """What became of the keys of a put: all of them are counted once."""

    stored: int
    """Written and published by this put."""
    present: int
    """There already."""
    under_way: int
    """Being written by somebody else, and left to him."""
    left: int
    """Not stored: no room, a tenant's quota, or `no_store`."""


class Pinned(msgspec.Struct, frozen=True):
    """A pin that holds: `blocks` of the longest prefix. Ends at its deadline, by `Store.unpin`, or with this process."""

    name: str
    blocks: int


class Store:
    """One process's access to a store node, for blocks of one layout. Thread-safe. Make it with `open`; `close` it."""

    def __init__(
        self,
        address: str,
        me: Identity,
        layout: KVLayout,
        *,
        token: bytes,
        tenant: str,
        no_store: bool,
        verify: bool,
    ) -> None:
        shard = Shard(0, layout.layers, 0, layout.heads)
        attach = Attach(me.name, me.incarnation, 0, 1, layout, shard, writes=not no_store, leads=not no_store)
        self.layout, self.tenant, self.no_store = layout, tenant, no_store
        self._verify = verify
        self._lock = Lock()
        self._serial = 0
        self._node = Asker(address, me, attach, token)
        self._keeper = self._node.keeper
        self._putter = Putter(self._node, layout, verify=verify)

    @classmethod
    def open(
        cls,
        address: str,
        layout: KVLayout,
        *,
        name: str = "program",
        token: bytes = b"",
        tenant: str = "",
        no_store: bool = False,
        verify: bool = True,
        timeout_s: float = SECONDS_DEFAULT,
    ) -> Store:
        """Attached to the node at `address`. Raises `StoreAway` with the reason when that took longer than `timeout_s`.

        `tenant`: whose quota puts count against. `no_store`: only read; the slab is mapped read-only and a put stores
        nothing. `verify=False` neither makes nor looks at checksums: for measurements. What it stores is a miss to others.
        """
        store = cls(
            address,
            passing_identity(BlockingHost(), name),
            layout,
            token=token,
            tenant=tenant,
            no_store=no_store,
            verify=verify,
        )
        if not store._keeper.wait_ready(timeout_s):
            why = store._keeper.last_error
            store.close()
            raise StoreAway(f"no store at {address}: {why}", retryable=True)
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Pins end with the process, or at their deadline. Idempotent."""
        self._keeper.close()

    def wait_warm(self, timeout_s: float) -> bool:
        """Whether all of the slab is mapped into this process within `timeout_s`, so that no copy meets a page fault.

        It is done in the background from `open` on, a second for some ten gigabytes, and nothing needs to wait for it.
        """
        return self._node.link().rank_slab.warm.wait(timeout_s)

    def counts(self) -> dict[str, int]:
        """How often what happened here since `open`: `bad_blocks`, `link_broken`, `breaker_open`, …"""
        return self._node.counts()

    # --- writing -------------------------------------------------------------------------------------------------

    def put(
        self,
        keys: Sequence[bytes],
        arrays: Array | Sequence[Array],
        *,
        parent: bytes = b"",
        tenant: str | None = None,
        no_store: bool = False,
        wait_s: float = 0.0,
        timeout_s: float = SECONDS_DEFAULT,
    ) -> PutResult:
        """Stores the blocks of a chain that are missing. When it returns, `stored` blocks can be read by everybody.

        `keys[i]` is the child of `keys[i-1]`, the first that of `parent`. `arrays`: one of the layout's `block_bytes`
        each, `[head][layer][token][content]`, or one array of all. `wait_s`: how long to wait for keys that another is
        writing. Raises `StoreError`, `LocalProtocolError`.
        """
        deadline_s = monotonic_s() + timeout_s
        parts = split(arrays, len(keys), self.layout.block_bytes)
        _check_keys([*keys, *([parent] if parent else [])])
        if self.no_store or no_store:
            self._node.count("no_store_blocks", len(keys))
            return PutResult(0, 0, 0, len(keys))
        whose = self.tenant if tenant is None else tenant
        parents = [parent, *keys[:-1]]
        stored = present = under_way = 0
        step = max(1, min(SESSION_BLOCKS_MAX, SESSION_BYTES_MAX // self.layout.block_bytes))
        for start in range(0, len(keys), step):
            part = slice(start, start + step)
            message = StartWrite(self._session(), 1, list(keys[part]), parents[part], whose, wait_s)
            link, begun = self._putter.begin(message, deadline_s)
            if begun is None:
                break
            stored += self._putter.write(link, message, begun.grants, parts[part], deadline_s)
            present += begun.present
            under_way += begun.under_way
            if len(begun.grants) + begun.present + begun.under_way < len(message.keys):
                break  # there was no room for the rest, and what comes after it hangs on it
        return PutResult(stored, present, under_way, len(keys) - stored - present - under_way)

    # --- reading -------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes], *, timeout_s: float = SECONDS_DEFAULT) -> int:
        """How many of the first `keys` can be read now."""
        return len(self._match(keys, monotonic_s() + timeout_s)[1])

    def get(
        self,
        keys: Sequence[bytes],
        out: Array | Sequence[Array] | None = None,
        *,
        timeout_s: float = SECONDS_DEFAULT,
    ) -> Bytes:
        """The blocks of the longest prefix of `keys`, as bytes `[found, block_bytes]` of the caller's own, verified.

        `out`: memory for them, one writable array a key or one of all; then the number of blocks counts and the answer
        is a view of nothing (`[found, 0]`): what lies in `out` beyond `found` means nothing. Raises `StoreError`.
        """
        deadline_s = monotonic_s() + timeout_s
        link, locations = self._match(keys, deadline_s)
        size = self.layout.block_bytes
        if out is None:
            made = np.empty((len(locations), size), dtype=np.uint8)
            found = self._read(link, keys, locations, made)
            return made[:found]
        parts = split(out, len(keys), size, writable=True)
        found = self._read(link, keys, locations, parts)
        return np.empty((found, 0), dtype=np.uint8)

    def _match(self, keys: Sequence[bytes], deadline_s: float) -> tuple[Link, Sequence[Location]]:
        _check_keys(keys)
        link = self._node.link()
        found: Sequence[Location] = []
        for start in range(0, len(keys), limits.BLOCKS_PER_CALL_MAX):
            asked = list(keys[start : start + limits.BLOCKS_PER_CALL_MAX])
            answer = self._node.ask(link, Match(asked), Matched, deadline_s)
            if answer.slab != link.slab:
                raise StoreAway("the store was restarted during a look-up", retryable=True)
            part = answer.locations
            found = [*found, *part] if found else part
            if len(part) < len(asked):
                break
        return link, found

    def _read(self, link: Link, keys: Sequence[bytes], locations: Sequence[Location], parts: Parts) -> int:
        """Copies, then checks the copy; the number of blocks before the first that is not what was saved."""
        slab = link.rank_slab
        copier = SlotCopier(slab)
        slots = [location.slot for location in locations]
        bad: list[int] = []

        def fetch(some: range) -> None:
            copier.get(slots[some.start : some.stop], parts, some)

        def check(some: range) -> None:
            for i in some if not bad else ():
                found, binding = locations[i], slab.binding(keys[i], slots[i])
                if not verify_block(binding, self.layout, parts[i].data, found.checksums, cuts=found.cuts):
                    bad.append(i)
                    return

        if self._verify:
            copy_and_check(len(slots), self.layout.block_bytes, fetch, check, copied_first=True)
        else:
            by_two(len(slots), self.layout.block_bytes, fetch)
        for i in bad:
            self._node.count("bad_blocks")
            self._keeper.promise(link.slab, Withdraw([keys[i]], [slots[i]]))
        return min(bad, default=len(slots))

    # --- the rest ------------------------------------------------------------------------------------------------

    def pin(
        self, keys: Sequence[bytes], seconds: float, *, name: str = "", timeout_s: float = SECONDS_DEFAULT
    ) -> Pinned:
        """Keeps the longest prefix of `keys` from being evicted for so long. A pin of the same name is replaced."""
        _check_keys(keys)
        label = name or self._session()
        done = self._node.say(Pin(label, list(keys), seconds), Done, timeout_s)
        return Pinned(label, done.count)

    def unpin(self, pin: Pinned, *, timeout_s: float = SECONDS_DEFAULT) -> int:
        """How many blocks it held to the end; 0 when it had ended."""
        return self._node.say(Unpin(pin.name), Done, timeout_s).count

    def remove(
        self,
        keys: Sequence[bytes] = (),
        *,
        tenant: str | None = None,
        prefix: str = "",
        timeout_s: float = SECONDS_DEFAULT,
    ) -> int:
        """Forgets these blocks, or all of a tenant, or all whose key begins with these hex digits; how many there were.

        All but single keys leave the node's peers, too, and do not come back from one that is away. Raises `StoreAway` naming
        the nodes that have not carried it out yet; they will, by themselves.
        """
        _check_keys(keys)
        done = self._node.say(Remove(tenant, prefix, list(keys)), Done, timeout_s)
        if done.missed:
            raise StoreAway(
                f"removed, but not yet at {', '.join(done.missed)}: away, or their disks did not let it through",
                retryable=True,
                hint="nothing of it is served or comes back; they carry it out when they can, and a second call tells whether they did",
            )
        return done.count

    def clear(self, *, timeout_s: float = SECONDS_DEFAULT) -> int:
        """Forgets every block that was published before; how many."""
        return self._node.say(Clear(), Done, timeout_s).count

    def stats(self, *, timeout_s: float = SECONDS_DEFAULT) -> dict[str, float]:
        """The node's counters and gauges by metric name."""
        return dict(self._node.say(GetStats(), Stats, timeout_s).values)

    # --- inside --------------------------------------------------------------------------------------------------

    def _session(self) -> str:
        with self._lock:
            self._serial += 1
            return f"put-{self._serial}"


def _check_keys(keys: Sequence[bytes]) -> None:
    if any(not isinstance(key, bytes) or len(key) != KEY_BYTES for key in keys):
        raise LocalProtocolError(
            f"a block's key is {KEY_BYTES} bytes", hint="core.prefixes.chain_keys makes them"
        )


__all__ = ["Pinned", "PutResult", "Store", "StoreAway", "StoreError", "StoreRefused", "bytes_of"]
