"""A request id is used again while the writer has an item of its former life: the old bytes are written under the new one."""

from __future__ import annotations

from interlock.checking.gallery import Exhibit
from interlock.checking.museum.omlx_rules import BoundaryStore
from interlock.checking.worlds.snapshots import Snapshots

EXHIBIT = Exhibit(
    title="The reused request id",
    protocol="snapshots",
    public="jundot/omlx #1423 (as merged; told apart by identity later)",
    rule="an item is wanted if its request id has an entry; the entry of the id's next life makes the old item wanted",
    broken=lambda: BoundaryStore(lives=2),
    mended=lambda: Snapshots(lives=(2,)),
    story_steps=6,
)
