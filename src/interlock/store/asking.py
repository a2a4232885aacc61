"""One process's questions to the node, from any thread: who is attached, when to ask, and what a bad answer is called.

The keeper (store/keeper) holds the connection and repeats promises; here a question gets a deadline, the breaker sees how it
went, and whatever went wrong becomes one of three typed errors.
"""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import msgspec

from interlock.core import limits
from interlock.core.errors import ChannelFault, InterlockError, LocalProtocolError, RemoteProtocolError
from interlock.host.threads import Lock, monotonic_s
from interlock.store.breaker import Breaker
from interlock.store.keeper import Keeper, Link
from interlock.wire.identity import Identity
from interlock.wire.store_messages import Attach, Done, Matched, Stats, WriteStarted

Answer = TypeVar("Answer", Done, Matched, Stats, WriteStarted)


class StoreError(InterlockError):
    """What every call of `Store` may raise."""


class StoreAway(StoreError, ConnectionError):  # noqa: N818 - what is, not that it is wrong
    """No node answered in time. What was asked may have been done; nothing is held by it beyond this process's exit."""


class StoreRefused(StoreError):  # noqa: N818
    """The node will not. `code` is for programs."""

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message, retryable=retryable, code=code)
        self.code = code


class Asker:
    """Attached as `attach` says, once `keeper` managed to. Thread-safe."""

    def __init__(self, address: str, me: Identity, attach: Attach, token: bytes) -> None:
        self._address = address
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._breaker = Breaker()
        self.keeper = Keeper(address, me, attach, token, self.count)

    def counts(self) -> dict[str, int]:
        """How often what happened, by word, since the start."""
        with self._lock:
            return dict(self._counts)

    def link(self) -> Link:
        """Raises `StoreAway`, at once, while nobody is attached or the breaker is open."""
        link = self.keeper.link
        if link is None:
            self.keeper.start()
            self.count("not_attached")
            raise StoreAway(
                f"not attached to the store at {self._address}: {self.keeper.last_error}", retryable=True
            )
        with self._lock:
            if not self._breaker.admits(monotonic_s()):
                self._counts["breaker_open"] += 1
                raise StoreAway(
                    f"the store at {self._address} did not answer the last {limits.BREAKER_FAILURES_MAX} questions",
                    retryable=True,
                    hint=f"it is asked again every {limits.BREAKER_PROBE_SECONDS:.0f} s",
                )
        return link

    def say(self, body: msgspec.Struct, kind: type[Answer], timeout_s: float) -> Answer:
        return self.ask(self.link(), body, kind, monotonic_s() + timeout_s)

    def ask(
        self, link: Link, body: msgspec.Struct, kind: type[Answer], deadline_s: float, *, wait_s: float = 0.0
    ) -> Answer:
        """The node's answer. Raises `StoreAway`, `StoreRefused`, `RemoteProtocolError`."""
        word = type(body).__name__
        left_s = deadline_s + wait_s - monotonic_s()
        try:
            answer = link.lookups.request(body, max(0.0, left_s))
        except ChannelFault as fault:
            raise StoreRefused(fault.code, fault.message, retryable=fault.retryable) from fault
        except TimeoutError as error:
            with self._lock:
                self._breaker.failed(monotonic_s())
            if link.lookups.closed is not None:
                self.keeper.broken(link, error)
            raise StoreAway(f"the store did not answer {word} in time", retryable=True) from error
        except LocalProtocolError:
            raise
        except (InterlockError, OSError) as error:
            self.keeper.broken(link, error)
            raise StoreAway(
                f"the connection to the store broke during {word}: {error}", retryable=True
            ) from error
        with self._lock:
            self._breaker.answered()
        if not isinstance(answer, kind):
            raise RemoteProtocolError(f"the store answered {word} with {type(answer).__name__}")
        return answer

    def count(self, word: str, by: int = 1) -> None:
        with self._lock:
            self._counts[word] += by
