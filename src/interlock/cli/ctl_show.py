"""How `interlock ctl` looks: tables and sentences for eyes, one JSON object for programs."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import msgspec

from interlock.core.roster import Sight
from interlock.core.targets import State
from interlock.wire.fleet_messages import (
    Command,
    CommandProgress,
    CommandReport,
    Hold,
    Member,
    MemberProgress,
    Membership,
    Memory,
)

GIB = 1 << 30
STANDING = {str(Sight.LOST): "gone", str(Sight.SUSPECT): "unseen"}
OUTCOMES = ("standing", "gone", "waiting", "unknown", "failed")
WITHOUT = "without_"
"""A capability that begins so names what cannot be guaranteed for an attached engine."""


class Answer(msgspec.Struct, omit_defaults=True):
    """What `--json` prints of a command."""

    ok: bool
    command: str = ""
    id: str = ""
    owner: str = ""
    epoch: str = ""
    seconds: float = 0.0
    code: str = ""
    message: str = ""
    members: list[MemberProgress] = []

    @classmethod
    def of(cls, order: Command, last: CommandProgress | None, seconds: float) -> Answer:
        """What became of `order`: `last` is the coordinator's last word of it, None: there was none. `seconds` since it was sent."""
        answer = cls(ok=last is not None and last.ok, command=order.command, id=order.command_id)
        answer.owner, answer.seconds = order.owner, round(seconds, 3)
        if last is not None:
            answer.epoch, answer.message, answer.members = str(last.epoch), last.message, last.members
        return answer


class Teller:
    """Says each member's outcome once, as it changes, with the seconds since the command began."""

    def __init__(self, begun_s: float, *, verb: str, quiet: bool) -> None:
        self._begun_s, self._quiet = begun_s, quiet
        self._nobody = "the engines to start" if verb == "start" else "the coordinator"
        self._said: dict[str, tuple[str, str]] = {}
        self._waiting: list[str] = []

    def tell(self, progress: CommandProgress, now_s: float) -> None:
        """A line for each member whose outcome is new. `now_s` on the clock of `begun_s`."""
        self._waiting = [f"{m.name} ({m.state})" for m in progress.members if m.outcome == "waiting"]
        for member in progress.members:
            word = (member.outcome, member.state)
            if member.outcome == "waiting" or self._said.get(member.name) == word:
                continue
            self._said[member.name] = word
            words = f"{member.name:<14} {member.outcome:<9} {member.state}"
            self._print(now_s, words + memory_in_words(member.memory))

    def still(self, now_s: float) -> None:
        """A line that says who is waited for, when nothing was heard for a while."""
        self._print(now_s, "still waiting for " + (", ".join(self._waiting) or self._nobody))

    def _print(self, now_s: float, words: str) -> None:
        if not self._quiet:
            print(f"  {now_s - self._begun_s:6.2f} s  {words}", file=sys.stderr)


def summary(verb: str, answer: Answer) -> str:
    """One line: what was done, how long it took, who is where; and whatever of the message that does not say."""
    counts = Counter(member.outcome for member in answer.members)
    who = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    line = f"{verb}: done in {answer.seconds:.2f} s" + (f": {who}" if who else "")
    _, still_held, holders = answer.message.partition("; it stays so for ")
    if still_held:
        return f"{line}; the fleet stays paused, held by {holders}"
    given_back = sum(m.memory.given_back_bytes for m in answer.members if m.memory is not None)
    if verb == "suspend" and given_back:
        line += f"; {given_back / GIB:.2f} GiB given back"
    return f"{line}; {answer.message}" if verb in ("stop", "drain") and answer.message else line


def memory_in_words(memory: Memory | None) -> str:
    """Empty where nothing is known of it."""
    if memory is None or not memory.resident_bytes:
        return ""
    resident = f"{memory.resident_bytes / GIB:.2f} GiB resident"
    return (
        f"  {memory.given_back_bytes / GIB:.2f} GiB given back, {resident}"
        if memory.given_back_bytes
        else f"  {resident}"
    )


