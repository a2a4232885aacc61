"""One write session of a put: slots asked for, bytes and checksums put into them, and the node told, whatever happens.

What is granted is a promise to report (core/sessions): a report that finds no ear is the keeper's to repeat until it is heard
or this process ends.
"""

from __future__ import annotations

import numpy as np

from interlock.core import limits
from interlock.core.layouts import KVLayout
from interlock.host.threads import monotonic_s
from interlock.store.asking import Asker, StoreAway, StoreRefused
from interlock.store.buffers import Bytes
from interlock.store.checksums import block_checksums
from interlock.store.keeper import Link
from interlock.store.mapping import MappedSlab
from interlock.wire.store_messages import AbortWrite, Done, Grant, Report, StartWrite, WriteStarted


class Putter:
    """Writes blocks of one layout. `verify` false: no checksums are made, so others will not believe what is stored."""

    def __init__(self, node: Asker, layout: KVLayout, *, verify: bool) -> None:
        self._node, self._layout, self._verify = node, layout, verify

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
        self, link: Link, message: StartWrite, grants: list[Grant], parts: list[Bytes], deadline_s: float
    ) -> int:
        """Copies and reports; how many blocks are published. Whatever happens, the node hears that we let go."""
        if not grants:
            return 0
        good, sums = [False] * len(grants), [[] for _ in grants]  # type: list[bool], list[list[int]]
        try:
            slab = link.rank_slab
            memory = np.frombuffer(slab.view, dtype=np.uint8)
            for index, grant in enumerate(grants):
                source = parts[grant.index]
                at = slab.offset(grant.slot)
                memory[at : at + len(source)] = source
                sums[index] = self._sums(slab, message.keys[grant.index], grant.slot, source)
                good[index] = True
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
        if not self._verify:
            return [0] * (self._layout.heads * (len(self._layout.cuts) + 1))
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
