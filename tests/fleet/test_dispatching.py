"""Requests that wait together go out together, and none is lost by what the others are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from scripted_engine import continuation_of, read

from interlock.core.limits import DISPATCHES_PER_FRAME_MAX
from interlock.core.sampling import Sampling
from interlock.fleet.dispatching import cache_salt
from interlock.fleet.generation import RequestFailed
from interlock.fleet.kept_requests import KeptRequest
from interlock.fleet.ledger import GenerationRequest
from interlock.fleet.made import Made
from interlock.wire.engine_messages import Dispatch, DispatchAll

if TYPE_CHECKING:
    from conftest import Fleet


def test_no_tenants_salt_is_anothers() -> None:
    salts = {
        cache_salt(tenant, version) for tenant in ("", "a", "a:1", "1:a") for version in ("1", "1:1", "a")
    }
    assert len(salts) == 12


async def test_what_is_too_long_together_goes_out_one_by_one_and_what_is_too_long_alone_ends_by_name(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.start_coordinator()
    engine = await fleet.engine("a", instant=True)
    await fleet.start_dispatcher()
    await fleet.ready("a")
    monkeypatch.setattr("interlock.wire.framing.FRAME_BYTES_MAX", 20_000)
    prompts = [[number + 1000] * 5_000 for number in range(3)]
    fitting = [fleet.ask(prompt, 1) for prompt in prompts]
    too_long = fleet.ask([1000] * 10_000, 1)
    answers = await asyncio.gather(*(read(generation) for generation in fitting))
    assert answers == [(continuation_of(prompt, 1), "length") for prompt in prompts]
    with pytest.raises(RequestFailed, match="does not fit into a frame") as failed:
        await read(too_long)
    assert failed.value.code == "invalid"
    assert sum(isinstance(body, Dispatch) for body in engine.heard) == 3


async def test_a_burst_is_shared_among_engines_and_leaves_in_few_frames(fleet: Fleet) -> None:
    await fleet.start_coordinator()
    engines = [await fleet.engine(name, instant=True) for name in ("a", "b")]
    await fleet.start_dispatcher()
    await fleet.ready("a", "b")
    frames: list[object] = []
    for link in fleet.dispatcher._links.values():  # type: ignore[union-attr]
        post = link.post
        link.post = lambda body, post=post: (frames.append(body), post(body))[1]  # type: ignore[method-assign]
    count = 2 * DISPATCHES_PER_FRAME_MAX
    asked = [fleet.ask([number], 1) for number in range(count)]
    await asyncio.gather(*(read(generation) for generation in asked))
    sent = [body for body in frames if isinstance(body, Dispatch | DispatchAll)]
    assert len(sent) <= 4
    shares = [sum(isinstance(body, Dispatch) for body in engine.heard) for engine in engines]
    assert shares == [count // 2, count // 2]


async def test_a_line_of_an_earlier_life_that_cannot_be_carried_on_is_not_begun_anew(fleet: Fleet) -> None:
    """Its client has tokens of it: others, from the beginning, would be a wrong answer."""
    await fleet.start_coordinator()
    engine = await fleet.engine("a", instant=True)
    dispatcher = await fleet.start_dispatcher()
    await fleet.ready("a")
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=7)
    request = GenerationRequest(id="kept", prompt=[1, 2], sampling=sampling)
    made = [Made("0", 3)]
    kept = KeptRequest(request=request, prompt_tokens=2, delivered=[3, 4, 5], made=made, attempt=1)
    dispatcher._requests.last_life.restore(kept)
    dispatcher._requests.wake.set()
    with pytest.raises(RequestFailed, match="seed cannot be carried on") as failed:
        await read(dispatcher.take_up("kept"))
    assert failed.value.code == "cannot_continue"
    assert not engine.said(Dispatch)
