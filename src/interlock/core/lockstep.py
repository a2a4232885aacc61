"""Lockstep groups: ranks that meet in a collective at every step, and the leader that says how far they may go.

What can go wrong. A rank that stops alone leaves the others waiting for it inside the collective (Megatron-LM #3563);
ranks that agree on stopping by a collective of their own wait there for one that died. A leader grants step 2, reaches
only B, and dies; its successor reads 1 and 1, pauses at 1, and then the old grant reaches B: A at 1, B at 2, B waits
for ever (hazards F6). A gloo peer that waits for a frozen rank cannot be freed: aborting releases nobody.

Why it cannot here. A *grant* is a level, (leader epoch, highest step), repeated until every rank reports it; a rank runs
each step up to it and no further, with an empty forward if it has no work. Pausing is ceasing to raise it, and the group
is PAUSED when every rank stands at it: a grant that reached one rank will reach all, so all meet in each of its steps.
At most two steps are granted ahead of the slowest rank, which bounds the pause. A new leader first fences: every rank
refuses the old epoch from then on and says what it was granted; then the *maximum* is granted to all, for some rank may
be inside that step already. No message is needed between two steps, and no reduction.

A grant carries its token budget, and its deadline follows from that. A rank lost, or a deadline missed, ends the whole group: its
processes are ended, for no survivor can leave the collective and no communicator can be trusted after one.

    leader:  FENCING ──every rank told its grant──► GRANTING (pausing? every rank at the grant: PAUSED)
                └───────── rank lost, deadline ─────────┴──────► ENDED

Here stand the words and the rank; the leader is `core/lockstep_leader`.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import LocalProtocolError, RemoteProtocolError
from interlock.core.limits import LOCKSTEP_STEPS_AHEAD_MAX

# --- what they say to each other ---------------------------------------------------------------------------------


class Fence(msgspec.Struct, frozen=True):
    """A new leader: obey no lower epoch from now on, and tell me your grant. Repeated until reported."""

    leader_epoch: int


class Grant(msgspec.Struct, frozen=True):
    """Run every step up to this one. Repeated until every rank reports it.

    `tokens`: the most that any rank computes in one of the steps not yet reached.
    """

    leader_epoch: int
    step: int
    tokens: int = 0


class RankReport(msgspec.Struct, frozen=True):
    """What this rank is: the leader it obeys, how far it may go, and how far it went (steps finished)."""

    rank: int
    leader_epoch: int
    granted: int
    reached: int
    tokens: int = 0
    """Of the grant: what a new leader needs to set a deadline."""


# --- a rank ------------------------------------------------------------------------------------------------------


class RankState(msgspec.Struct, frozen=True):
    """One rank, for its process's life: it never leaves a group and comes back."""

    rank: int
    leader_epoch: int = 0
    granted: int = 0
    reached: int = 0
    tokens: int = 0
    inside: bool = False
    """Inside step `reached + 1`, where it may be waiting for the others."""

    @property
    def report(self) -> RankReport:
        """What this rank says of itself to its leader, whenever asked: a level, never a change."""
        return RankReport(self.rank, self.leader_epoch, self.granted, self.reached, self.tokens)


class StepEnded(msgspec.Struct, frozen=True):
    """The step that was run is over, its collectives included."""

    step: int


RankEvent = Fence | Grant | StepEnded


class RunStep(msgspec.Struct, frozen=True):
    """Run this step, with an empty batch if there is no work."""

    step: int


class Report(msgspec.Struct, frozen=True):
    """Send this to the leader (or whoever spoke with an old epoch)."""

    report: RankReport


RankEffect = RunStep | Report
RankOutcome = tuple[RankState, tuple[RankEffect, ...]]


def transition_rank(rank: RankState, event: RankEvent) -> RankOutcome:
    """The only way a rank changes. Words of a lower epoch change nothing and are answered with the higher one.

    Raises RemoteProtocolError for a grant that no leader may give: unfenced, or further ahead than the bound;
    LocalProtocolError when a step ends that was not run.
    """
    match event:
        case Fence(epoch):
            rank = msgspec.structs.replace(rank, leader_epoch=max(rank.leader_epoch, epoch))
            return rank, (Report(rank.report),)
        case Grant():
            return _granted(rank, event)
        case StepEnded(step):
            if not rank.inside or step != rank.reached + 1:
                raise LocalProtocolError(
                    f"rank {rank.rank} ended step {step}, but is {'inside' if rank.inside else 'standing before'} "
                    f"step {rank.reached + 1}",
                    rank=rank.rank,
                    step=step,
                )
            return _run(msgspec.structs.replace(rank, reached=step, inside=False))
        case _:
            raise LocalProtocolError(f"{event!r} is no event of rank {rank.rank}")


def _granted(rank: RankState, grant: Grant) -> RankOutcome:
    epoch, step = grant.leader_epoch, grant.step
    if epoch < rank.leader_epoch or (epoch == rank.leader_epoch and step <= rank.granted):
        return rank, (Report(rank.report),)
    if epoch > rank.leader_epoch or step > rank.reached + LOCKSTEP_STEPS_AHEAD_MAX:
        raise RemoteProtocolError(
            f"leader {epoch} grants step {step} to rank {rank.rank}, which obeys leader {rank.leader_epoch} and has "
            f"reached step {rank.reached}",
            hint="a leader fences every rank first and grants at most two steps ahead",
            rank=rank.rank,
            leader_epoch=epoch,
        )
    return _run(msgspec.structs.replace(rank, granted=step, tokens=grant.tokens))


def _run(rank: RankState) -> RankOutcome:
    if rank.inside or rank.reached == rank.granted:
        return rank, (Report(rank.report),)
    rank = msgspec.structs.replace(rank, inside=True)
    return rank, (Report(rank.report), RunStep(rank.reached + 1))
