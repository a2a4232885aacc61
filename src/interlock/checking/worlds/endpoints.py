"""What is explored of core/endpoints: processes that all want to be connected to each other, over directed lanes.

The actors: two or three processes, each with an endpoint to each other. An endpoint that is idle may open at any time. Messages are a set: each may arrive now, later, twice or never, also in a later
life of its receiver, who then knows nothing of what was. A process may die, and is there again at once, in its next life, with
the very same lane parameters. A lane is dialled while both ends are paired with each other; the dialler holds it then, and the
listener hears so later. The chooser may run out of patience with lanes that are not ready; a handshake or lease may end at
any time (a timer of the budget); an endpoint may be retired by its own process (a re-open).

Time is left out of the states: a deadline that stands may pass now or never. Left out, too, because they show nothing that the
others do not: *when* lanes are destroyed (an endpoint that waits for it hears less than one that does not) and *when* the first
heartbeat is sent (it may arrive at any time later all the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from typing import Any, Literal

import msgspec

from interlock.checking.diagrams import Diagram, from_table
from interlock.checking.explorer import Broken, World
from interlock.checking.parts import Machine, Mail
from interlock.core import endpoints
from interlock.core.endpoint_events import (
    Accept,
    Connect,
    Event,
    LaneFailed,
    LaneReady,
    Message,
    Open,
    Reject,
    Released,
    Retire,
    Send,
    Tick,
)
from interlock.core.endpoint_state import NOBODY, Endpoint, Offer, Phase, Stamp
from interlock.core.errors import ProtocolError
from interlock.core.limits import LANE_PATIENCE_SECONDS

OLDEST = Stamp(1, 1)
NEVER = 1e9
"""Later than every deadline."""
State = tuple[Any, ...]
"""(cores, sent, left): the endpoints as numbers of the machine, in the order of `Endpoints.pairs`; the mail; what is left of the
budget: crashes and re-opens of each process, then timers and lane failures."""
Transition = Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]
BEAT = (Tick(0.0),)
PATIENCE = (Tick(0.0), Tick(LANE_PATIENCE_SECONDS))
DEADLINE = (Tick(0.0), Tick(NEVER))


class Endpoints(World[State]):
    """`undialable`: who cannot dial anybody (a firewall): each of its tries fails, once a pairing."""

    protocol = "endpoints"

    def __init__(
        self,
        *,
        processes: int = 2,
        crashes: int | Sequence[int] = 0,
        reopens: int | Sequence[int] = 0,
        timers: int = 0,
        lane_failures: int = 0,
        undialable: str = "",
        kinds: Sequence[str] = ("tcp",),
        transition: Transition = endpoints.transition,
        is_reduced: bool = True,
    ) -> None:
        self.is_reduced = is_reduced
        self.names = "abcdefgh"[:processes]
        self.undialable = undialable
        self.pairs = list(permutations(range(processes), 2))
        self.back = [self.pairs.index((q, p)) for p, q in self.pairs]
        each_crashes = [crashes] * processes if isinstance(crashes, int) else list(crashes)
        each_reopens = [reopens] * processes if isinstance(reopens, int) else list(reopens)
        self.processes = processes
        self.timers_at, self.lanes_at = 2 * processes, 2 * processes + 1
        blocked = f", {undialable} cannot dial" if undialable else ""
        self.name = f"{processes} peers, directed lanes of {' and '.join(kinds)}{blocked}"
        self.name += "" if is_reduced else ", every message kept"
        self.budget = {
            "crashes": self._of_each(each_crashes),
            "re-opens": self._of_each(each_reopens),
            "firing timers": timers,
            "lane failures": lane_failures,
        }
        self.reaches = not any(self.budget.values())
        self.offers = tuple(Offer(kind) for kind in kinds)
        self.machine: Machine[Any, Any, Any] = Machine(transition)
        self.mail: Mail[tuple[int, Event]] = Mail()
        self._made: dict[tuple[int, Any], tuple[int, int] | Broken] = {}
        self._judged: dict[tuple[int, int], str | None] = {}
        self._agreed: dict[tuple[int, int], bool] = {}
        self._kept: dict[tuple[int, int, int, bool], int] = {}
        self._into: list[int] = [0] * len(self.pairs)
        """For each endpoint the messages that were ever sent to it, as bits."""
        self.start: State = (
            tuple(self._fresh(at, 1) for at in range(len(self.pairs))),
            0,
            (*each_crashes, *each_reopens, timers, lane_failures),
        )

    def _of_each(self, counts: Sequence[int]) -> int | str:
        """A budget in words: 0, or "1 of a, 1 of b"."""
        named = zip(counts, self.names, strict=True)
        return ", ".join(f"{count} of {name}" for count, name in named if count) or 0

    def _fresh(self, at: int, incarnation: int) -> int:
        process, peer = self.pairs[at]
        return self.machine.number(Endpoint(self.names[process], self.names[peer], incarnation, self.offers))

    def initial(self) -> Iterable[State]:
        return [self.start]

    # --- what may happen -----------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        for action, after in self._steps(state):
            yield action, after if isinstance(after, Broken) or not self.is_reduced else self._reduced(after)

    def _steps(self, state: State) -> Iterable[tuple[Any, State | Broken]]:
        cores, sent, left = state
        for at, number in enumerate(cores):
            yield from self._act(state, at, self.machine[number])
        for bit in _bits(sent):
            at, _ = self.mail_of(bit)
            yield ("deliver", bit), self._deliver(state, at, bit)
        for process in range(self.processes):
            if left[process]:
                yield ("crash", process), self._crash(state, process)

    def _act(self, state: State, at: int, endpoint: Endpoint) -> Iterable[tuple[Any, State | Broken]]:
        left = state[2]
        phase = endpoint.phase
        if phase is Phase.IDLE:
            yield ("open", at), self._tell(state, at, "open", (Connect(),))
            return
        if left[self.timers_at]:
            yield (
                ("deadline", at),
                self._tell(_spent(state, self.timers_at), at, "deadline", DEADLINE),
            )
        reopens = self.processes + self.pairs[at][0]
        if left[reopens]:
            yield ("retire", at), self._tell(_spent(state, reopens), at, "retire", (Retire("re-open"),))
        if phase is Phase.WAIT_READY:
            if endpoint.is_chooser and endpoint.ready and not endpoint.chosen:
                yield ("patience", at), self._tell(state, at, "patience", PATIENCE)
            yield from self._dial(state, at, endpoint)

    def _dial(self, state: State, at: int, endpoint: Endpoint) -> Iterable[tuple[Any, State | Broken]]:
        peer: Endpoint = self.machine[state[0][self.back[at]]]
        is_mutual = peer.theirs == endpoint.stamp and peer.stamp == endpoint.theirs
        for lane in endpoint.candidates:
            if lane.dialler != endpoint.name or lane in endpoint.ready or lane in endpoint.failed:
                continue
            assert endpoint.theirs is not None
            names = (lane, endpoint.stamp, endpoint.theirs)
            if lane.dialler in self.undialable:
                failed = LaneFailed(*names, "unreachable")
                yield ("lane fails", at, lane), self._tell(state, at, ("lane fails", lane), (failed,))
                continue
            if state[2][self.lanes_at]:
                failed = LaneFailed(*names, "broke")
                spent = _spent(state, self.lanes_at)
                yield ("lane fails", at, lane), self._tell(spent, at, ("lane fails", lane), (failed,))
            if not is_mutual or endpoint.chosen or peer.chosen:
                continue
            if endpoint.is_chooser:  # What the other hears of it changes nothing.
                yield ("lane", at, lane), self._tell(state, at, ("lane", lane), (LaneReady(*names),))
            else:
                heard = self._bit(self.back[at], LaneReady(lane, peer.stamp, endpoint.stamp))
                yield ("lane", at, lane), (state[0], state[1] | heard, state[2])

    def _crash(self, state: State, process: int) -> State:
        cores = tuple(
            self._fresh(at, self.machine[number].incarnation + 1) if self.pairs[at][0] == process else number
            for at, number in enumerate(state[0])
        )
        _, _, left = _spent(state, process)
        return cores, state[1], left

    def _deliver(self, state: State, at: int, bit: int) -> State | Broken:
        number = state[0][at]
        after = self._tell(state, at, bit, (self.mail_of(bit)[1],))
        if not isinstance(after, Broken) and after[0][at] != number:
            before: Endpoint = self.machine[number]
            now: Endpoint = self.machine[after[0][at]]
            was, is_now = (before.stamp, before.theirs), (now.stamp, now.theirs)
            if before.phase is Phase.CONNECTED and (now.phase is not Phase.CONNECTED or is_now != was):
                peer: Endpoint = self.machine[state[0][self.back[at]]]
                if peer.chosen and peer.theirs == before.stamp and peer.stamp == before.theirs:
                    return Broken(f"a live connection is displaced: {before.peer} is still in it and well")
        return after

    def _tell(self, state: State, at: int, key: Any, events: Sequence[Event]) -> State | Broken:
        """Endpoint `at` hears `events`; `key` names them, for a core is asked once only."""
        cores, sent, left = state
        made = self._made.get((cores[at], key))
        if made is None:
            made = self._made[cores[at], key] = self._make(cores[at], at, events)
        if isinstance(made, Broken):
            return made
        return (*cores[:at], made[0], *cores[at + 1 :]), sent | made[1], left

    def _make(self, number: int, at: int, events: Sequence[Event]) -> tuple[int, int] | Broken:
        before: Endpoint = self.machine[number]
        posted = 0
        try:
            for event in events:
                number, effects = self.machine.step(number, event)
                for effect in effects:
                    if isinstance(effect, Send):
                        posted |= self._bit(self.back[at], self._without_highest(effect.message))
        except (AssertionError, ProtocolError) as error:
            return Broken(f"{before.name} raised {type(error).__name__}: {error}")
        after: Endpoint = self.machine[number]
        if after.stamp < before.stamp or (after.stamp == before.stamp and before.chosen and not after.chosen):
            return Broken(f"{before.name} went back from its endpoint {before.stamp} to {after.stamp}")
        number = self.machine.number(msgspec.structs.replace(after, expires_s=None, choose_s=None))
        if after.phase is Phase.RETIRING:
            at_once = self._make(number, at, (Released(),))
        elif after.phase is Phase.CONNECTED and before.phase is not Phase.CONNECTED:
            at_once = self._make(number, at, BEAT)
        else:
            return number, posted
        return at_once if isinstance(at_once, Broken) else (at_once[0], at_once[1] | posted)

    def _without_highest(self, message: Message) -> Message:
        """Here nobody can know a later life of the receiver than the one it has, so `highest` changes nothing."""
        if not isinstance(message, Reject):
            return message
        return msgspec.structs.replace(message, highest=NOBODY)

    def _bit(self, at: int, event: Event) -> int:
        bit = self.mail.bit((at, event))
        self._into[at] |= bit
        return bit

    def mail_of(self, bit: int) -> tuple[int, Event]:
        return next(self.mail.read(bit))

    # --- what is alike -------------------------------------------------------------------------------------------

    def _reduced(self, state: State) -> State:
        """Messages that can change nothing any more are dropped. Of those that can only teach their receiver how far their sender
        is one is kept in the place of all, and those that would only be answered with the like are answered at once.

        This leans on the rules that are checked (what is older than known is not listened to). So the worlds of one fault are
        walked without it, too.
        """
        cores, sent, left = state
        twice = (*enumerate(self.pairs), *enumerate(self.pairs))  # An answer may be dead, too.
        for at, (process, _) in twice:
            mine = sent & self._into[at]
            if mine:
                key = (cores[at], cores[self.back[at]], mine, bool(left[process]))
                kept = self._kept.get(key)
                if kept is None:
                    kept = self._kept[key] = self._keep(at, *key)
                sent = (sent ^ mine) | kept
        return cores, sent, left

    def _keep(self, at: int, number: int, peer_number: int, mine: int, may_crash: bool) -> int:
        endpoint: Endpoint = self.machine[number]
        peer: Endpoint = self.machine[peer_number]
        kept = 0
        for bit in _bits(mine):
            event = self.mail_of(bit)[1]
            if isinstance(event, LaneReady):
                is_over = event.mine < endpoint.stamp or event.theirs < endpoint.known
                kept |= 0 if is_over or endpoint.chosen or event.lane in endpoint.ready else bit
                continue
            assert isinstance(event, endpoints.MESSAGES)
            is_old = event.me < endpoint.known and event.me.incarnation == endpoint.known.incarnation
            if is_old and not may_crash:
                continue
            if event.me.incarnation < endpoint.known.incarnation and not may_crash:
                # Not listened to; its sender is told, which is of another life now.
                kept |= self._bit(at, Accept(event.sender, OLDEST, NOBODY, self.offers))
                kept |= self._bit(
                    self.back[at], Reject(endpoint.name, endpoint.stamp, NOBODY, NOBODY, NOBODY)
                )
                continue
            if isinstance(event, Reject):
                if event.me <= endpoint.known and event.echo < endpoint.stamp and not may_crash:
                    continue
                is_hint = not event.refusal and (
                    event.echo < endpoint.stamp or event.regarding is None or event.regarding < endpoint.known
                )
                hint: Any = Reject(event.sender, event.me, NOBODY, NOBODY, NOBODY)
            elif isinstance(event, Open):
                is_hint, hint = False, None
            else:
                is_hint = event.me < peer.stamp and (is_old or event.echo < endpoint.stamp)
                hint = Accept(event.sender, event.me, NOBODY, self.offers)
                if is_hint and event.me == endpoint.known:
                    kept |= self._bit(
                        self.back[at], Reject(endpoint.name, endpoint.stamp, NOBODY, NOBODY, NOBODY)
                    )
            kept |= self._bit(at, hint) if is_hint else bit
        return kept

    # --- what must hold ------------------------------------------------------------------------------------------

    def wrong(self, state: State) -> str | None:
        cores = state[0]
        for at, number in enumerate(cores):
            back = self.back[at]
            if at < back:
                key = (number, cores[back])
                judged = self._judged.get(key, "")
                if judged == "":
                    judged = self._judged[key] = self._judge(self.machine[number], self.machine[cores[back]])
                if judged is not None:
                    return judged
        return None

    def _judge(self, one: Endpoint, two: Endpoint) -> str | None:
        """Both connected: then to each other, over the same lanes."""
        if one.phase is not Phase.CONNECTED or two.phase is not Phase.CONNECTED:
            return None
        if one.theirs != two.stamp or two.theirs != one.stamp:
            return (
                f"crossed: {one.name} {one.stamp} is connected with {one.theirs}, and {two.name} {two.stamp} with "
                f"{two.theirs}"
            )
        if one.chosen != two.chosen:
            return f"{one.name} sends over {one.chosen}, {two.name} over {two.chosen}"
        chooser = one if one.is_chooser else two
        if not chooser.chosen or not set(chooser.chosen) <= set(chooser.ready):
            return f"bytes may go over {chooser.chosen}, and only {chooser.ready} were opened"
        return None

    def good(self, state: State) -> bool:
        """All are connected to all, to each other's endpoint of now."""
        cores = state[0]
        for at, number in enumerate(cores):
            back = self.back[at]
            if at < back:
                key = (number, cores[back])
                agreed = self._agreed.get(key)
                if agreed is None:
                    one, two = self.machine[number], self.machine[cores[back]]
                    agreed = self._agreed[key] = (
                        one.phase is two.phase is Phase.CONNECTED and one.theirs == two.stamp
                    )
                if not agreed:
                    return False
        return True

    def tell(self, state: State, action: tuple[Any, ...], after: State | Broken) -> str:
        what, which = action[0], action[1]
        if what == "crash":
            return f"{self.names[which]} dies and is back, knowing nothing"
        if what == "deliver":
            at, event = self.mail_of(which)
            me, peer = (self.names[number] for number in self.pairs[at])
            said = f"{me} hears {_words(event)}" + (f" of {peer}" if not isinstance(event, LaneReady) else "")
        else:
            at = which
            me, peer = (self.names[number] for number in self.pairs[at])
            said = {
                "open": f"{me} opens to {peer}",
                "deadline": f"{me}'s time for {peer} is over",
                "retire": f"{me} retires its endpoint to {peer}",
                "patience": f"{me} waits for no more lanes",
                "lane": f"{me} dials {peer}: the lane is up",
                "lane fails": f"{me} dials {peer} in vain",
            }[what]
        if isinstance(after, Broken) or after[0][at] == state[0][at]:
            return said
        now: Endpoint = self.machine[after[0][at]]
        paired = f" with {now.theirs}" if now.theirs else ""
        return f"{said}: {me} is {now.phase} as {now.stamp}{paired}"


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low
        mask ^= low


