"""The writer looks whether a request is alive, the request is erased, and the writer puts its file back."""

from __future__ import annotations

from interlock.checking.gallery import Exhibit
from interlock.checking.museum.omlx_rules import BoundaryStore
from interlock.checking.worlds.snapshots import Snapshots

EXHIBIT = Exhibit(
    title="The file that came back",
    protocol="snapshots",
    public="jundot/omlx #1423",
    rule="the writer checks, then makes the directory and renames by name; erasing removes the directory in between",
    broken=lambda: BoundaryStore(has_lock=False, lives=1),
    mended=lambda: Snapshots(lives=(1,)),
    story_steps=5,
)
