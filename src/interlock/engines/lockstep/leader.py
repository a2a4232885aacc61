"""The leader of a lockstep group at work: grants steps while some rank has something to do, and ends the group that is late.

The rules are `core/lockstep_leader`'s. Added here: *when* a step is granted (while a rank wants one, so an idle group runs nothing),
words said again, and a clock. The clock counts beats: a leader that was frozen itself first hears what came meanwhile.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import msgspec

from interlock.core import lockstep_leader as core
from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import LOCKSTEP_BEAT_SECONDS, LOCKSTEP_FENCE_SECONDS_MAX, LOCKSTEP_STEP_SECONDS
from interlock.core.lockstep import Fence, Grant
from interlock.engines.lockstep.words import FenceWord, GrantWord, Said
from interlock.host.base import Clock

FROZEN_BEATS = 3.0
"""A beat that took so many times its length was not a beat: we did not run."""


class Leader:
    """One term over one group. `say(rank, word)` sends; `on_end(why)` is called once, when the ranks must be ended."""

    def __init__(
        self,
        clock: Clock,
        epoch: int,
        ranks: int,
        *,
        say: Callable[[int, FenceWord | GrantWord], None],
        on_end: Callable[[str], None],
        step_seconds: float = LOCKSTEP_STEP_SECONDS,
    ) -> None:
        self._clock, self._say, self._on_end = clock, say, on_end
        self.state = core.lead(epoch, ranks, deadline_s=math.inf, step_seconds=step_seconds)
        self.words = 0
        """Said to ranks so far; of each, and each again."""
        self._wants = [0] * ranks
        self._last: FenceWord | GrantWord = FenceWord(Fence(epoch))
        self._changed = asyncio.Event()
        self._beats: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Fences. Steps are granted after `proceed`."""
        deadline_s = self._clock.monotonic_s() + LOCKSTEP_FENCE_SECONDS_MAX
        self.state = msgspec.structs.replace(self.state, deadline_s=deadline_s)
        self._tell_all()
        self._beats = asyncio.create_task(self._beat(), name="lockstep leader")

    def close(self) -> None:
        if self._beats is not None:
            self._beats.cancel()

    # --- what happens --------------------------------------------------------------------------------------------

    def said(self, rank: int, said: Said) -> None:
        """A rank said what it is, and what it wants."""
        self._wants[rank] = said.wants_tokens
        self._apply(said.report)
        self._advance()

    def lost(self, rank: int) -> None:
        """The exit of its process was seen, or it can never be reached again."""
        self._apply(core.RankLost(rank))

    def pause(self) -> None:
        """Grants no more; `paused` is true once every rank stands."""
        self._apply(core.Pause())

    def proceed(self) -> None:
        self._apply(core.Proceed())
        self._advance()

    @property
    def paused(self) -> bool:
        return self.state.paused

    @property
    def fenced(self) -> bool:
        return self.state.phase is core.Phase.GRANTING

    @property
    def ended(self) -> bool:
        return self.state.phase is core.Phase.ENDED

    @property
    def step(self) -> int:
        """That was granted last."""
        return self.state.granted

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until this holds of the leader; forever, if it never does: whoever waits also hears of the group's end."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    # --- effects -------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Grants all that may be granted now, in one word."""
        now, tokens, before = self._clock.monotonic_s(), max(self._wants), self.step
        while tokens and self.state.may_advance:
            self.state, effects = core.transition(self.state, core.Advance(now, tokens))
            self._note(effects)
        if self.step > before:
            self._tell_all()

    def _apply(self, event: core.GroupEvent) -> None:
        was = self.state
        try:
            self.state, effects = core.transition(self.state, event)
        except (RemoteProtocolError, LocalProtocolError) as error:
            if self.ended:
                return
            self.state, effects = _over(self.state), (core.EndGroup(str(error)),)
        if self._note(effects):
            self._tell_all()
        for effect in effects:
            match effect:
                case core.EndGroup(why):
                    self._on_end(why)
                case core.StepDown(epoch):
                    self._on_end(f"a newer leader, {epoch}, has taken this group over")
        if self.state is not was:
            self._changed.set()

    def _note(self, effects: Sequence[core.GroupEffect]) -> bool:
        """Keeps the newest word; whether there was one."""
        told = [effect.word for effect in effects if isinstance(effect, core.Tell)]
        for word in told:
            self._last = GrantWord(word) if isinstance(word, Grant) else FenceWord(word)
        return bool(told)

    def _tell_all(self) -> None:
        for rank in range(len(self._wants)):
            self._say(rank, self._last)
            self.words += 1

    # --- the clock -----------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        last = self._clock.monotonic_s()
        while not self.ended:
            await self._clock.sleep_s(LOCKSTEP_BEAT_SECONDS)
            now = self._clock.monotonic_s()
            if now - last < FROZEN_BEATS * LOCKSTEP_BEAT_SECONDS and not self.state.standing:
                self._say_again()
                self._apply(core.Tick(now))
            last = now

    def _say_again(self) -> None:
        for rank, report in enumerate(self.state.reports):
            if report is None or min(report.granted, report.reached) < self.state.granted:
                self._say(rank, self._last)
                self.words += 1


def _over(state: core.GroupState) -> core.GroupState:
    return msgspec.structs.replace(state, phase=core.Phase.ENDED)
