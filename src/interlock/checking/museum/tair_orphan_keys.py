"""A manager that is restarted forgets its write sessions and keeps the marks *being written* they left on their keys."""

from __future__ import annotations

import msgspec

from interlock.checking.gallery import Exhibit
from interlock.checking.worlds.sessions import Sessions, State


class MarksOutliveSessions(Sessions):
    """Sessions stand in memory, the state WRITING of their keys in the database, and only the session could take it off."""

    def _restarted(self, state: State) -> State:
        return msgspec.structs.replace(super()._restarted(state), under_way=state.under_way)


EXHIBIT = Exhibit(
    title="Keys that are being written for ever",
    protocol="sessions",
    public="alibaba/tair-kvcache #107, #184",
    rule="a key in state WRITING is left to its session; sessions are lost with the manager, the state is not",
    broken=lambda: MarksOutliveSessions(asks=[[(0,)], [(0,)]], faults=(0, 0, 0, 0, 0, 1)),
    mended=lambda: Sessions(asks=[[(0,)], [(0,)]], faults=(0, 0, 0, 0, 0, 1)),
    story_steps=2,
    kind="stuck",
)
