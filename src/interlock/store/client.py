"""The store as vLLM's scheduler and workers see it: synchronous, bounded waits, and no exception ever.

One `StoreClient` a process and role. It holds one connection, kept by a thread of its own (the *keeper*): that thread
connects, attaches, attaches again when the node was restarted (with its new slab), and delivers what must not be lost
(reports, aborts, withdrawals) until the node has acknowledged it. The engine's threads never connect and never wait
longer than the limit they are given: whatever goes wrong is a miss, and `counts()` says which reason.

Why reports are kept and repeated: a report is this process's promise not to touch the slots again. One that is lost
costs its slots until this process exits (`store/node`: quarantine ends by a report or by a proven exit alone).

Memory. `slab_of(slab)` gives the mapping of exactly that slab, or None. Whoever holds the `MappedSlab` (or a tensor
over it) keeps it mapped; when the node was restarted the client lets go of the old one, and the last user unmaps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from interlock.core import limits
from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.packed_sums import pack_sums
from interlock.host.threads import Lock, monotonic_s
from interlock.store.breaker import Breaker
from interlock.store.keeper import Keeper, Link, Silence
from interlock.store.mapping import MappedSlab
from interlock.wire.identity import Identity
from interlock.wire.locations import Location
from interlock.wire.store_messages import (
    AbortWrite,
    Attach,
    Grant,
    Match,
    Matched,
    Report,
    StartWrite,
    Withdraw,
    WriteStarted,
)


class MatchResult(msgspec.Struct, frozen=True):
    """The first `len(locations)` of the asked keys can be read from slab `slab`. Goes to the ranks as it is."""

    slab: int
    locations: Sequence[Location]
    coming: int = 0
    """So many keys after them are on their way from disk; ask again in some milliseconds."""


class WriteGrant(msgspec.Struct, frozen=True):
    """A write session begun: which of the asked keys to write where. Goes to every rank as it is.

    Every rank of the engine reports each grant exactly once, also when it writes nothing of it or failed.
    `grants` empty: nothing to write, no session was begun, nobody reports.
    """

    session: str
    attempt: int
    node_incarnation: int
    slab: int
    grants: list[Grant]


class StoreClient:
    """One process's access to its machine's store node. Thread-safe.

    `attach` says who this is: `Attach(engine, engine_incarnation, rank (None: scheduler), ranks, layout, shard)`.
    Nothing is connected until `start()` or the first call. `close()` ends the keeper and the connection; promises not
    yet delivered are given `limits.REPORT_RETRY_SECONDS` to go out, then the process's exit is their proof.
    """

    def __init__(
        self,
        address: str,
        me: Identity,
        attach: Attach,
        *,
        token: bytes = b"",
        tenant: str = "",
        lookup_timeout_s: float = limits.STORE_LOOKUP_SECONDS_MAX,
    ) -> None:
        self._keeper = Keeper(address, me, attach, token, self._count)
        self._tenant = tenant
        self._lookup_timeout_s = lookup_timeout_s
        self._lock = Lock()
        self._breaker = Breaker()
        self._silence = Silence()
        self._counts: Counter[str] = Counter()

    # --- state ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Wakes the keeper: it connects and attaches in the background. Idempotent, returns at once."""
        self._keeper.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether the node answered our attachment within `timeout_s`. For start-up and tests; starts the keeper."""
        return self._keeper.wait_ready(timeout_s)

    @property
    def ready(self) -> bool:
        """Whether we are attached now, as far as is known."""
        return self._keeper.link is not None

    @property
    def last_error(self) -> str:
        """Why we are not attached, as a sentence; empty when we are."""
        return "" if self.ready else self._keeper.last_error

    def counts(self) -> dict[str, int]:
        """How often what happened: `match_hit_blocks`, `match_miss_blocks`, `match_timeout`, `match_not_attached`,
        `match_breaker_open`, `start_write_refused_<code>`, `report_dropped_<reason>`, … since the start."""
        with self._lock:
            return dict(self._counts)

    # --- scheduler side ------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> MatchResult | None:
        """The longest prefix of `keys` that can be read, within `lookup_timeout_s`. None: unknown, treat as a miss.

        An empty `locations` is a known miss. More than `limits.BLOCKS_PER_CALL_MAX` keys are cut to that many.
        """
        asked = list(keys[: limits.BLOCKS_PER_CALL_MAX])
        link, answer = self._look_up("match", Match(asked))
        if link is None or not isinstance(answer, Matched) or answer.slab != link.slab:
            return None
        self._count("match_hit_blocks", len(answer.locations))
        self._count("match_miss_blocks", len(asked) - len(answer.locations))
        return MatchResult(answer.slab, answer.locations, answer.coming)

    @property
    def wants_tokens(self) -> bool:
        """Whether the node publishes the tokens of what is saved: `start_write` should be given them then."""
        link = self._keeper.link
        return link is not None and link.wants_tokens

    def start_write(
        self,
        session: str,
        attempt: int,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        *,
        tenant: str = "",
        tokens: Sequence[bytes] = (),
    ) -> WriteGrant | None:
        """Slots for those of `keys` that are neither stored nor under way, within `lookup_timeout_s`. None: save nothing.

        `parents[i]` is the key before `keys[i]` in its chain, b"" for a first block. `tenant` is whose quota they count
        against. `session` is unique in this
        engine's life. When no answer came in time, the session is ended at the node by itself (`never_given`), and a
        late answer is dropped: no rank may be told of it. `tokens[i]`: of block i, packed (`store.told_tokens`), where the
        node `wants_tokens`.
        """
        most = limits.BLOCKS_PER_CALL_MAX
        if sum(map(len, tokens[:most])) > limits.FRAME_BYTES_MAX // 2:
            tokens = ()  # the message would not leave, and the save matters more than who hears of its tokens
        message = StartWrite(
            session,
            attempt,
            list(keys[:most]),
            list(parents[:most]),
            tenant or self._tenant,
            tokens=list(tokens[:most]),
        )
        link, answer = self._look_up("start_write", message)
        if link is None:
            return None
        if isinstance(answer, WriteStarted) and answer.slab == link.slab:
            return WriteGrant(session, attempt, link.node_incarnation, answer.slab, answer.grants)
        if not isinstance(answer, ChannelFault):
            # The node may have given slots out in an answer that nobody hears any more.
            self._keeper.promise(link.slab, AbortWrite(session, attempt, never_given=True))
        return None

    def abort_write(self, session: str, attempt: int) -> None:
        """Nothing of this session is published from now on. Ranks that were told of it still report. Returns at once."""
        self._keeper.promise(self._keeper.last_slab, AbortWrite(session, attempt))

    # --- rank side -----------------------------------------------------------------------------------------------

    def slab_of(self, slab: int) -> MappedSlab | None:
        """The mapping of that slab, or None when it is not the one we are attached to (the node was restarted: a load
        is a miss, a save is reported bad). Hold the returned object as long as you touch its memory."""
        link = self._keeper.link
        if link is not None and link.mapped is not None and link.slab == slab:
            return link.mapped
        self._keeper.start()
        self._count("slab_unknown")
        return None

    def report(
        self, grant: WriteGrant, rank: int, good: Sequence[bool], checksums: Sequence[Sequence[int]]
    ) -> bool:
        """This rank will not touch the grant's slots again. Delivered in the background until acknowledged.

        `good[i]` and `checksums[i]` are of `grant.grants[i]`; `checksums[i]` has one value per head of our shard
        (`store.checksums`), [] where `good[i]` is false. A rank whose shard is empty reports `good` and `checksums` both
        empty. False: the node that granted it is gone, nobody waits for this report.
        """
        body = Report(
            grant.session,
            grant.attempt,
            rank,
            grant.node_incarnation,
            grant.slab,
            list(good),
            [pack_sums(sums) for sums in checksums],
        )
        return self._keeper.promise(grant.slab, body, grant.node_incarnation)

    # --- both ----------------------------------------------------------------------------------------------------

    def withdraw(self, slab: int, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        """These blocks failed their check at these slots: the node forgets them if they still stand there. At once."""
        if keys:
            self._keeper.promise(slab, Withdraw(list(keys), list(slots)))

    def wait_delivered(self, timeout_s: float) -> bool:
        """Whether all reports, aborts and withdrawals so far were acknowledged within `timeout_s`. For tests, shutdown."""
        return self._keeper.wait_delivered(timeout_s)

    def close(self) -> None:
        """Ends keeper and connections. Slots we were given and did not report on wait for this process's exit."""
        self._keeper.close()

    # --- inside --------------------------------------------------------------------------------------------------

    def _look_up(self, word: str, body: Match | StartWrite) -> tuple[Link | None, object]:
        """The link that was asked and its answer: a message, a `ChannelFault`, or None when there was none in time.

        No link: nothing was asked.
        """
        link = self._keeper.link
        if link is None:
            self._keeper.start()
            self._count(f"{word}_not_attached")
            return None, None
        with self._lock:
            admitted = self._breaker.admits(monotonic_s())
        if not admitted:
            self._count(f"{word}_breaker_open")
            return None, None
        answer: object = None
        try:
            answer = link.lookups.request(body, self._lookup_timeout_s)
        except ChannelFault as fault:
            self._count(f"{word}_refused_{fault.code}")
            answer = fault
        except TimeoutError as error:
            self._count(f"{word}_timeout")
            with self._lock:
                self._breaker.failed(monotonic_s())
                too_long = self._silence.is_too_long(link, monotonic_s())
            if too_long or link.lookups.closed is not None:
                self._keeper.broken(link, error)
            return link, None
        except (InterlockError, OSError, ValueError, msgspec.MsgspecError) as error:
            self._count(f"{word}_broken")
            self._keeper.broken(link, error)
            return link, None
        with self._lock:
            self._breaker.answered()
            self._silence.ended()
        return link, answer

    def _count(self, word: str, by: int = 1) -> None:
        with self._lock:
            self._counts[word] += by
