"""Whether the fleet, as its membership stands, could ever take a request; and for how long it could not."""

from __future__ import annotations

from interlock.core.targets import State
from interlock.fleet.generation import NoMember
from interlock.fleet.membership_view import ENDED
from interlock.wire.fleet_messages import Membership


class Prospects:
    """Mutable, one a front."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: how long requests wait for an engine while there is none that could take them."""
        self._patience_s = patience_s
        self._good: Membership | None = None
        """The last membership that was judged and found good: it is asked about for every request."""
        self._none_since_s: float | None = None

    def why_none(self, view: Membership | None, trouble: str) -> NoMember | None:
        """Why no engine will take a request as things stand; None where one may. `trouble`: why nothing was heard."""
        if view is None:
            return NoMember(
                f"this front has not heard from the coordinator yet ({trouble})",
                hint="wait for the fleet to start, or look at the coordinator's log",
                retryable=True,
            )
        if view is self._good:
            return None
        if view.target == State.STOPPED:
            return NoMember("the fleet is stopped", hint="start it, then ask again")
        if all(member.state in ENDED or not member.facts.address for member in view.members):
            return NoMember(
                "no engine is alive",
                hint="the supervisor restarts them; if none comes, look at the engines' logs",
                retryable=True,
            )
        self._good = view
        return None

    def overdue(self, now_s: float, why: NoMember | None) -> bool:
        """Whether requests have waited long enough. To be asked now and then, with what `why_none` says."""
        if why is None:
            self._none_since_s = None
            return False
        if self._none_since_s is None:
            self._none_since_s = now_s
        return now_s - self._none_since_s > self._patience_s
