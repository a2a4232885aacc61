"""A reader gets every token once, at its own pace, and then exactly one end or one error."""

import asyncio

import pytest

from interlock.core.sampling import Sampling
from interlock.fleet import generation as module
from interlock.fleet.generation import Generation, RequestFailed
from interlock.fleet.ledger import GenerationRequest


async def never(_: str) -> None:
    raise AssertionError


def made() -> Generation:
    return Generation(GenerationRequest(id="r", prompt=[1, 2], sampling=Sampling(max_tokens=9)), never)


async def test_what_waits_is_read_in_one_piece_and_the_end_is_the_last() -> None:
    generation = made()
    generation.push([1], [], "", 1, "")
    generation.push([2, 3], [], "stop", 0, "3")
    pieces = [piece async for piece in generation]
    assert [(p.token_ids, p.finish, p.detail) for p in pieces] == [([1, 2, 3], "stop", "3")]


async def test_a_reader_that_waits_is_woken_by_each_piece() -> None:
    generation = made()
    for n in range(3):
        waiting = asyncio.create_task(anext(generation))
        await asyncio.sleep(0)
        generation.push([n], [], "", 0, "")
        assert (await waiting).token_ids == [n]


async def test_an_error_comes_after_all_that_was_delivered_and_only_once() -> None:
    generation = made()
    generation.push([1], [], "", 0, "")
    generation.fail(RequestFailed("deadline", "late"))
    generation.fail(RequestFailed("closed", "later"))
    assert (await anext(generation)).token_ids == [1]
    with pytest.raises(RequestFailed, match="late"):
        await anext(generation)
    assert await anext(generation, None) is None


async def test_an_error_after_the_end_is_not_told() -> None:
    generation = made()
    generation.push([1], [], "length", 0, "")
    generation.fail(RequestFailed("closed", "later"))
    assert [piece.finish async for piece in generation] == ["length"]


async def test_cached_tokens_are_those_of_the_clients_own_prompt_at_the_first_run() -> None:
    generation = made()
    generation.push([1], [], "", 32, "")
    generation.push([2], [], "length", 0, "")
    assert [piece.cached_tokens async for piece in generation] == [2]


async def test_what_waits_for_a_reader_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_TOKENS_BUFFER_MAX", 3)
    generation = made()
    assert generation.push([1, 2, 3], [], "", 0, "")
    assert not generation.push([4], [], "", 0, "")
    assert (await anext(generation)).token_ids == [1, 2, 3]
    assert generation.push([4], [], "", 0, "")
