"""A copy of a node's index elsewhere, that is right or knows that it is not.

It follows the node's changes by number. After a gap (it was away too long, the node was restarted) it lists the blocks
page by page and then follows from the number that stood there at the first page: a change that a page showed already
is told again and changes nothing, because of each key only the last change counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from interlock.store.control import AsyncStoreClient


class IndexMirror:
    """Which blocks a node has, as far as change number `sequence` of slab `slab`."""

    def __init__(self, client: AsyncStoreClient) -> None:
        self._client = client
        self.parents: dict[bytes, bytes] = {}
        """Of every block that is there, by key."""
        self.slab = 0
        self.sequence = 0
        self.resyncs = 0
        self.on_change: Callable[[], None] = lambda: None

    def __contains__(self, key: object) -> bool:
        return key in self.parents

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of the first `keys` are there."""
        for index, key in enumerate(keys):
            if key not in self.parents:
                return index
        return len(keys)

    async def follow(self, wait_s: float) -> int:
        """Takes in what changed, waiting up to `wait_s` for something to; how many changes, or blocks after a gap.

        Raises what `AsyncStoreClient` raises; then nothing is lost: the next call goes on from where this one was.
        """
        heard = await self._client.watch(self.slab, self.sequence, wait_s)
        if heard.gap:
            await self._resync()
            return len(self.parents)
        for change in heard.changes:
            if change.medium != "CPU":
                continue
            if change.kind == "stored":
                self.parents[change.key] = change.parent
            else:
                self.parents.pop(change.key, None)
        self.sequence = heard.last
        if heard.changes:
            self.on_change()
        return len(heard.changes)

    async def _resync(self) -> None:
        page = await self._client.page()
        slab, sequence = page.slab, page.sequence
        parents = {block.key: block.parent for block in page.blocks}
        while page.next is not None:
            page = await self._client.page(page.next)
            parents.update((block.key, block.parent) for block in page.blocks)
        self.parents, self.slab, self.sequence = parents, slab, sequence
        self.resyncs += 1
        self.on_change()
