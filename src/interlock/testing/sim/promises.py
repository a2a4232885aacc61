"""What administrators were told and have not taken back: who holds the fleet, with which weights it stands, what was given up.

Kept outside of every process, so that nobody who crashes forgets it. A promise begins when a caller has its answer and ends when a
caller *asks* for its end, however that goes: in between it must hold.

One thing excuses a broken promise: that nobody alive can know of it, because the coordinator's disk was lost and every engine that
remembered it has ended. Fronts remember some of it, too, but at a fleet's very first start nobody can wait for their word.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from interlock.core.targets import State
from interlock.testing.sim.tokens import FIRST

if TYPE_CHECKING:
    from interlock.engines.runner import Runner
    from interlock.testing.sim.engine import SimEngine
    from interlock.testing.sim.kernel import SimProcess

HOLDS, WEIGHTS = "holds", "weights"


class UpdateAsked(msgspec.Struct, frozen=True):
    """Which one of all, what stood before it, and who was there."""

    number: int
    before: str | None
    members: set[SimProcess]


class Promises:
    """`violation` is told each broken one, in words."""

    def __init__(
        self,
        violation: Callable[[str], None],
        runners: Mapping[SimProcess, Runner],
        engines: Mapping[SimProcess, SimEngine],
    ) -> None:
        self._violation, self._runners, self._engines = violation, runners, engines
        self.held: dict[str, float] = {}
        """Owner → since when its pause is confirmed and not yet released."""
        self.version: str | None = None
        """The weights of which somebody was told that every engine stands with them."""
        self.kept_cache = False
        """Some update was asked to keep the KV of frozen requests."""
        self.versions_lost = False
        """Nobody alive knew which weights came last: the fleet began again with its first."""
        self._breaks: Counter[str] = Counter()
        self._breaking: Counter[str] = Counter()
        self._updates = self._resumes = self._starts = 0
        self._loaded: dict[SimProcess, set[str]] = {}
        self._newest = self._last = FIRST
        self.order = {FIRST: 0}
        """Of versions: in which order the coordinator began their updates."""
        self._remembering: dict[str, set[SimProcess]] | None = None
        """Once the coordinator's state was lost: the engines that still know of each promise."""
        self._led = False

    # --- what administrators do ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def breaking(self, *owners: str) -> Iterator[None]:
        """Somebody else releases these owners' holds: from before he asks until he was answered, and they may be so for a while."""
        for owner in owners:
            self.held.pop(owner, None)
            self._breaks[owner] += 1
            self._breaking[owner] += 1
        try:
            yield
        finally:
            for owner in owners:
                self.held.pop(owner, None)
                self._breaks[owner] += 1
                self._breaking[owner] -= 1

    def breaks_of(self, owner: str) -> int:
        """Beginnings and ends of breaks of its hold so far."""
        return self._breaks[owner]

    def holds(self, owner: str, since_s: float, breaks: int) -> None:
        """Its pause is confirmed, and was asked for after so many breaks of its hold."""
        if breaks == self._breaks[owner] and not self._breaking[owner]:
            self.held[owner] = since_s

    def update_asked(self, kv: str) -> UpdateAsked:
        """For `update_done` or `update_refused`."""
        before, self.version = self.version, None
        self.kept_cache |= kv == "keep"
        self._updates += 1
        return UpdateAsked(self._updates, before, self._members())

    def update_refused(self, asked: UpdateAsked) -> None:
        """It was not begun: what stood stands, unless somebody else has asked meanwhile."""
        if asked.number == self._updates and not self.versions_lost:
            self.version = asked.before

    def update_done(self, version: str, asked: UpdateAsked) -> None:
        """Whoever was a member when it was asked, and has not ended, has loaded it, though somebody may have asked for another since."""
        for process in sorted(asked.members, key=str):
            if not process.dead and version not in self._loaded.get(process, ()):
                self._violation(
                    f"somebody was told that weights {version} stand, and {process} never had them"
                )
        if self._last == version:
            self.version = version

    def start_done(self, version: str) -> None:
        """Every engine runs with these, unless somebody has asked for others since."""
        if self._last == version:
            self.version = version

    def decided(self, version: str) -> None:
        """The coordinator has begun an update: of several asked for at once it decides the order."""
        self.order.setdefault(version, len(self.order))
        self._last = version
        if self.version != version:
            self.version = None

    def loaded(self, process: SimProcess, version: str) -> None:
        self._loaded.setdefault(process, set()).add(version)
        self._newest = max(self._newest, version, key=int)

    def _members(self) -> set[SimProcess]:
        return {
            process
            for process, runner in self._runners.items()
            if not process.dead and runner.member_state.heard is not None
        }

    def suspend_asked(self) -> tuple[int, set[SimProcess]]:
        return self._resumes, self._members()

    def suspend_done(self, asked: tuple[int, set[SimProcess]]) -> None:
        """Unless somebody has asked for a resume meanwhile, whoever was a member when it was asked has given its memory up, or ended."""
        resumes, alive = asked
        for process in sorted(alive, key=str):
            engine = self._engines.get(process)
            if resumes == self._resumes and engine is not None and engine.memory:
                self._violation(
                    f"somebody was told that the fleet is SUSPENDED, and {process} has its memory"
                )

    def resume_asked(self) -> None:
        self._resumes += 1

    def stop_asked(self) -> tuple[int, set[SimProcess]]:
        """For `stop_done`."""
        return self._starts, self._members()

    def stop_done(self, asked: tuple[int, set[SimProcess]]) -> None:
        """Unless somebody has asked for a start meanwhile, whoever was a member when it was asked has ended, or says that it is STOPPED
        and will."""
        starts, alive = asked
        for process in sorted(alive, key=str):
            runner = self._runners.get(process)
            if (
                starts == self._starts
                and runner is not None
                and runner.member_state.state is not State.STOPPED
            ):
                self._violation(
                    f"somebody was told that the fleet is STOPPED, and {process} is {runner.member_state.state}"
                )

    def start_asked(self) -> None:
        self._starts += 1

    # --- what engines do -------------------------------------------------------------------------------------------

    def stepped(self, process: SimProcess, stage: str, weights: str | None) -> None:
        """While a confirmed hold is not released, no step begins or ends; every step has whole weights, of the version that stands."""
        for owner, since_s in self.held.items():
            self._violation(
                f"a step of {process} {stage} though {owner} was told at {since_s:.3f} s that the fleet stands"
            )
        if weights is None:
            self._violation(f"a step of {process} {stage} without whole weights in its memory")
        elif self.version not in (None, weights):
            self._violation(
                f"a step of {process} {stage} with weights {weights}, and every engine stands with {self.version}"
            )

    # --- who forgets -----------------------------------------------------------------------------------------------

    def coordinator_forgets(self, *, excused: bool) -> None:
        if self._led and not excused:
            self._violation(
                "the coordinator has lost what it told, and nothing has happened to its disk but what it must survive"
            )
        heard = {process: runner.member_state.heard for process, runner in self._runners.items()}
        newest = self.version or self._newest
        self._remembering = {
            HOLDS: {process for process, known in heard.items() if known is not None and known.holds},
            WEIGHTS: {p for p, known in heard.items() if known is not None and known.version == newest},
        }
        self._excuse()

    def coordinator_knows(self) -> None:
        """It has told a target: what it leads by is on its disk."""
        self._remembering, self._led = None, True

    def process_ended(self, process: SimProcess) -> None:
        if process.name == "admin":
            self.held.clear()
        for remembering in (self._remembering or {}).values():
            remembering.discard(process)
        self._excuse()

    def _excuse(self) -> None:
        if self._remembering is None:
            return
        if not self._remembering[HOLDS]:
            self.held.clear()
        if not self._remembering[WEIGHTS]:
            self.version, self.versions_lost = None, True
