"""Commands a coordinator accepted: which wait for what, who listens, and how the finished ones ended.

A command belongs to the coordinator once it is accepted: its client may die, it is carried through all the same, and its
outcome can be asked for again by (owner, command_id). Pure but for the listeners, which are only kept here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from interlock.core.fleet_state import FleetState
from interlock.core.limits import COMMANDS_KEPT_MAX, COMMANDS_UNDER_WAY_MAX
from interlock.core.roster import Condition, MemberRecord, condition
from interlock.core.targets import State
from interlock.fleet.coordinator_state import CommandRecord
from interlock.fleet.kept_fronts import KeptFronts
from interlock.wire.fleet_messages import CommandProgress, CommandReport, MemberProgress

MESSAGE_CHARS_MAX = 2000
"""Of a kept outcome: it may name a thousand members, and hundreds of outcomes are kept."""


class CommandBook:
    """Records by (owner, command_id). Bounded: the oldest finished one is forgotten first."""

    def __init__(self, records: Iterable[CommandRecord] = ()) -> None:
        self._records: OrderedDict[tuple[str, str], CommandRecord] = OrderedDict((r.key, r) for r in records)

    def get(self, owner: str, command_id: str) -> CommandRecord | None:
        return self._records.get((owner, command_id))

    def find(self, command_id: str, owner: str = "") -> CommandRecord | None:
        """By its id, which clients draw at random, and its owner where one is named. The newest of that id."""
        if owner:
            return self.get(owner, command_id)
        found = [record for record in self._records.values() if record.command_id == command_id]
        return found[-1] if found else None

    def records(self) -> list[CommandRecord]:
        return list(self._records.values())

    def under_way(self) -> list[CommandRecord]:
        return [record for record in self._records.values() if not record.done]

    def drop(self, owner: str, command_id: str) -> None:
        """It could not be kept, so it was never accepted."""
        self._records.pop((owner, command_id), None)

    @property
    def full(self) -> bool:
        return len(self.under_way()) >= COMMANDS_UNDER_WAY_MAX

    def put(self, record: CommandRecord) -> None:
        self._records[record.key] = record
        excess = len(self._records) - COMMANDS_KEPT_MAX
        for key in [key for key, old in self._records.items() if old.done][: max(0, excess)]:
            del self._records[key]


def progress_of(record: CommandRecord, judged: Condition | None = None) -> CommandProgress:
    """What its listeners are told."""
    if judged is None or record.done:
        return CommandProgress(record.epoch, record.members, record.done, record.ok, record.message)
    # The first half of a composite may be judged done: the command is not, and whoever hears *done* stops listening.
    return CommandProgress(record.epoch, members_of(judged), False, False, judged.message)


def report_of(record: CommandRecord, progress: CommandProgress, left_s: float) -> CommandReport:
    """What whoever asks about it is told."""
    left_s = 0.0 if progress.done else max(0.0, left_s)
    return CommandReport(
        record.owner, record.command_id, record.command, str(record.wanted), left_s, progress
    )


def members_of(judged: Condition) -> list[MemberProgress]:
    """Where each member stands, as it is told to who asked for the command."""
    return [MemberProgress(r.name, r.incarnation, r.word, outcome) for r, outcome in judged.members]


def judge(
    record: CommandRecord,
    fleet: FleetState,
    members: Sequence[MemberRecord],
    now_s: float,
    fronts: KeptFronts | None = None,
) -> tuple[CommandRecord, Condition | None]:
    """The command as things stand: finished where it can be, and the judgement of the members (None: superseded)."""
    expired = now_s >= record.deadline_s
    on_the_way = fleet.stop_for is not None and fleet.state != record.wanted == State.STOPPED
    if why := _overtaken(record, fleet, on_the_way=on_the_way):
        return _finished(
            record, ok=False, message=f"superseded: {why} since epoch {fleet.epoch.number}"
        ), None
    judged = condition(
        members,
        fleet.epoch,
        fleet.state,
        unseen=fleet.awaited,
        expired=expired,
        allow_unknown=record.allow_unknown,
    )
    if fronts is not None:
        judged = fronts.judge(judged, fleet, now_s, expired=expired)
    if not judged.done or (on_the_way and judged.ok and not expired):
        return record, judged
    message = judged.message
    if on_the_way:
        message = (
            f"the fleet was not {record.wanted} by the deadline: {message}; it still goes there, unless "
            f"UNPAUSE releases the hold of {fleet.stop_for!r}"
        )
    elif judged.ok and fleet.holds and record.command == "UNPAUSE":
        message += "; it stays so for " + ", ".join(hold.owner for hold in fleet.holds)
    return _finished(record, ok=judged.ok and not on_the_way, message=message, judged=judged), judged


def _overtaken(record: CommandRecord, fleet: FleetState, *, on_the_way: bool) -> str:
    """What another command made of the fleet, where that is not what this one asked for. Standing alone would not tell: an update
    that another one overtook ends in the same state, and so does a pause whose hold was broken while somebody else holds, too."""
    if fleet.state != record.wanted and not on_the_way:
        return f"the fleet's target is {fleet.state}"
    if record.version is not None and record.version != fleet.version:
        return f"the weights asked for are {fleet.version!r}"
    if record.command == "PAUSE" and all(hold.owner != record.owner for hold in fleet.holds):
        return f"the hold of {record.owner!r} is over"
    return ""


def _finished(
    record: CommandRecord, *, ok: bool, message: str, judged: Condition | None = None
) -> CommandRecord:
    members = members_of(judged) if judged else record.members
    message = message[:MESSAGE_CHARS_MAX]
    return msgspec.structs.replace(record, done=True, ok=ok, message=message, members=members)
