"""The requests of one front: waiting, running, ended, read; and what becomes of one whose attempt is over.

A request waits in the queue until `dispatching` finds it an engine; `hearing` judges what engines say of it. What ends an attempt
without ending the request (an exit, a suspicion, a refusal) puts it back at the head of the queue, as a continuation where tokens
were delivered, or ends it by name.

An end is acknowledged to its engine when its reader has come to it, not before (`unread`). Requests of an earlier life (`last_life`)
go on where they were, unread until somebody takes them up.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import Protocol

import msgspec

from interlock.core.continuation import Complete, Decision, Refuse, decide
from interlock.core.errors import InterlockError
from interlock.core.limits import REQUEST_FAILURES_MAX, REQUEST_SECONDS_MAX
from interlock.core.targets import State
from interlock.fleet.deadlines import Deadlines
from interlock.fleet.engine_link import EngineLink
from interlock.fleet.generation import Generation, RequestFailed
from interlock.fleet.kept_requests import KeptRequest, kept_whole
from interlock.fleet.last_life import LastLife
from interlock.fleet.ledger import Entry, GenerationRequest, Ledger, Life
from interlock.fleet.parked import Ended
from interlock.fleet.unread import UnreadEnds
from interlock.host.base import Clock
from interlock.telemetry.events import EventLog
from interlock.wire.engine_messages import Abort, Cursor
from interlock.wire.fleet_messages import Membership


class Roads(Protocol):
    """How engines are reached. Nothing here waits for one."""

    @property
    def membership(self) -> Membership | None: ...

    def link(self, life: Life) -> EngineLink | None: ...

    def usable(self, life: Life, view: Membership) -> bool: ...

    def candidates(self, view: Membership, besides: Life) -> bool:
        """Whether any other engine may take work now."""
        ...

    def post(self, life: Life, body: msgspec.Struct) -> None:
        """Said if there is a connection; where there is none, the next one begins with all that counts."""
        ...


class Requests:
    """Mutable, one a front; nothing in it waits for a peer."""

    def __init__(self, clock: Clock, events: EventLog, roads: Roads, requests_max: int) -> None:
        self.ledger = Ledger(requests_max)
        self.counters: Counter[str] = Counter()
        self.wake = asyncio.Event()
        """Set when something may be dispatched that could not be before, or is to be acknowledged."""
        self.queue: OrderedDict[str, None] = OrderedDict()
        """Requests that wait for an engine, in their order."""
        self.avoided: dict[str, Life] = {}
        """By request, the engine that failed at it last."""
        self.deadlines = Deadlines(clock)
        self.changes = 0
        """Grows whenever `kept` would return other requests."""
        self.unread = UnreadEnds(self.wake.set)
        self.last_life = LastLife(self, events)
        self._clock, self._events, self._roads = clock, events, roads
        self._generations: dict[str, Generation] = {}
        self._ticked_s: float | None = None

    @property
    def waiting(self) -> int:
        """How many wait for an engine."""
        return len(self.queue)

    @property
    def full(self) -> bool:
        """Whether no further request is taken: answers that wait for their readers count."""
        return len(self.ledger) + len(self.unread) >= self.ledger.capacity

    def add(self, request: GenerationRequest) -> Generation:
        """Into the ledger, which must not be full, and the queue."""
        self.ledger.add(request)
        generation = self._generations[request.id] = Generation(request, self.abort, self.unread.read)
        self.deadlines.begin(request.id, min(request.deadline_s, REQUEST_SECONDS_MAX))
        self.changes += 1
        self.counters["requests"] += 1
        self.queue[request.id] = None
        self.wake.set()
        return generation

    async def abort(self, request: str) -> None:
        """By its own reader. Idempotent."""
        entry = self.ledger.get(request)
        if entry is None:
            self.unread.read(request)
            return
        self.counters["aborted"] += 1
        self._generations[request].close()
        self._stop(entry)

    def wanted(self, life: Life) -> list[Cursor]:
        """What that engine is to keep and to go on with."""
        running = [
            Cursor(entry.request.id, entry.attempt, entry.attempt_tokens)
            for entry in self.ledger.running_on(life)
        ]
        return running + self.unread.wanted(life)

    def leave(self, life: Life) -> None:
        """It is suspected: what can go on elsewhere does; attempts fence its answers if it wakes."""
        for entry in self.ledger.running_on(life):
            if not isinstance(self.decide(entry), Refuse):
                self._roads.post(life, Abort(entry.request.id, entry.attempt))
                self.event("suspected", entry)
                self.requeue(entry, avoid=life)

    def lost(self, life: Life, why: str) -> int:
        """It is proven over, or will never be reached again. Returns how many requests it had."""
        self.unread.lost(life)
        stranded = self.ledger.running_on(life)
        for entry in stranded:
            self.failed(entry, f"{life} ended: {why}")
        return len(stranded)

    def fail_waiting(self, error: InterlockError) -> None:
        """Ends what has no engine."""
        for entry in self.ledger.entries():
            if entry.life is None:
                self.fail(entry, error)

    def fail_all(self, error: InterlockError) -> None:
        """Ends everything, for readers and engines."""
        for entry in self.ledger.entries():
            self.fail(entry, error)

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
            self.deadlines.stand_still(passed_s)
        elif target == State.RUNNING:
            self.last_life.ran(passed_s)
        for request in self.deadlines.due():
            self._expire(self.entry(request))

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance."""
        self.ledger.check_integrity()
        self.deadlines.check_integrity()
        ids = {entry.request.id for entry in self.ledger.entries()}
        assert ids == set(self._generations)
        waiting = {entry.request.id for entry in self.ledger.entries() if entry.life is None}
        awaited = self.last_life.awaited
        assert waiting == set(self.queue) | awaited, (waiting, self.queue, awaited)
        assert not awaited & set(self.queue)
        assert set(self.avoided) <= ids
        assert len(self.deadlines) == len(ids)
        assert not any(request in self.unread for request in ids)

    # --- from one life of the front to the next -------------------------------------------------------------------

    def kept(self) -> list[KeptRequest]:
        """All of them, for the disk; to be encoded before anything is delivered again."""
        return [kept_whole(entry, self.deadlines.left_s(entry.request.id)) for entry in self.ledger.entries()]

    # What `last_life` asks of it:

    def enter(self, entry: Entry, *, queued: bool) -> None:
        """A request of an earlier life, unread so far; `queued`: to be dispatched anew."""
        request = entry.request
        self.ledger.restore(entry)
        self._generations[request.id] = Generation(request, self.abort, self.unread.read)
        self.deadlines.begin(request.id, min(request.deadline_s, REQUEST_SECONDS_MAX))
        self.changes += 1
        self.counters["recovered"] += 1
        if queued:
            self.queue[request.id] = None

    def give_reader(self, request: str) -> Generation:
        """A new one, for a request in the ledger; the one before is told."""
        entry = self.entry(request)
        said = f"request {request} was taken up by another connection"
        self._generations[request].cut_off(RequestFailed("taken_up", said))
        generation = self._generations[request] = Generation(entry.request, self.abort, self.unread.read)
        return generation

    # --- a request's turns ----------------------------------------------------------------------------------------

    def entry(self, request: str) -> Entry:
        """Of a request that is known to be in the ledger."""
        entry = self.ledger.get(request)
        assert entry is not None, f"request {request} is not in the ledger"
        return entry

    def generation(self, request: str) -> Generation:
        """Its reader's end."""
        return self._generations[request]

    def decide(self, entry: Entry, max_model_tokens: int | None = None) -> Decision:
        """How it could go on elsewhere (`core/continuation`)."""
        if (
            len(entry.delivered) < entry.told
        ):  # found by the simulator (seed 928): it began anew, with other tokens
            reason = (
                "an earlier life of this front may have delivered more, which only that engine could repeat"
            )
            return Refuse("the answer", reason)
        return decide(entry.request.prompt, entry.request.sampling, entry.delivered, max_model_tokens)

    def failed(self, entry: Entry, why: str, avoid: Life | None = None) -> None:
        """An engine's fault ended the attempt."""
        if entry.attempt_tokens == 0:
            entry.failures += 1
        if entry.failures >= REQUEST_FAILURES_MAX:
            message = f"request {entry.request.id} failed on {entry.failures} engines; the last: {why}"
            self.fail(entry, RequestFailed("engine_failed", message))
            return
        self.event("attempt_failed", entry, why=why)
        self.requeue(entry, avoid)

    def requeue(self, entry: Entry, avoid: Life | None = None) -> None:
        """The attempt is over, the request is not: it goes on elsewhere, is complete, or ends by name."""
        request = entry.request.id
        self.changes += 1
        self.ledger.release(request)
        decision = self.decide(entry)
        if isinstance(decision, Refuse):
            self.refuse(entry, decision)
            return
        if isinstance(decision, Complete):
            self.complete(entry, decision)
            return
        if avoid is not None:
            self.avoided[request] = avoid
        self.queue[request] = None
        self.queue.move_to_end(request, last=False)
        self.wake.set()

    def refuse(self, entry: Entry, why: Refuse) -> None:
        """Nobody else could go on from what was delivered."""
        lost = f"the engine was lost after {len(entry.delivered)} tokens, and {why.parameter} cannot be carried on"
        error = RequestFailed("cannot_continue", f"{lost}: {why.reason}", hint="send the request again")
        self.fail(entry, error)

    def complete(self, entry: Entry, end: Complete) -> None:
        """All of it was delivered, only the word of its end was lost."""
        if entry.request.id in self.last_life.parked:
            self.last_life.parked.end(Ended(entry, end.finish, end.detail))
        self._generations[entry.request.id].push([], [], end.finish, 0, end.detail)
        self.end(entry, end.finish)

    def end(self, entry: Entry, cause: str) -> None:
        """By an end that its reader was given."""
        self.counters[f"ended_{cause}"] += 1
        self._forget(entry.request.id)

    def fail(self, entry: Entry, error: InterlockError) -> None:
        """Ends the request for its reader, and wherever it runs."""
        code = error.code if isinstance(error, RequestFailed) else type(error).__name__
        self.counters[f"failed_{code}"] += 1
        self.event("request_failed", entry, code=code, message=str(error))
        if entry.request.id in self.last_life.parked:
            self.last_life.parked.end(Ended(entry, error=error))
        self._generations[entry.request.id].fail(error)
        self._stop(entry)

    def event(self, name: str, entry: Entry, **fields: object) -> None:
        """For the event log."""
        self._events.emit(name, request=entry.request.id, attempt=entry.attempt, **fields)

    def _expire(self, entry: Entry) -> None:
        where = f"on {entry.life}" if entry.life else "waiting for an engine"
        said = (
            f"request {entry.request.id} did not end by its deadline; {len(entry.delivered)} tokens were delivered, "
            f"it was {where}"
        )
        self.fail(entry, RequestFailed("deadline", said, retryable=not entry.delivered))

    def _stop(self, entry: Entry) -> None:
        if entry.life is not None:
            self._roads.post(entry.life, Abort(entry.request.id, entry.attempt))
        self._forget(entry.request.id)

    def _forget(self, request: str) -> None:
        self.ledger.remove(request)
        self._generations.pop(request, None)
        self.avoided.pop(request, None)
        self.deadlines.end(request)
        self.last_life.awaited.discard(request)
        self.changes += 1
        if self.queue:  # else nothing waits for the room that it leaves
            self.queue.pop(request, None)
            self.wake.set()