def show_report(report: CommandReport, as_json: bool) -> int:
    """Returns the exit status: that of the command, 0 while it is under way."""
    progress = report.progress
    if as_json:
        print_json(report)
    else:
        how = (
            "done"
            if progress.ok
            else f"failed: {progress.message}"
            if progress.done
            else f"under way, {report.left_seconds:.0f} s left: {progress.message}"
        )
        print(f"{report.command} by {report.owner} (epoch {progress.epoch.number}): {how}")
        for member in progress.members:
            memory = memory_in_words(member.memory)
            print(f"  {member.name:<14} {member.outcome:<9} {member.state}{memory}")
    return 1 if progress.done and not progress.ok else 0


def wanted(fleet: Membership, state: str) -> str:
    """What is missing until the whole fleet is `state`, in words; empty: nothing is."""
    if fleet.target != state:
        return f"the fleet's target is {fleet.target}, not {state}"
    living = [member for member in fleet.members if member.state != Sight.LOST]
    late = [f"{m.name} ({m.state})" for m in living if not (m.standing and m.state == state)]
    if state != State.STOPPED:
        late += [f"{name} (not heard yet)" for name in fleet.awaited]
    if late:
        return f"waiting for {', '.join(late)}"
    return "" if living or state == State.STOPPED else "no member is left"


def show_status(fleet: Membership, parsed: argparse.Namespace, now_s: float) -> None:
    """The fleet as a table, or as JSON. `now_s`: this machine's monotonic clock, which holds end by."""
    if parsed.json:
        print_json(fleet)
        return
    weights = f"weights version {fleet.version}"
    if not fleet.weights_known:
        weights += ", which not every engine has: await the update, `update` again, or `stop`"
    # Its number is what changes; the term, nineteen digits of it, is in the JSON.
    print(f"target {fleet.target} (epoch {fleet.epoch.number}), {weights}")
    for hold in fleet.holds:
        print(f"  held by {hold.owner} (mode {hold.mode}{_until(hold, now_s)})")
    if not fleet.members:
        print("  no member has joined" + (f"; awaited: {', '.join(fleet.awaited)}" if fleet.awaited else ""))
        return
    rows = [["member", "state", "standing", "weights", "running", "waiting", "KV used", "kind"]]
    rows += [_row(member, fleet) for member in fleet.members]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name in fleet.awaited:
        print(f"  {name} is awaited: this coordinator has not heard it yet")
    for member in fleet.members:
        if member.memory is not None and member.memory.given_back_bytes:
            print(f"  {member.name}:{memory_in_words(member.memory)}")
        lacks = [word.removeprefix(WITHOUT) for word in member.facts.capabilities if word.startswith(WITHOUT)]
        if lacks:
            print(f"  {member.name} is attached: without {', '.join(lacks)}")


def _until(hold: Hold, now_s: float) -> str:
    """The coordinator's monotonic clock is this machine's."""
    return "" if hold.deadline_s is None else f", ends in {max(0.0, hold.deadline_s - now_s):.0f} s"


def _row(member: Member, fleet: Membership) -> list[str]:
    load = member.load
    if member.state == Sight.LOST:
        return [member.name, member.state, STANDING[member.state], "-", "-", "-", "-", member.facts.engine]
    version = "unknown" if member.version is None else member.version
    return [
        member.name,
        member.state,
        STANDING.get(member.state, "yes" if member.standing else "on its way"),
        version + ("" if member.version == fleet.version else f" (not {fleet.version})"),
        str(load.running),
        str(load.waiting),
        f"{100 * load.kv_used_share:.0f}%",
        member.facts.engine,
    ]


def print_json(what: msgspec.Struct) -> None:
    """One object on one line of standard output."""
    print(msgspec.json.encode(what, enc_hook=str).decode(), flush=True)
