"""The late end of a write that was given up completes the next try, which is still being written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from interlock.checking.explorer import Broken
from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.joins import Joins, State
from interlock.core.joins import Report


class NamedByKey(Joins):
    """PutEnd carries the client and the key, and no token of the put it ends: it meets whatever is being put now."""

    def _deliver(self, state: State, message: tuple[Any, ...]) -> Iterable[tuple[Any, State | Broken]]:
        if message[0] != "report":
            yield from super()._deliver(state, message)
        elif state.announced:
            now = state.announced - 1
            yield message, self._tell(state, now, Report(self.names[now], message[2], message[3]))


EXHIBIT = Exhibit(
    title="The end of another put",
    protocol="joins",
    public="kvcache-ai/Mooncake #3030",
    rule="the end of a put names client and key, not the attempt; a late one completes the attempt that runs now",
    broken=lambda: NamedByKey(ranks=1, attempts=2, aborts=1, symmetric=False),
    mended=lambda: Joins(ranks=1, attempts=2, aborts=1),
    story_steps=7,
)
