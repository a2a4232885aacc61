"""Requests that wait go out to engines: as many at a time as there are, those of one engine in one frame.

`router` decides where, `core/continuation` as what: a request that has tokens already goes out as another one. Nothing here waits
for a peer.
"""

from __future__ import annotations

from interlock.core.continuation import Complete, Continue, Refuse
from interlock.core.errors import LocalProtocolError
from interlock.core.limits import DISPATCH_BATCH_BYTES, DISPATCHES_PER_FRAME_MAX
from interlock.fleet.engine_link import EngineLink
from interlock.fleet.generation import RequestFailed
from interlock.fleet.kept_requests import note_of
from interlock.fleet.ledger import Entry, Life
from interlock.fleet.requests import Requests, Roads
from interlock.fleet.router import Openings, life_of
from interlock.wire.engine_messages import Dispatch, DispatchAll
from interlock.wire.fleet_messages import Member, Membership
from interlock.wire.token_ids import pack_ids


def cache_salt(tenant: str, version: str) -> str:
    """Separates tenants and weights versions in every prefix cache; the length keeps one name out of another's."""
    return f"{len(tenant)}:{tenant}:{version}"


class _Batch:
    """Dispatches on their way to one engine."""

    def __init__(self, link: EngineLink) -> None:
        self.link, self.life = link, link.life
        self.dispatches: list[Dispatch] = []
        self.bytes = 0
        """Of their prompts and notes."""


class Dispatching:
    """One front's hand. `dispatch_some` whenever something may go out that could not before."""

    def __init__(self, requests: Requests, roads: Roads, *, recoverable: bool) -> None:
        """`recoverable`: each dispatch carries a note, by which a later life of this front owns the request again."""
        self._requests, self._roads, self._recoverable = requests, roads, recoverable
        self._batches: dict[str, _Batch] = {}

    def dispatch_some(self) -> bool:
        """Sends the head of the queue on its way, up to one frame's worth; False when what is left has to wait for an engine."""
        view = self._roads.membership
        if view is None:
            return False
        requests, roads = self._requests, self._roads
        openings = Openings(view, requests.ledger.in_flight, lambda life: roads.usable(life, view))
        goes_on = True
        for _ in range(min(len(requests.queue), DISPATCHES_PER_FRAME_MAX)):
            goes_on = self._dispatch_next(view, openings)
            if not goes_on:
                break
        for batch in self._batches.values():
            self._send(batch)
        self._batches.clear()
        return goes_on and bool(requests.queue)

    def _dispatch_next(self, view: Membership, openings: Openings) -> bool:
        requests = self._requests
        entry = requests.entry(next(iter(requests.queue)))
        request = entry.request
        member = openings.choose(request.engine, requests.avoided.get(request.id))
        if member is None:
            return False
        del requests.queue[request.id]
        decision = requests.decide(entry, member.facts.max_model_tokens)
        if isinstance(decision, Complete):
            requests.complete(entry, decision)
            return True
        if isinstance(decision, Refuse):  # a line of an earlier life; others are not queued then
            requests.refuse(entry, decision)
            return True
        prompt, sampling = request.prompt, request.sampling
        if isinstance(decision, Continue):
            prompt, sampling = decision.prompt, decision.sampling
            requests.counters["continuations"] += 1
        elif entry.attempt:
            requests.counters["restarts"] += 1
        batch = self._batch_for(member)
        self._assign(entry, batch.life)
        salt = cache_salt(request.tenant, view.version)
        note = note_of(entry, requests.deadlines.left_s(request.id)) if self._recoverable else b""
        packed = pack_ids(prompt)
        self._add(
            batch,
            Dispatch(request.id, entry.attempt, view.epoch, packed, sampling, salt, request.priority, note),
        )
        return True

    def _batch_for(self, member: Member) -> _Batch:
        batch = self._batches.get(member.name)
        if batch is None:
            link = self._roads.link(life_of(member))
            assert link is not None, "the router chooses among those that are reached"
            batch = self._batches[member.name] = _Batch(link)
        return batch

    def _assign(self, entry: Entry, life: Life) -> None:
        requests, request = self._requests, entry.request.id
        requests.ledger.assign(request, life)
        requests.avoided.pop(request, None)
        requests.counters["dispatches"] += 1
        generation = requests.generation(request)
        generation.engine, generation.attempts = life.name, entry.attempt
        if entry.attempt > 1:
            requests.event("dispatched_again", entry, engine=life.name, delivered=len(entry.delivered))

    def _add(self, batch: _Batch, dispatch: Dispatch) -> None:
        size = len(dispatch.prompt) + len(dispatch.note)
        if batch.bytes + size > DISPATCH_BATCH_BYTES:
            self._send(batch)
        batch.dispatches.append(dispatch)
        batch.bytes += size

    def _send(self, batch: _Batch) -> None:
        dispatches, batch.dispatches, batch.bytes = batch.dispatches, [], 0
        if len(dispatches) > 1:
            try:
                batch.link.post(DispatchAll(dispatches))
            except LocalProtocolError:
                pass  # together they are longer than a frame
            else:
                return
        for dispatch in dispatches:
            try:
                batch.link.post(dispatch)
            except LocalProtocolError as error:  # too long for a frame: no engine will ever take it
                entry = self._requests.entry(dispatch.request)
                self._requests.fail(entry, RequestFailed("invalid", str(error)))
