"""What is explored of core/lockstep: ranks that meet in every step, leaders that come while the last one still talks, a death.

The actors: ranks, each inside a step until *every* rank has entered it (the collective as a rendezvous); a first leader,
who may pause at any moment; a second that takes over at any moment, while the first goes on granting and its words stay in the
network. Grants, fences and reports are messages in a set: in any order, repeatedly, late, or never. A rank may die
anywhere, a deadline may pass whenever one stands.

An old leader is taken to be the worst that it can be (`worst_leaders`): a test shows that this, and the reductions, judge as
the plain world does. Left out: the driver's lease on leadership, which would only tie old leaders down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from interlock.checking.explorer import Broken, World
from interlock.checking.parts import Machine, Mail
from interlock.core import lockstep, lockstep_leader
from interlock.core.limits import LOCKSTEP_STEPS_AHEAD_MAX
from interlock.core.lockstep import Fence, Grant, RankReport, RankState, Report, StepEnded
from interlock.core.lockstep_leader import Advance, EndGroup, Pause, Phase, Proceed, RankLost, Tell, Tick

NEVER = 1e9
Transition = Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]


class State(msgspec.Struct, frozen=True, array_like=True):
    """Of the whole world. Cores are numbers of their machines."""

    ranks: tuple[int, ...]
    reports: tuple[int, ...]
    """Of each rank, all it ever said (bits)."""
    dead: tuple[bool, ...]
    leaders: tuple[int, ...]
    words: int
    """All that leaders ever said (bits)."""
    proceeds_left: tuple[int, ...]
    """Of each leader."""
    changes_left: int
    deaths_left: int
    timers_left: int
    ended: bool
    """All processes of the group are ended."""


class Lockstep(World[State]):
    """A group of `ranks` that runs at most `steps` steps."""

    protocol = "lockstep"

    def __init__(
        self,
        *,
        ranks: int,
        steps: int,
        changes: int = 0,
        deaths: int = 0,
        timers: int = 0,
        proceeds: int = 1,
        worst_leaders: bool = True,
        rank_transition: Transition = lockstep.transition_rank,
        leader_transition: Transition = lockstep_leader.transition,
    ) -> None:
        self.size, self.steps_max = ranks, steps
        self.name = f"{ranks} ranks, {steps} steps"
        self.budget = {
            "leader changes": changes, "deaths": deaths, "firing timers": timers, "proceeds a leader": proceeds,
        }  # fmt: skip
        self.reaches = changes == deaths == timers == 0
        self.proceeds = proceeds
        self.worst_leaders = worst_leaders
        self.rank_machine: Machine[Any, Any, Any] = Machine(rank_transition)
        self.leader_machine: Machine[Any, Any, Any] = Machine(leader_transition)
        self.words: Mail[Fence | Grant] = Mail()
        self.said: Mail[tuple[int, int, int]] = Mail()
        """Reports without their rank: (leader epoch, granted, reached)."""
        self.renamed: dict[tuple[int, tuple[int, ...]], int] = {}
        self.kept: dict[tuple[Any, ...], int] = {}
        self.start = State(
            ranks=(self.rank_machine.number(RankState(0)),) * ranks,  # a rank's name matters to leaders alone
            reports=(0,) * ranks,
            dead=(False,) * ranks,
            leaders=(self._leader(1),),
            words=self.words.bit(Fence(1)),
            proceeds_left=(proceeds,),
            changes_left=changes,
            deaths_left=deaths,
            timers_left=timers,
            ended=False,
        )
        self.over = msgspec.structs.replace(self.start, ended=True)

    def _leader(self, epoch: int) -> int:
        return self.leader_machine.number(lockstep_leader.lead(epoch, self.size, deadline_s=1.0))

    def initial(self) -> Iterable[State]:
        return [self.start]

    # --- what may happen -----------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        if state.ended:
            return
        for rank in range(self.size):
            if not state.dead[rank]:
                yield from self._rank(state, rank)
        for leader in range(len(state.leaders)):
            yield from self._leads(state, leader)
        if state.changes_left:
            taken = msgspec.structs.replace(
                state,
                changes_left=state.changes_left - 1,
                leaders=(*state.leaders, self._leader(len(state.leaders) + 1)),
                words=state.words | self.words.bit(Fence(len(state.leaders) + 1)),
                proceeds_left=(*((0,) * len(state.leaders)), self.proceeds)
                if self.worst_leaders
                else (*state.proceeds_left, self.proceeds),
            )
            yield ("takes over", len(state.leaders)), self._worst(taken)

    def _rank(self, state: State, rank: int) -> Iterable[tuple[Any, State | Broken]]:
        for word in self.words.read(state.words):
            yield ("hears", rank, word), self._tell_rank(state, rank, word)
        core: RankState = self.rank_machine[state.ranks[rank]]
        if core.inside and self._met(state, core.reached + 1):
            yield ("finishes", rank), self._tell_rank(state, rank, StepEnded(core.reached + 1))
        if state.deaths_left:
            yield (
                ("dies", rank),
                msgspec.structs.replace(
                    state, dead=_put(state.dead, rank, True), deaths_left=state.deaths_left - 1
                ),
            )

    def _met(self, state: State, step: int) -> bool:
        """Every rank has come to this step, so its collectives can end."""
        cores = [self.rank_machine[number] for number in state.ranks]
        return all(core.reached >= step or (core.inside and core.reached == step - 1) for core in cores)

    def _tell_rank(self, state: State, rank: int, event: Any) -> State:
        number, effects = self.rank_machine.step(state.ranks[rank], event)
        reports = state.reports[rank]
        for effect in effects:
            if isinstance(effect, Report):
                said = effect.report
                reports |= self.said.bit((said.leader_epoch, said.granted, said.reached))
        told = msgspec.structs.replace(
            state, ranks=_put(state.ranks, rank, number), reports=_put(state.reports, rank, reports)
        )
        return self._worst(told)

    def _leads(self, state: State, leader: int) -> Iterable[tuple[Any, State | Broken]]:
        core = self.leader_machine[state.leaders[leader]]
        worst = self.worst_leaders and leader < len(state.leaders) - 1
        for rank in range(self.size):
            for said in () if worst else self.said.read(state.reports[rank]):
                yield (
                    ("reports", rank, leader, said),
                    self._tell_leader(state, leader, RankReport(rank, *said)),
                )
            if state.dead[rank]:
                yield ("is seen dead", rank, leader), self._tell_leader(state, leader, RankLost(rank))
        if core.phase is Phase.ENDED:
            return
        if core.may_advance and core.granted < self.steps_max:
            yield ("advances", leader), self._tell_leader(state, leader, Advance(0.0, 0))
        if not core.pausing and not worst:
            yield ("pauses", leader), self._tell_leader(state, leader, Pause())
        if core.pausing and state.proceeds_left[leader] and core.phase is Phase.GRANTING:
            left = msgspec.structs.replace(
                state, proceeds_left=_put(state.proceeds_left, leader, state.proceeds_left[leader] - 1)
            )
            yield ("proceeds", leader), self._tell_leader(left, leader, Proceed())
        if state.timers_left and not core.standing:
            left = msgspec.structs.replace(state, timers_left=state.timers_left - 1)
            waited = self._tell_leader(left, leader, Tick(0.0))
            yield ("deadline", leader), self._tell_leader(waited, leader, Tick(NEVER))

    def _tell_leader(self, state: State, leader: int, event: Any) -> State:
        number, effects = self.leader_machine.step(state.leaders[leader], event)
        words, ended = state.words, state.ended
        for effect in effects:
            if isinstance(effect, Tell):
                words |= self.words.bit(effect.word)
            elif isinstance(effect, EndGroup):
                ended = True
        return msgspec.structs.replace(
            state, leaders=_put(state.leaders, leader, number), words=words, ended=ended
        )

    def _worst(self, state: State) -> State:
        """Old leaders hear at once all that ranks told them, nothing of their successor, and do not pause.

        What a leader may do grows with what it knows, so each grant it could give knowing less is given here too.
        """
        for old in range(len(state.leaders) - 1 if self.worst_leaders else 0):
            for rank in range(self.size):
                told = [report for report in self.said.read(state.reports[rank]) if report[0] == old + 1]
                if told:
                    state = self._tell_leader(state, old, RankReport(rank, *max(told)))
            core = self.leader_machine[state.leaders[old]]
            if core.pausing and core.phase is not Phase.ENDED:
                going = self.leader_machine.number(msgspec.structs.replace(core, pausing=False))
                state = msgspec.structs.replace(state, leaders=_put(state.leaders, old, going))
        return state

    # --- what must hold ------------------------------------------------------------------------------------------

    def wrong(self, state: State) -> str | None:
        if state.ended:
            return None
        ranks: list[RankState] = [self.rank_machine[number] for number in state.ranks]
        leader = self.leader_machine[state.leaders[-1]]
        if leader.paused and any(
            rank.inside or not rank.granted == rank.reached == leader.granted for rank in ranks
        ):
            return f"the leader says PAUSED at step {leader.granted}, and a rank does not stand there"
        slowest = min(rank.reached for rank in ranks)
        if any(rank.granted > slowest + LOCKSTEP_STEPS_AHEAD_MAX for rank in ranks):
            return f"a rank may run more than {LOCKSTEP_STEPS_AHEAD_MAX} steps ahead of the slowest"
        return None

    def good(self, state: State) -> bool:
        """The newest leader's group is PAUSED, or its processes are ended."""
        return state.ended or (not any(state.dead) and self.leader_machine[state.leaders[-1]].paused)

    # --- reductions ----------------------------------------------------------------------------------------------

    def canonical(self, state: State) -> State:
        """Ended groups are one, leaders that stepped down too. What nobody heeds is dropped. Ranks have no names."""
        if state.ended:
            return self.over
        leaders = [self.leader_machine[number] for number in state.leaders]
        reports = tuple(self._heeded(state.reports[rank], rank, leaders) for rank in range(self.size))
        heeders = {number for number, dead in zip(state.ranks, state.dead, strict=True) if not dead}
        words = self._heeded_words(state.words, frozenset(heeders))
        order = tuple(sorted(range(self.size), key=lambda rank: self._mark(state, reports, rank)))
        return State(
            ranks=tuple([state.ranks[rank] for rank in order]),
            reports=tuple([reports[rank] for rank in order]),
            dead=tuple([state.dead[rank] for rank in order]),
            leaders=tuple([self._renamed(number, order) for number in state.leaders]),
            words=words,
            proceeds_left=state.proceeds_left,
            changes_left=state.changes_left,
            deaths_left=state.deaths_left,
            timers_left=state.timers_left,
            ended=False,
        )

    def _heeded(self, said: int, rank: int, leaders: list[Any]) -> int:
        """The newest that this rank said to the newest leader, where he does not know it yet.

        An older report that comes late does what it did if it came when it was sent: a leader's knowledge only grows,
        and what he may do grows with it. So the late one need not be walked.
        """
        last = leaders[-1].reports[rank]
        key = (said, len(leaders), last)
        kept = self.kept.get(key)
        if kept is None:
            told = [report for report in self.said.read(said) if report[0] == len(leaders)]
            known = (len(leaders), last.granted, last.reached) if last else (0, 0, 0)
            kept = self.said.bit(max(told)) if told and max(told) > known else 0
            self.kept[key] = kept
        return kept

    def _heeded_words(self, words: int, heeders: frozenset[int]) -> int:
        """Fences and the newest grant of each leader, where a living rank heeds them; older grants: as above."""
        key = (words, heeders)
        kept = self.kept.get(key)
        if kept is None:
            newest: dict[tuple[type, int], Fence | Grant] = {}
            for word in self.words.read(words):
                sort = (type(word), word.leader_epoch)
                if isinstance(word, Fence) or word.step >= getattr(newest.get(sort), "step", 0):
                    newest[sort] = word
            kept = 0
            for word in newest.values():
                if any(_heeds(self.rank_machine[number], word) for number in heeders):
                    kept |= self.words.bit(word)
            self.kept[key] = kept
        return kept

    def _mark(self, state: State, reports: tuple[int, ...], rank: int) -> tuple[Any, ...]:
        """All that tells this rank from another."""
        heard = []
        for number in state.leaders:
            last = self.leader_machine[number].reports[rank]
            heard.append((last.granted, last.reached) if last else (-1, -1))
        return (state.ranks[rank], reports[rank], state.dead[rank], heard)

    def _renamed(self, leader: int, order: tuple[int, ...]) -> int:
        """The leader after ranks were given the places in `order`."""
        key = (leader, order)
        number = self.renamed.get(key)
        if number is None:
            core = self.leader_machine[leader]
            if core.phase is Phase.ENDED:
                core = msgspec.structs.replace(self.leader_machine[self.start.leaders[0]], phase=Phase.ENDED)
            else:
                reports = tuple(
                    core.reports[old] and msgspec.structs.replace(core.reports[old], rank=new)
                    for new, old in enumerate(order)
                )
                core = msgspec.structs.replace(core, reports=reports)
            number = self.renamed[key] = self.leader_machine.number(core)
        return number

    # --- words ---------------------------------------------------------------------------------------------------

    def tell(self, state: State, action: tuple[Any, ...], after: State | Broken) -> str:  # noqa: ARG002
        what, who = action[0], action[1]
        if what == "hears":
            word: Fence | Grant = action[2]
            said = f"grant of step {word.step}" if isinstance(word, Grant) else "fence"
            return f"rank {who} hears the {said} of leader {word.leader_epoch}"
        if what == "reports":
            epoch, granted, reached = action[3]
            return f"leader {action[2] + 1} hears rank {who}: it obeys {epoch}, granted {granted}, reached {reached}"
        if what == "is seen dead":
            return f"leader {action[2] + 1} learns that rank {who} is dead"
        if what in ("finishes", "dies"):
            return f"rank {who} {what}" + (" its step" if what == "finishes" else "")
        if what == "deadline":
            return f"the deadline of leader {who + 1} passes"
        return f"leader {who + 1} {what}"


def _heeds(rank: RankState, word: Fence | Grant) -> bool:
    """Whether this word changes the rank, now or after it has heard another."""
    if isinstance(word, Fence):
        return word.leader_epoch > rank.leader_epoch
    return word.leader_epoch > rank.leader_epoch or (
        word.leader_epoch == rank.leader_epoch and word.step > rank.granted
    )


def _put(row: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*row[:at], value, *row[at + 1 :])
