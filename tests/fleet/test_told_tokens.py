"""What an earlier life of a front may have delivered is repeated by the engine that made it, or by nobody (simulator, seed 928)."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.core.sampling import Sampling
from interlock.fleet.generation import RequestFailed
from interlock.fleet.hearing import Hearing
from interlock.fleet.kept_requests import note_of
from interlock.fleet.ledger import Entry, GenerationRequest, Life
from interlock.fleet.requests import Requests
from interlock.host.real import RealHost
from interlock.telemetry.events import EventLog
from interlock.wire.engine_messages import Delta, Held, Tokens
from interlock.wire.token_ids import pack_ids

PROMPT = [11, 22, 33]
LIFE = Life("a", 7)


class Roads:
    """No engine is reached: what is to be dispatched waits."""

    membership = None

    def link(self, _: Life) -> None:
        return None

    def usable(self, *_: Any) -> bool:
        return False

    def candidates(self, *_: Any) -> bool:
        return False

    def post(self, *_: Any) -> None: ...


class Link:
    """Where frames of the engine come from."""

    life = LIFE

    async def send(self, _: object) -> None: ...

    async def resume(self) -> None: ...


@pytest.fixture
def requests() -> Requests:
    clock = RealHost().clock
    requests = Requests(clock, EventLog(clock), Roads(), 10)
    request = GenerationRequest(id="r", prompt=PROMPT, sampling=Sampling(max_tokens=9, temperature=1.0))
    note = note_of(Entry(request, attempt=1), 60.0)
    requests.last_life.on_held(LIFE, Held("r", 1, pack_ids(PROMPT), 3, note))
    return requests


async def test_an_answer_whose_told_part_was_lost_with_its_engine_ends_by_name(requests: Requests) -> None:
    """Begun anew it would have other tokens than its client has read: sampled ones, or those of newer weights."""
    generation = requests.last_life.take_up("r")
    Hearing(requests, Roads()).on_tokens(Link(), Tokens([Delta("r", 1, 0, [5, 6], [], "", 0)]))  # type: ignore[arg-type]
    requests.lost(LIFE, "killed")
    assert (await anext(generation)).token_ids == [5, 6]
    with pytest.raises(RequestFailed, match="an earlier life of this front may have delivered more"):
        await anext(generation)
    requests.check_integrity()
    assert not len(requests.ledger)


async def test_an_answer_whose_told_part_is_here_again_goes_on_elsewhere(requests: Requests) -> None:
    Hearing(requests, Roads()).on_tokens(Link(), Tokens([Delta("r", 1, 0, [5, 6, 7], [], "", 0)]))  # type: ignore[arg-type]
    requests.lost(LIFE, "killed")
    requests.check_integrity()
    assert requests.waiting == 1