def _spent(state: State, which: int) -> State:
    cores, sent, left = state
    return cores, sent, (*left[:which], left[which] - 1, *left[which + 1 :])


def _words(event: Any) -> str:
    if isinstance(event, LaneReady):
        return f"that the lane dialled by {event.lane.dialler} is up"
    echo = getattr(event, "echo", None)
    return f"{type(event).__name__} {event.me}" + (f" to {echo}" if echo else "")


def worlds(budget: Literal["small", "full"]) -> Sequence[World[Any]]:
    """Full: two peers, a crash and a re-open of each; with timers or a lane that fails, fewer at a time; three peers, no faults."""
    fault_free = [
        Endpoints(),
        Endpoints(undialable="a"),
        Endpoints(undialable="b"),
        Endpoints(kinds=("shm", "tcp")),
    ]
    if budget == "small":
        unreduced = Endpoints(reopens=(1, 0), is_reduced=False)
        return [*fault_free, unreduced, Endpoints(crashes=(1, 0), reopens=(0, 1))]
    return [
        *fault_free,
        Endpoints(reopens=(1, 0), is_reduced=False),
        Endpoints(reopens=(0, 1), is_reduced=False),
        Endpoints(crashes=(1, 0), is_reduced=False),
        Endpoints(crashes=(0, 1), is_reduced=False),
        Endpoints(timers=1, is_reduced=False),
        Endpoints(processes=3),
        Endpoints(timers=1, lane_failures=1),
        Endpoints(timers=1, crashes=(1, 0)),
        Endpoints(timers=1, crashes=(0, 1)),
        Endpoints(crashes=1),
        Endpoints(reopens=1),
        Endpoints(crashes=1, reopens=(1, 0)),
        Endpoints(crashes=1, reopens=(0, 1)),
        Endpoints(crashes=(1, 0), reopens=1),
        Endpoints(crashes=(0, 1), reopens=1),
        Endpoints(crashes=1, reopens=1),  # Twenty minutes of one core.
    ]


def diagrams() -> dict[str, Diagram]:
    return {
        "endpoints": Diagram(
            "One endpoint (core/endpoints)",
            tuple(Phase),
            from_table(endpoints.TABLE),
            initial=Phase.IDLE,
            final=(Phase.CONNECTED,),
        )
    }
