"""The requests of one front: waiting, running, ended; and what each word of an engine does to them.

A request waits in the queue until `dispatch_next` finds it an engine. Deltas are judged by the ledger and pushed to its reader;
the end is acknowledged. What ends an attempt without ending the request (an exit, a suspicion, a refusal) puts it back at the
head of the queue, as a continuation where tokens were delivered, or ends it by name.

Requests of an earlier life of this front (`last_life`) go on where they were, unread until somebody takes them up.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, OrderedDict
from typing import Protocol

from interlock.core.errors import InterlockError
from interlock.core.limits import (
    REFUSED_SECONDS,
    REQUEST_FAILURES_MAX,
    REQUEST_SECONDS_MAX,
    RETRY_AFTER_SECONDS,
)
from interlock.core.targets import State
from interlock.fleet.engine_link import EngineLink
from interlock.fleet.generation import Generation, Overloaded, RequestFailed
from interlock.fleet.kept_requests import KeptRequest, kept_whole, note_of
from interlock.fleet.last_life import LastLife
from interlock.fleet.ledger import Entry, GenerationRequest, Heard, Ledger, Life, Verdict
from interlock.fleet.parked import Ended
from interlock.fleet.router import choose, life_of
from interlock.host.base import Clock
from interlock.telemetry.events import EventLog
from interlock.text.continuation import Complete, Continue, Decision, Refuse, decide
from interlock.wire.engine_messages import (
    Abort,
    Acknowledge,
    AcknowledgeAll,
    Cursor,
    Delta,
    Dispatch,
    End,
    Refused,
    Sampling,
    Tokens,
)
from interlock.wire.fleet_messages import Member, Membership
from interlock.wire.token_ids import pack_ids

REFUSALS = ("stale_epoch", "not_running", "invalid", "overloaded", "unknown")
REMINDERS_SLACK = 1024
"""Deadlines of requests that have ended are kept until there are so many more of them than requests."""


class Roads(Protocol):
    """How engines are reached."""

    @property
    def membership(self) -> Membership | None: ...

    def link(self, life: Life) -> EngineLink | None: ...

    def usable(self, life: Life, view: Membership) -> bool: ...

    def candidates(self, view: Membership, besides: Life) -> bool:
        """Whether any other engine may take work now."""
        ...

    def post(self, life: Life, body: Abort) -> None: ...


def cache_salt(tenant: str, version: str) -> str:
    """Separates tenants and weights versions in every prefix cache; the length keeps one name out of another's."""
    return f"{len(tenant)}:{tenant}:{version}"


