"""Two waits for the writer time out, a count of cancellations outlives what it counted, and the next save is thrown away."""

from __future__ import annotations

from interlock.checking.gallery import Exhibit
from interlock.checking.museum.omlx_rules import BoundaryStore
from interlock.checking.worlds.snapshots import Snapshots

EXHIBIT = Exhibit(
    title="The counter pinned by two time-outs",
    protocol="snapshots",
    public="jundot/omlx #1423 (the same in the versions after it)",
    rule="cancellation is a count per request id, decremented when the writer meets the item; emptying the queue decrements "
    "nothing, and a wait that timed out clears nothing",
    broken=lambda: BoundaryStore(
        ids=2, lives=3, by_identity=True, time_outs=2, erase_alls=1, looks_for="vanished"
    ),
    mended=lambda: Snapshots(lives=(3,), erase_alls=1, reads=False),
    story_steps=10,
)
