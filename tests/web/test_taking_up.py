"""An answer is taken up again at a cursor: the rest of the same stream, token for token, and nobody else's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from interlock.testing.text_files import END_ID
from interlock.text.stream import TextStream
from interlock.web.front import Access

if TYPE_CHECKING:
    from conftest import Answer, World

Make = Callable[..., "World"]


def chunks(answer: Answer) -> list[dict[str, Any]]:
    events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def left_behind(
    world: World, path: str = "/v1/completions", **body: Any
) -> tuple[str, list[dict[str, Any]]]:
    """A stream as its client read it whole; afterwards its requests are those of a front's last life."""
    asked = {"model": "tiny", "stream": True, "return_token_ids": True, **body}
    answer = await world.ask("POST", path, asked)
    assert answer.status == 200, answer.body
    world.fleet.kept = {request.id: request for request in world.fleet.requests}
    return answer.headers["x-request-id"], chunks(answer)


def told(events: list[dict[str, Any]], index: int = 0) -> tuple[str, list[int], str | None]:
    """Text, token ids and end of one choice."""
    text, ids, finish = "", [], None
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                ids += choice.get("token_ids") or []
                finish = choice["finish_reason"] or finish
    return text, ids, finish


def text_after(world: World, ids: list[int], count: int, stop: str | None) -> str:
    """What a client that has the first `count` tokens has not read yet: text is a function of the ids alone."""
    stream = TextStream(
        world.text, prompt=world.text.encode("hello"), stops=[stop] if stop else [], end_ids=[END_ID]
    )
    stream.push(ids[:count])
    return stream.push(ids[count:]) + stream.finish()


@pytest.mark.parametrize("stop", [None, "ürich", "🚂"])
async def test_every_cursor_gets_exactly_the_rest_of_the_stream(world: World, stop: str | None) -> None:
    name, whole = await left_behind(world, prompt="hello", max_tokens=64, stop=stop)
    _, ids, finish = told(whole)
    assert len(ids) > 3
    for after in range(len(ids) + 1):
        rest = chunks(await world.ask("GET", f"/interlock/streams/{name}?after={after}"))
        text, tokens, end = told(rest)
        assert tokens == ids[after:]
        assert text == text_after(world, ids, after, stop)
        assert end == finish
        assert {event["id"] for event in rest} == {name}


async def test_a_chat_is_taken_up_as_a_chat_and_says_its_role_only_at_the_beginning(world: World) -> None:
    messages = [{"role": "user", "content": "hello"}]
    name, whole = await left_behind(world, "/v1/chat/completions", messages=messages, max_tokens=8)
    again = chunks(await world.ask("GET", f"/interlock/streams/{name}"))
    assert [event["choices"] for event in again] == [event["choices"] for event in whole]
    rest = chunks(await world.ask("GET", f"/interlock/streams/{name}?after=2"))
    assert all("role" not in choice["delta"] for event in rest for choice in event["choices"])
    assert told(rest)[1] == told(whole)[1][2:]


async def test_offsets_and_usage_count_from_the_beginning_of_the_answer(world: World) -> None:
    name, whole = await left_behind(
        world, prompt="hello", max_tokens=6, logprobs=1, stream_options={"include_usage": True}
    )
    rest = chunks(await world.ask("GET", f"/interlock/streams/{name}?after=3"))

    def offsets(events: list[dict[str, Any]]) -> list[int]:
        return [
            n for e in events for c in e["choices"] if c["logprobs"] for n in c["logprobs"]["text_offset"]
        ]

    assert offsets(rest) == offsets(whole)[3:]
    assert rest[-1]["usage"] == whole[-1]["usage"]


async def test_each_choice_has_a_cursor_of_its_own(world: World) -> None:
    name, whole = await left_behind(world, prompt=["hello", "hello there"], n=2, max_tokens=5)
    rest = chunks(await world.ask("GET", f"/interlock/streams/{name}?after=0,1,2,5"))
    for index, after in enumerate((0, 1, 2, 5)):
        assert told(rest, index)[1] == told(whole, index)[1][after:]
    refused = await world.ask("GET", f"/interlock/streams/{name}?after=1,2")
    assert (refused.status, refused.error["param"]) == (400, "after")


