"""One write session of a put: slots asked for, bytes and checksums put into them, and the node told, whatever happens.

What is granted is a promise to report (core/sessions): a report that finds no ear is the keeper's to repeat until it is heard
or this process ends.
"""

from __future__ import annotations

from interlock.core import limits
from interlock.core.layouts import KVLayout
from interlock.core.packed_sums import SUM_BYTES, pack_sums
from interlock.host.threads import monotonic_s
from interlock.store.asking import Asker, StoreAway, StoreRefused
from interlock.store.buffers import Bytes, Parts
from interlock.store.checksums import block_checksums
from interlock.store.copying import SlotCopier, by_two, copy_and_check
from interlock.store.keeper import Link
from interlock.store.mapping import MappedSlab
from interlock.wire.store_messages import AbortWrite, Done, Grant, Report, StartWrite, WriteStarted


class Putter:
    """Writes blocks of one layout. `verify` false: no checksums are made, so others will not believe what is stored."""

    def __init__(self, node: Asker, layout: KVLayout, *, verify: bool) -> None:
        self._node, self._layout, self._verify = node, layout, verify
        self._none = bytes(SUM_BYTES * layout.heads * (len(layout.cuts) + 1))
        """Sums that no reader accepts."""

    def begin(self, message: StartWrite, deadline_s: float) -> tuple[Link, WriteStarted | None]:
        """None: there is no room, or none for that tenant."""
        link = self._node.link()
        try:
            return link, self._node.ask(link, message, WriteStarted, deadline_s, wait_s=message.wait_s)
        except StoreRefused as refused:
            if refused.code in ("store_full", "tenant_not_stored"):
                self._node.count(refused.code)
                return link, None
            raise
        except StoreAway:
            # The node may have given slots out in an answer that nobody hears any more.
            self._node.keeper.promise(
                link.slab, AbortWrite(message.session, message.attempt, never_given=True)
            )
            raise

    def write(
        self, link: Link, message: StartWrite, grants: list[Grant], parts: Parts, deadline_s: float
    ) -> int:
        """Copies and reports; how many blocks are published. Whatever happens, the node hears that we let go."""
        if not grants:
            return 0
        good, sums = [False] * len(grants), [b""] * len(grants)
        try:
            slab = link.rank_slab
            copier = SlotCopier(slab)
            indexes, slots = [grant.index for grant in grants], [grant.slot for grant in grants]

            def fill(some: range) -> None:
                copier.put(slots[some.start : some.stop], parts, indexes[some.start : some.stop])
                good[some.start : some.stop] = [True] * len(some)

            def sum_up(some: range) -> None:
                for i in some:
                    found = self._sums(slab, message.keys[indexes[i]], slots[i], parts[indexes[i]])
                    sums[i] = pack_sums(found)

            if self._verify:
                copy_and_check(len(grants), self._layout.block_bytes, fill, sum_up, copied_first=False)
            else:
                sums = [self._none] * len(grants)
                by_two(len(grants), self._layout.block_bytes, fill)
        finally:
            report = Report(message.session, message.attempt, 0, link.node_incarnation, link.slab, good, sums)
            done = self._deliver(link, report, deadline_s)
        if not done:
            raise StoreAway(
                "the node did not confirm a put in time; it will be told again until this process ends",
                retryable=True,
            )
        return sum(good)

    def _sums(self, slab: MappedSlab, key: bytes, slot: int, source: Bytes) -> list[int]:
        return block_checksums(slab.binding(key, slot), self._layout, source.data)

    def _deliver(self, link: Link, report: Report, deadline_s: float) -> bool:
        """A report is a promise: one that gets no answer is repeated by the keeper until it is heard."""
        try:
            self._node.ask(
                link, report, Done, max(deadline_s, monotonic_s() + limits.STORE_LOOKUP_SECONDS_MAX)
            )
        except StoreAway:
            self._node.keeper.promise(link.slab, report)
            return False
        return True
