"""The front's hand on the fleet: requests go out to engines, tokens come in, and a death on the way is not noticed.

Here stand the occasions: a membership heard, an engine reached, suspected or proven gone, a moment passed. What they mean for
requests is in `requests`, what goes out in `dispatching`, what comes in in `hearing`, and `links` says who is reached. Nothing here
waits for a peer: sending fills bounded outboxes, and each link reads in a task of its own. While the fleet is paused nothing is
dispatched.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from interlock.core.limits import NO_MEMBER_SECONDS_MAX, REQUESTS_IN_FLIGHT_MAX
from interlock.core.roster import Sight
from interlock.core.targets import State
from interlock.fleet.client import FleetClient
from interlock.fleet.dispatching import Dispatching
from interlock.fleet.engine_link import EngineLink
from interlock.fleet.generation import Generated, Generation, NoMember, Overloaded, RequestFailed
from interlock.fleet.hearing import Hearing
from interlock.fleet.keeping import RequestsKeeper
from interlock.fleet.ledger import GenerationRequest, Ledger, Life
from interlock.fleet.links import Links
from interlock.fleet.membership_view import ENDED, MembershipView
from interlock.fleet.prospects import Prospects
from interlock.fleet.requests import Requests
from interlock.fleet.router import life_of
from interlock.host.base import Host
from interlock.telemetry.events import EventLog
from interlock.wire.engine_messages import Cursor, Held, Refused, Tokens
from interlock.wire.fleet_messages import Command, CommandProgress, Member, Membership
from interlock.wire.identity import Identity

__all__ = [
    "Dispatcher",
    "Generated",
    "Generation",
    "GenerationRequest",
    "NoMember",
    "Overloaded",
    "RequestFailed",
]

_log = logging.getLogger(__name__)
TICK_SECONDS = 0.1
"""How late a deadline, a silence or the end of a block may be noticed."""


class Dispatcher:
    """One front's dispatcher. `async with Dispatcher(...)`, or `start()` and `close()`, inside a running loop."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        coordinator_address: str,
        *,
        events: EventLog | None = None,
        requests_max: int = REQUESTS_IN_FLIGHT_MAX,
        no_member_s: float = NO_MEMBER_SECONDS_MAX,
        keep_in: Path | None = None,
    ) -> None:
        """`keep_in`: a state directory; requests then outlive this front, on disk while the fleet is suspended and with their
        engines otherwise, and are taken up again by `take_up`."""
        self.stale: asyncio.Future[Exception] | None = None
        """Done when this process must stop: a newer life of this front is known, or a part of it has failed."""
        self._host, self._me, self._address = host, identity, coordinator_address
        self._events = events or EventLog(host.clock)
        self._links = Links(host, identity, self)
        self._requests = Requests(host.clock, self._events, self, requests_max)
        self._hearing = Hearing(self._requests, self)
        self._dispatching = Dispatching(self._requests, self, recoverable=keep_in is not None)
        self._keeper: RequestsKeeper | None = None
        if keep_in is not None:
            self._keeper = RequestsKeeper(
                host,
                keep_in,
                identity.name,
                self._requests,
                self._events,
                on_word=self._say_kept,
                on_released=self._on_released,
            )
        self._recovered: set[str] = set()
        """Names of engines that have told what they hold of earlier lives of this front."""
        self._prospects = Prospects(no_member_s)
        self._view: MembershipView | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._errands: set[asyncio.Task[None]] = set()

    # --- life -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Dispatcher:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Raises `OSError` where requests of an earlier life are kept and the disk fails."""
        self.stale = asyncio.get_running_loop().create_future()
        keeper = self._keeper
        if keeper is not None:
            for kept in await self._host.in_thread(keeper.load):
                self._requests.last_life.restore(kept)
        self._view = MembershipView(
            self._host, self._me, self._address, self._on_membership, self.on_stale, self._links.over, keeper
        )
        self._tasks = [
            asyncio.create_task(self._pump(), name="dispatcher pump"),
            asyncio.create_task(self._tick(), name="dispatcher tick"),
        ]
        if keeper is not None:
            self._tasks.append(asyncio.create_task(keeper.run(), name="dispatcher keeper"))
        for task in self._tasks:
            task.add_done_callback(self._on_end)

    async def close(self) -> None:
        """Aborts what is in flight, tells the engines, and lets go of everything. What is on disk stays there, and with the
        engines. Idempotent."""
        closed = RequestFailed("closed", "the front is shutting down", retryable=True)
        if self._holding:
            self._requests.part(closed)
        else:
            self._requests.fail_all(closed)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._errands, return_exceptions=True)
        if self._view is not None:
            await self._view.close()
        await self._links.close()

    # --- what the web layer asks ----------------------------------------------------------------------------------

    @property
    def membership(self) -> Membership | None:
        """The coordinator's last word; None before the first."""
        return self._view.current if self._view else None

    @property
    def coordinator_connected(self) -> bool:
        """Whether the coordinator is heard now; work goes on without it."""
        return self._view is not None and self._view.connected

    @property
    def ready(self) -> bool:
        """Whether some engine may take work now."""
        view = self.membership
        return view is not None and self._links.candidates(view)

    @property
    def ledger(self) -> Ledger:
        """Every request that has not ended."""
        return self._requests.ledger

    @property
    def counters(self) -> Counter[str]:
        """Since start: requests, dispatches, continuations, restarts, aborts, ends by cause, deltas by verdict."""
        return self._requests.counters

    def in_flight(self) -> dict[str, int]:
        """Requests by engine; "" are those that wait."""
        counts: Counter[str] = Counter({"": self._requests.waiting})
        for life in self.ledger.lives():
            counts[life.name] += self.ledger.in_flight(life)
        return dict(counts)

    def submit(self, request: GenerationRequest) -> Generation:
        """Accepts the request, to run when an engine can. Raises `Overloaded` or `NoMember`; then nothing was begun."""
        if self._requests.full:
            self.counters["overloaded"] += 1
            raise Overloaded(
                f"{self.ledger.capacity} requests are in flight, waiting or not read yet, and no more are taken"
            )
        impossible = self._why_none()
        if impossible is not None:
            self.counters["no_member"] += 1
            raise impossible
        return self._requests.add(request)

    # --- what an earlier life of this front had -------------------------------------------------------------------

    @property
    def recovered(self) -> bool:
        """Whether everything that can be taken up is known here: every engine has told what it holds."""
        view = self.membership
        if self._keeper is None or view is None:
            return self._keeper is None
        return bool(view.members) and all(
            m.name in self._recovered or m.state in ENDED or not m.facts.address for m in view.members
        )

    @property
    def parked(self) -> list[str]:
        """Requests of an earlier life of this front that wait for somebody to take them up."""
        return self._requests.last_life.parked.names()

    def known(self, request: str) -> GenerationRequest | None:
        """What was asked under this name, as long as `take_up` can succeed."""
        return self._requests.last_life.known(request)

    def take_up(self, request: str) -> Generation:
        """Reads a request from its first token on, wherever it is by now; whoever read it before is cut off.

        Raises `KeyError` for what is not here: it ended, or was lost with front and engine.
        """
        return self._requests.last_life.take_up(request)

    @property
    def _holding(self) -> bool:
        return self._keeper is not None and self._keeper.holding

    def _say_kept(self) -> None:
        if self._view is not None:
            self._run_errand(asyncio.create_task(self._view.say(), name="word of what is kept"))

    def _on_released(self) -> None:
        """What engines said while requests were on disk was not taken."""
        for link in self._links.values():
            link.resume()
        self._requests.wake.set()

    def recovers(self, life: Life) -> bool:
        """Of an engine that has not told yet what it holds of earlier lives."""
        return self._keeper is not None and life.name not in self._recovered

    def on_held(self, life: Life, held: Held) -> None:
        """One of its requests, of an earlier life of this front."""
        self._requests.last_life.on_held(life, held)

    def on_held_all(self, life: Life) -> None:
        """What it did not name, it does not have."""
        self._recovered.add(life.name)
        self._requests.last_life.release(life.name)

    def admin(self, command: Command) -> AsyncIterator[CommandProgress]:
        """Passes a command to the coordinator; yields its progress. Raises as `FleetClient.follow` does."""
        return FleetClient(self._host, self._address, self._me).follow(command)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance."""
        self._requests.check_integrity()

    # --- membership -----------------------------------------------------------------------------------------------

    def _why_none(self) -> NoMember | None:
        return self._prospects.why_none(
            self.membership, self._view.last_error if self._view else "not started"
        )

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A defect of ours: better no front, which is noticed and restarted, than one that hangs."""
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            _log.error("%s failed", task.get_name(), exc_info=error)
            self.on_stale(error)

    def _on_membership(self, view: Membership) -> None:
        if self._keeper is not None:
            self._keeper.hear(view)
        newest = {member.name: member.incarnation for member in view.members}
        for member in view.members:
            self._on_member(life_of(member), member)
        for life, link in list(self._links.items()):
            if life.incarnation < newest.get(life.name, 0):
                self.on_gone(link, "a newer life of it is a member")
            elif life.name not in newest and not link.up and not self.ledger.in_flight(life):
                self._requests.unread.lost(life)
                self._links.drop(
                    link
                )  # a coordinator that started again has not heard of it, and neither have we
        if view.target == State.STOPPED:
            stopped = RequestFailed("stopped", "the fleet was stopped", hint="start it, then ask again")
            self._requests.fail_waiting(stopped)
        self._requests.wake.set()

    def _on_member(self, life: Life, member: Member) -> None:
        link = self._links.get(life)
        if member.state in ENDED:
            if link is not None and member.state == Sight.LOST:
                self.on_gone(link, "the coordinator saw its end")
            return
        if not member.facts.address:
            return  # attached: others ask it, not we
        self._links.open(life, member.facts)
        if member.state == Sight.SUSPECT:
            self._suspect(life)

    def _suspect(self, life: Life) -> None:
        view = self.membership
        if view is not None and self.candidates(view, life):
            self._requests.leave(life)

    # --- how engines are reached (Roads) --------------------------------------------------------------------------

    def link(self, life: Life) -> EngineLink | None:
        return self._links.get(life)

    def usable(self, life: Life, view: Membership) -> bool:
        return self._links.usable(life, view)

    def candidates(self, view: Membership, besides: Life) -> bool:
        return self._links.candidates(view, besides)

    def post(self, life: Life, body: msgspec.Struct) -> None:
        self._links.post(life, body)

    # --- what links tell (LinkOwner) ------------------------------------------------------------------------------

    def wanted(self, life: Life) -> list[Cursor]:
        return self._requests.wanted(life)

    def on_up(self) -> None:
        """Something may go out that could not before."""
        self._requests.wake.set()

    def on_tokens(self, link: EngineLink, tokens: Tokens) -> None:
        if self._holding:
            return  # it says them again when the fleet runs; what is on disk is what was delivered
        self._hearing.on_tokens(link, tokens)

    def on_refused(self, link: EngineLink, refused: Refused) -> None:
        self._hearing.on_refused(link, refused)

    def on_unreachable(self, link: EngineLink) -> None:
        self._suspect(link.life)

    def on_stale(self, error: Exception) -> None:
        if self.stale is not None and not self.stale.done():
            self._events.emit("front_must_stop", reason=str(error))
            self.stale.set_result(error)

    def on_gone(self, link: EngineLink, why: str) -> None:
        """Proven over: its requests go on elsewhere."""
        if not self._links.bury(link):
            return
        life = link.life
        count = self._requests.lost(life, why)
        self.counters["engines_gone"] += 1
        self._events.emit(
            "engine_gone", engine=life.name, incarnation=life.incarnation, why=why, requests=count
        )

    def _run_errand(self, task: asyncio.Task[None]) -> None:
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    # --- time -----------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        requests = self._requests
        while True:
            await requests.wake.wait()
            requests.wake.clear()
            self._hearing.acknowledge_read()
            while requests.waiting and not self._holding and self._dispatching.dispatch_some():
                await self._host.clock.sleep_s(0)  # links write before there is more for them
                self._hearing.acknowledge_read()  # under load there is always more, and engines keep what is not acknowledged

    async def _tick(self) -> None:
        while True:
            await self._host.clock.sleep_s(TICK_SECONDS)
            self._requests.tick(self.membership.target if self.membership is not None else None)
            if self._keeper is not None:
                self._keeper.look()
            for life, link in list(self._links.items()):
                if link.silent:
                    self._suspect(life)
                link.resume_if_due()
            self._judge_members()
            if self._requests.waiting:
                self._requests.wake.set()

    def _judge_members(self) -> None:
        impossible = self._why_none()
        overdue = self._prospects.overdue(self._host.clock.monotonic_s(), impossible)
        if overdue and not self._holding:
            self._requests.fail_waiting(RequestFailed("no_member", str(impossible), retryable=True))