async def test_an_answer_can_be_had_whole(world: World) -> None:
    name, whole = await left_behind(world, prompt="hello", max_tokens=7)
    answer = await world.ask("GET", f"/interlock/streams/{name}?stream=false")
    text, ids, finish = told(whole)
    (choice,) = answer.json["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (text, ids, finish)
    assert (await world.ask("GET", f"/interlock/streams/{name}?stream=false&after=2")).status == 400


async def test_a_tenants_answer_does_not_exist_for_anybody_else(world: World) -> None:
    name, _ = await left_behind(world, prompt="hello", cache_salt="mine")
    for headers in ({}, {"x-interlock-cache-salt": "yours"}, {"x-interlock-cache-salt": "mine "[:-2]}):
        refused = await world.ask("GET", f"/interlock/streams/{name}", headers=headers)
        assert (refused.status, refused.error["code"]) == (404, "not_found")
    assert not world.fleet.taken_up, "an answer that is refused is not touched"
    assert (
        await world.ask("GET", f"/interlock/streams/{name}", headers={"x-interlock-cache-salt": "mine"})
    ).status == 200


async def test_nobody_takes_up_an_answer_without_the_key(make_world: Make) -> None:
    world = make_world(access=Access(api_key="secret"))
    assert (await world.ask("GET", "/interlock/streams/cmpl-1")).status == 401
    key = {"authorization": "Bearer secret"}
    assert (await world.ask("GET", "/interlock/streams/cmpl-1", headers=key)).status == 404


@pytest.mark.parametrize(
    "query", ["after=-1", "after=x", "after=", "after=1,", "after=" + "9" * 10, "stream=maybe", "cursor=1"]
)
async def test_a_query_that_makes_no_sense_is_refused(world: World, query: str) -> None:
    name, _ = await left_behind(world, prompt="hello")
    assert (await world.ask("GET", f"/interlock/streams/{name}?{query}")).status == 400


async def test_a_choice_that_is_lost_is_named_and_the_others_are_left_alone(world: World) -> None:
    name, _ = await left_behind(world, prompt="hello", n=2)
    del world.fleet.kept[f"{name}-1"]
    refused = await world.ask("GET", f"/interlock/streams/{name}")
    assert (refused.status, refused.error["code"]) == (410, "gone")
    assert "Choice 1" in refused.error["message"]
    assert not world.fleet.taken_up


async def test_a_client_that_claims_more_than_was_made_is_told_so(world: World) -> None:
    name, whole = await left_behind(world, prompt="hello", max_tokens=4)
    answer = await world.ask("GET", f"/interlock/streams/{name}?after=99&stream=true")
    assert b"a client cannot have 99" in answer.body
    assert b"[DONE]" not in answer.body
    assert len(told(whole)[1]) == 4


async def test_a_front_that_still_hears_its_engines_is_waited_for(world: World) -> None:
    name, whole = await left_behind(world, prompt="hello", max_tokens=4)
    kept, world.fleet.kept, world.fleet.recovered = world.fleet.kept, {}, False
    asking = asyncio.create_task(world.ask("GET", f"/interlock/streams/{name}"))
    await asyncio.sleep(0.1)
    assert not asking.done()
    world.fleet.kept = kept
    assert told(chunks(await asking)) == told(whole)


async def test_a_note_of_another_version_is_an_error_by_name(world: World) -> None:
    name, _ = await left_behind(world, prompt="hello")
    request = world.fleet.kept[f"{name}-0"]
    world.fleet.kept[f"{name}-0"] = msgspec.structs.replace(request, note=b"\x80")
    answer = await world.ask("GET", f"/interlock/streams/{name}")
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