class Requests:
    """Mutable, one a front; nothing in it waits for a peer."""

    def __init__(
        self, clock: Clock, events: EventLog, roads: Roads, requests_max: int, *, recoverable: bool = False
    ) -> None:
        """`recoverable`: each dispatch carries a note, by which a later life of this front owns the request again."""
        self.ledger = Ledger(requests_max)
        self.counters: Counter[str] = Counter()
        self.wake = asyncio.Event()
        """Set when something may be dispatched that could not be before."""
        self._clock, self._events, self._roads = clock, events, roads
        self._generations: dict[str, Generation] = {}
        self._avoid: dict[str, Life] = {}
        self._queue: OrderedDict[str, None] = OrderedDict()
        self._deadlines: list[tuple[float, str]] = []
        self._recoverable = recoverable
        self.changes = 0
        """Grows whenever `kept` would return other requests."""
        self.last_life = LastLife(self, events)
        self._ends_s: dict[str, float] = {}
        self._suspended_s = 0.0
        self._ticked_s: float | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def add(self, request: GenerationRequest) -> Generation:
        """Into the ledger, which must not be full, and the queue."""
        self.ledger.add(request)
        generation = self._generations[request.id] = Generation(request, self.abort)
        self._remind(self._now_s() + min(request.deadline_s, REQUEST_SECONDS_MAX), request.id)
        self.changes += 1
        self.counters["requests"] += 1
        self._queue[request.id] = None
        self.wake.set()
        return generation

    async def abort(self, request: str) -> None:
        """By its own reader. Idempotent."""
        entry = self.ledger.get(request)
        if entry is not None:
            self.counters["aborted"] += 1
            self._generations[request].close()
            self._stop(entry)

    def wanted(self, life: Life) -> list[Cursor]:
        return [
            Cursor(entry.request.id, entry.attempt, entry.attempt_tokens)
            for entry in self.ledger.running_on(life)
        ]

    def leave(self, life: Life) -> None:
        """It is suspected: what can go on elsewhere does; attempts fence its answers if it wakes."""
        for entry in self.ledger.running_on(life):
            if not isinstance(self._decide(entry), Refuse):
                self._roads.post(life, Abort(entry.request.id, entry.attempt))
                self._event("suspected", entry)
                self._requeue(entry, avoid=life)

    def lost(self, life: Life, why: str) -> int:
        """It is proven over. Returns how many requests it had."""
        stranded = self.ledger.running_on(life)
        for entry in stranded:
            self._failed(entry, f"{life} ended: {why}")
        return len(stranded)

    def fail_waiting(self, error: InterlockError) -> None:
        for entry in self.ledger.entries():
            if entry.life is None:
                self._fail(entry, error)

    def fail_all(self, error: InterlockError) -> None:
        for entry in self.ledger.entries():
            self._fail(entry, error)

    def part(self, error: InterlockError) -> None:
        """This life ends and what is on disk stays: readers are told, engines are not."""
        for generation in self._generations.values():
            generation.cut_off(error)

    def tick(self, target: str | None) -> None:
        """To be called now and then. Deadlines do not run while the fleet is suspended, nor does the time to take a request up
        while it stands."""
        now = self._clock.monotonic_s()
        passed_s = now - self._ticked_s if self._ticked_s is not None else 0.0
        self._ticked_s = now
        if target == State.SUSPENDED:
            self._suspended_s += passed_s
        elif target == State.RUNNING:
            self.last_life.ran(passed_s)
        self._expire_all()

    def _now_s(self) -> float:
        """The clock of deadlines."""
        return self._clock.monotonic_s() - self._suspended_s

    def _expire_all(self) -> None:
        """Ends what has reached its deadline."""
        now = self._now_s()
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = self.ledger.get(heapq.heappop(self._deadlines)[1])
            if entry is not None:
                self._expire(entry)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance."""
        self.ledger.check_integrity()
        ids = {entry.request.id for entry in self.ledger.entries()}
        assert ids == set(self._generations)
        waiting = {entry.request.id for entry in self.ledger.entries() if entry.life is None}
        awaited = self.last_life.awaited
        assert waiting == set(self._queue) | awaited, (waiting, self._queue, awaited)
        assert not awaited & set(self._queue)
        assert set(self._avoid) <= ids
        assert set(self._ends_s) == ids

    # --- from one life of the front to the next -------------------------------------------------------------------

    def kept(self) -> list[KeptRequest]:
        """All of them, for the disk; to be encoded before anything is delivered again."""
        now = self._now_s()
        return [
            kept_whole(entry, max(0.0, self._ends_s[entry.request.id] - now))
            for entry in self.ledger.entries()
        ]

    # What `last_life` asks of it:

    def enter(self, entry: Entry, *, queued: bool) -> None:
        """A request of an earlier life, unread so far; `queued`: to be dispatched anew."""
        request = entry.request
        self.ledger.restore(entry)
        self._generations[request.id] = Generation(request, self.abort)
        self._remind(self._now_s() + min(request.deadline_s, REQUEST_SECONDS_MAX), request.id)
        self.changes += 1
        self.counters["recovered"] += 1
        if queued:
            self._queue[request.id] = None

    def give_reader(self, request: str) -> Generation:
        """A new one, for a request in the ledger; the one before is told."""
        entry = self._entry(request)
        said = f"request {request} was taken up by another connection"
        self._generations[request].cut_off(RequestFailed("taken_up", said))
        generation = self._generations[request] = Generation(entry.request, self.abort)
        return generation

    def requeue(self, entry: Entry) -> None:
        self._requeue(entry)

    def fail(self, entry: Entry, error: InterlockError) -> None:
        self._fail(entry, error)

    # --- what engines say -----------------------------------------------------------------------------------------

    async def on_tokens(self, link: EngineLink, tokens: Tokens) -> None:
        """Judges the whole frame first, then answers it: between the two nothing else can touch a request."""
        aborts: list[Abort] = []
        ends: list[End] = []
        gap = False
        for delta in tokens.deltas:
            heard = self.ledger.accept(delta, link.life)
            if heard.verdict is not Verdict.NEW:
                self.counters[f"deltas_{heard.verdict}"] += 1
            match heard.verdict:
                case Verdict.NEW:
                    self._on_new(link, delta, heard)
                    if heard.finish:
                        ends.append(End(delta.request, delta.attempt))
                case Verdict.CONFLICT:
                    self._on_conflict(link, delta)
                    aborts.append(Abort(delta.request, delta.attempt))
                case Verdict.GAP:
                    gap = True
                case Verdict.STALE | Verdict.UNKNOWN | Verdict.FOREIGN if delta.finish:
                    ends.append(End(delta.request, delta.attempt))
                case Verdict.STALE | Verdict.UNKNOWN | Verdict.FOREIGN:
                    aborts.append(Abort(delta.request, delta.attempt))
                case Verdict.REPEAT:
                    pass
        for abort in aborts:
            await link.send(abort)
        if len(ends) == 1:
            await link.send(Acknowledge(ends[0].request, ends[0].attempt))
        elif ends:
            await link.send(AcknowledgeAll(ends))
        if gap:
            await link.resume()

    def _on_new(self, link: EngineLink, delta: Delta, heard: Heard) -> None:
        entry = self._entry(delta.request)
        finish = "" if heard.finish == "error" else heard.finish
        generation = self._generations[delta.request]
        if delta.request in self.last_life.parked:  # nobody reads yet; the ledger has it
            self._on_parked(link, entry, finish, delta)
        elif not generation.push(
            heard.tokens, heard.logprobs, finish, delta.cached_tokens, delta.detail, delta.version
        ):
            waiting = "its reader is more tokens behind than are kept for it"
            self._fail(entry, RequestFailed("slow_reader", f"request {delta.request} was ended: {waiting}"))
        elif finish:
            self._end(entry, finish)
        elif heard.finish == "error":
            why = delta.detail or "no reason was given"
            self._failed(entry, f"{link.life} failed at it: {why}", link.life)

    def _on_parked(self, link: EngineLink, entry: Entry, finish: str, delta: Delta) -> None:
        if finish:
            self.last_life.parked.end(Ended(entry, finish, delta.detail))
            self._end(entry, finish)
        elif delta.finish:
            self._failed(
                entry, f"{link.life} failed at it: {delta.detail or 'no reason was given'}", link.life
            )

    def _on_conflict(self, link: EngineLink, delta: Delta) -> None:
        self._failed(self._entry(delta.request), f"{link.life} contradicted what it had said", link.life)

    def _entry(self, request: str) -> Entry:
        entry = self.ledger.get(request)
        assert entry is not None, "the ledger has just accepted a word about it"
        return entry

    async def on_refused(self, link: EngineLink, refused: Refused) -> None:
        entry = self.ledger.get(refused.request)
        if entry is None or entry.life != link.life or entry.attempt != refused.attempt:
            return
        self.counters[f"refused_{refused.code if refused.code in REFUSALS else 'other'}"] += 1
        match refused.code:
            case "invalid":
                self._fail(entry, RequestFailed("invalid", refused.message))
            case "stale_epoch":
                link.floor = max(link.floor, refused.epoch)
                self._requeue(entry)
            case "overloaded":
                link.block(RETRY_AFTER_SECONDS)
                view = self._roads.membership
                if entry.delivered or (view is not None and self._roads.candidates(view, link.life)):
                    self._requeue(entry)
                else:
                    self._fail(entry, Overloaded("every engine that could take this request is full"))
            case "unknown" if entry.attempt_tokens:
                self._failed(entry, f"{link.life} does not know it any more", link.life)
            case "unknown":
                self._requeue(entry)  # the dispatch was lost with a connection
            case _:
                link.block(REFUSED_SECONDS)
                self._requeue(entry)

    # --- a request's turns ----------------------------------------------------------------------------------------

    def _decide(self, entry: Entry, max_model_tokens: int | None = None) -> Decision:
        if (
            len(entry.delivered) < entry.told
        ):  # found by the simulator (seed 928): it began anew, with other tokens
            reason = (
                "an earlier life of this front may have delivered more, which only that engine could repeat"
            )
            return Refuse("the answer", reason)
        return decide(entry.request.prompt, entry.request.sampling, entry.delivered, max_model_tokens)

    def _failed(self, entry: Entry, why: str, avoid: Life | None = None) -> None:
        """An engine's fault ended the attempt."""
        if entry.attempt_tokens == 0:
            entry.failures += 1
        if entry.failures >= REQUEST_FAILURES_MAX:
            message = f"request {entry.request.id} failed on {entry.failures} engines; the last: {why}"
            self._fail(entry, RequestFailed("engine_failed", message))
            return
        self._event("attempt_failed", entry, why=why)
        self._requeue(entry, avoid)

    def _requeue(self, entry: Entry, avoid: Life | None = None) -> None:
        """The attempt is over, the request is not: it goes on elsewhere, is complete, or ends by name."""
        request = entry.request.id
        self.changes += 1
        self.ledger.release(request)
        decision = self._decide(entry)
        if isinstance(decision, Refuse):
            lost = f"the engine was lost after {len(entry.delivered)} tokens, and {decision.parameter} cannot be carried on"
            error = RequestFailed(
                "cannot_continue", f"{lost}: {decision.reason}", hint="send the request again"
            )
            self._fail(entry, error)
            return
        if isinstance(decision, Complete):
            self._complete(entry, decision)
            return
        if avoid is not None:
            self._avoid[request] = avoid
        self._queue[request] = None
        self._queue.move_to_end(request, last=False)
        self.wake.set()

    def _complete(self, entry: Entry, end: Complete) -> None:
        if entry.request.id in self.last_life.parked:
            self.last_life.parked.end(Ended(entry, end.finish, end.detail))
        self._generations[entry.request.id].push([], [], end.finish, 0, end.detail)
        self._end(entry, end.finish)

    def _end(self, entry: Entry, cause: str) -> None:
        self.counters[f"ended_{cause}"] += 1
        self._forget(entry.request.id)

    def _fail(self, entry: Entry, error: InterlockError) -> None:
        """Ends the request for its reader, and wherever it runs."""
        code = error.code if isinstance(error, RequestFailed) else type(error).__name__
        self.counters[f"failed_{code}"] += 1
        self._event("request_failed", entry, code=code, message=str(error))
        if entry.request.id in self.last_life.parked:
            self.last_life.parked.end(Ended(entry, error=error))
        self._generations[entry.request.id].fail(error)
        self._stop(entry)

    def _stop(self, entry: Entry) -> None:
        if entry.life is not None:
            self._roads.post(entry.life, Abort(entry.request.id, entry.attempt))
        self._forget(entry.request.id)

    def _forget(self, request: str) -> None:
        self.ledger.remove(request)
        self._queue.pop(request, None)
        self._generations.pop(request, None)
        self._avoid.pop(request, None)
        self._ends_s.pop(request, None)
        self.last_life.awaited.discard(request)
        self.changes += 1
        self.wake.set()

    # --- the pump -------------------------------------------------------------------------------------------------

    async def dispatch_next(self) -> bool:
        """Sends the head of the queue on its way; False when it has to wait."""
        request = next(iter(self._queue))
        entry = self.ledger.get(request)
        view = self._roads.membership
        assert entry is not None
        if view is None:
            return False
        avoid = self._avoid.get(request)
        member = choose(
            view,
            self.ledger.in_flight,
            lambda life: self._roads.usable(life, view),
            prefer=entry.request.engine,
            avoid=() if avoid is None else (avoid,),
        )
        if member is None:
            return False
        del self._queue[request]
        decision = self._decide(entry, member.facts.max_model_tokens)
        if isinstance(decision, Complete):
            self._complete(entry, decision)
            return True
        prompt, sampling = entry.request.prompt, entry.request.sampling
        if isinstance(decision, Continue):
            prompt, sampling = decision.prompt, decision.sampling
            self.counters["continuations"] += 1
        elif entry.attempt:
            self.counters["restarts"] += 1
        await self._dispatch(entry, member, view, prompt, sampling)
        return True

    async def _dispatch(
        self, entry: Entry, member: Member, view: Membership, prompt: list[int], sampling: Sampling
    ) -> None:
        request, life = entry.request, life_of(member)
        self.ledger.assign(request.id, life)
        self._avoid.pop(request.id, None)
        self.counters["dispatches"] += 1
        generation = self._generations[request.id]
        generation.engine, generation.attempts = member.name, entry.attempt
        if entry.attempt > 1:
            self._event("dispatched_again", entry, engine=member.name, delivered=len(entry.delivered))
        link = self._roads.link(life)
        assert link is not None, "the router chooses among those that are reached"
        salt = cache_salt(request.tenant, view.version)
        left_s = max(0.0, self._ends_s[request.id] - self._now_s())
        note = note_of(entry, left_s) if self._recoverable else b""
        packed = pack_ids(prompt)
        body = Dispatch(request.id, entry.attempt, view.epoch, packed, sampling, salt, request.priority, note)
        try:
            await link.send(body)
        except InterlockError as error:  # too long for a frame: no engine will ever take it
            self._fail(entry, RequestFailed("invalid", str(error)))

    # --- time -----------------------------------------------------------------------------------------------------

    def _remind(self, deadline_s: float, request: str) -> None:
        if len(self._deadlines) > 2 * len(self.ledger) + REMINDERS_SLACK:
            self._deadlines = [item for item in self._deadlines if self.ledger.get(item[1]) is not None]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline_s, request))
        self._ends_s[request] = deadline_s

    def _expire(self, entry: Entry) -> None:
        where = f"on {entry.life}" if entry.life else "waiting for an engine"
        said = (
            f"request {entry.request.id} did not end by its deadline; {len(entry.delivered)} tokens were delivered, "
            f"it was {where}"
        )
        self._fail(entry, RequestFailed("deadline", said, retryable=not entry.delivered))

    def _event(self, name: str, entry: Entry, **fields: object) -> None:
        self._events.emit(name, request=entry.request.id, attempt=entry.attempt, **fields)
