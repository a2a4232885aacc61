"""The store for asynchronous programs: every call of `store/api.Store` as a coroutine.

Copies and checksums take longer than a loop can spare, so each call runs in a thread of the host's bounded pool. A
cancelled call goes on in its thread until its deadline at the latest; until then it may still write into `out`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from interlock.core.layouts import KVLayout
from interlock.host.base import Host
from interlock.host.real import RealHost
from interlock.store.api import Pinned, PutResult, Store
from interlock.store.buffers import Array, Bytes

P = ParamSpec("P")
T = TypeVar("T")


class AsyncStore:
    """Arguments, results and errors are those of `Store`."""

    def __init__(self, host: Host, store: Store, *, close_host: Callable[[], None] | None = None) -> None:
        self._host, self._store, self._close_host = host, store, close_host

    @classmethod
    async def open(cls, address: str, layout: KVLayout, **options: Any) -> AsyncStore:
        """As `Store.open`."""
        host = RealHost()
        try:
            store = await host.in_thread(functools.partial(Store.open, address, layout, **options))
        except BaseException:
            host.close()
            raise
        return cls(host, store, close_host=host.close)

    async def __aenter__(self) -> AsyncStore:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As `Store.close`."""
        await self._host.in_thread(self._store.close)
        if self._close_host is not None:
            self._close_host()

    async def put(self, keys: Sequence[bytes], arrays: Array | Sequence[Array], **options: Any) -> PutResult:
        """As `Store.put`."""
        return await self._run(self._store.put, keys, arrays, **options)

    async def get(
        self, keys: Sequence[bytes], out: Array | Sequence[Array] | None = None, **options: Any
    ) -> Bytes:
        """As `Store.get`."""
        return await self._run(self._store.get, keys, out, **options)

    async def match(self, keys: Sequence[bytes], **options: Any) -> int:
        """As `Store.match`."""
        return await self._run(self._store.match, keys, **options)

    async def pin(self, keys: Sequence[bytes], seconds: float, **options: Any) -> Pinned:
        """As `Store.pin`."""
        return await self._run(self._store.pin, keys, seconds, **options)

    async def unpin(self, pin: Pinned, **options: Any) -> int:
        """As `Store.unpin`."""
        return await self._run(self._store.unpin, pin, **options)

    async def remove(self, keys: Sequence[bytes] = (), **options: Any) -> int:
        """As `Store.remove`."""
        return await self._run(self._store.remove, keys, **options)

    async def clear(self, **options: Any) -> int:
        """As `Store.clear`."""
        return await self._run(self._store.clear, **options)

    async def stats(self, **options: Any) -> dict[str, float]:
        """As `Store.stats`."""
        return await self._run(self._store.stats, **options)

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._host.in_thread(functools.partial(call, *args, **kwargs))
