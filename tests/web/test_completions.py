"""POST /v1/completions: what goes to the fleet, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest

TEXT = "Hello, Zürich 🚂!"


def chunks(body: bytes) -> list[dict[str, Any]]:
    events = body.decode().split("\n\n")
    assert events.pop() == "", "every event ends with an empty line"
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_a_whole_answer_has_all_fields_of_openai(world) -> None:
    answer = await world.complete(max_tokens=100)
    assert answer.status == 200
    got = answer.json
    prompt = len(world.text.encode("hello"))
    made = len(world.text.encode(TEXT)) + 1
    assert got == {
        "id": got["id"],
        "object": "text_completion",
        "created": got["created"],
        "model": "tiny",
        "system_fingerprint": got["system_fingerprint"],
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": prompt - 1},
        },
    }
    assert got["id"].startswith("cmpl-")
    assert answer.headers["x-interlock-engine"] == "engine-0"
    assert answer.headers["x-request-id"] == got["id"]
    assert not world.fleet.aborted


async def test_the_bytes_of_a_stream_are_exactly_openais(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.web.requests.uuid4", lambda: type("U", (), {"hex": "1"}))
    monkeypatch.setattr("interlock.web.front.Front.system_fingerprint", lambda self: None)
    ids = [world.text.encode(c, add_special=False)[0] for c in "ab"]
    step = world.fleet.script.__globals__["Step"]
    world.fleet.script = lambda request: [step(ids[:1]), step(ids[1:], "length")]
    answer = await world.complete(stream=True, max_tokens=2, stream_options={"include_usage": True})
    created = json.loads(answer.body.split(b"\n\n")[0].removeprefix(b"data: "))["created"]
    head = f'{{"id":"cmpl-1","object":"text_completion","created":{created},"model":"tiny","system_fingerprint":null,'
    n = len(world.text.encode("hello"))
    usage = (
        f'{{"prompt_tokens":{n},"completion_tokens":2,"total_tokens":{n + 2},'
        f'"prompt_tokens_details":{{"cached_tokens":{n - 1}}}}}'
    )
    assert answer.body.decode() == (
        f'data: {head}"choices":[{{"index":0,"text":"a","logprobs":null,"finish_reason":null}}],"usage":null}}\n\n'
        f'data: {head}"choices":[{{"index":0,"text":"b","logprobs":null,"finish_reason":"length"}}],"usage":null}}\n\n'
        f'data: {head}"choices":[],"usage":{usage}}}\n\n'
        "data: [DONE]\n\n"
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"


async def test_streamed_and_whole_text_are_equal_and_usage_comes_only_when_asked_for(world) -> None:
    whole = (await world.complete(max_tokens=100)).json
    for options, has_usage in ((None, False), ({"include_usage": True}, True)):
        got = chunks((await world.complete(max_tokens=100, stream=True, stream_options=options)).body)
        assert "".join(c["choices"][0]["text"] for c in got if c["choices"]) == whole["choices"][0]["text"]
        assert [c["choices"][0]["finish_reason"] for c in got if c["choices"]][-1] == "stop"
        assert ("usage" in got[0]) == has_usage
        assert (got[-1].get("usage") == whole["usage"]) == has_usage


@pytest.mark.parametrize(
    "prompt",
    ["hello", ["hello", "Zürich"], [10, 11, 12], [[10, 11], [12]]],
    ids=["text", "texts", "ids", "id lists"],
)
async def test_every_form_of_prompt_reaches_the_fleet_as_token_ids(world, prompt: Any) -> None:
    got = (await world.complete(prompt=prompt, max_tokens=3)).json
    as_ids = {
        "hello": [world.text.encode("hello")],
    }.get(prompt if isinstance(prompt, str) else "")
    if as_ids is None:
        if isinstance(prompt[0], str):
            as_ids = [world.text.encode(one) for one in prompt]
        else:
            as_ids = [prompt] if isinstance(prompt[0], int) else prompt
    assert [request.prompt for request in world.fleet.requests] == as_ids
    assert [choice["index"] for choice in got["choices"]] == list(range(len(as_ids)))
    assert got["usage"]["prompt_tokens"] == sum(map(len, as_ids))
    assert got["usage"]["completion_tokens"] == 3 * len(as_ids)


async def test_every_parameter_reaches_the_engine(world) -> None:
    await world.complete(
        max_tokens=9, temperature=0.25, top_p=0.5, top_k=-1, min_p=0.125, seed=-5, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, min_tokens=2, stop_token_ids=[7], ignore_eos=True, logit_bias={"3": -100}, logprobs=2,
        cache_salt="tenant", priority=-4, user="somebody",
    )  # fmt: skip
    request = world.fleet.requests[0]
    sampling = request.sampling
    assert (request.tenant, request.priority) == ("tenant", -4)
    assert {name: getattr(sampling, name) for name in sampling.__struct_fields__} == {
        "max_tokens": 9, "temperature": 0.25, "top_p": 0.5, "top_k": 0, "min_p": 0.125, "seed": -5,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5, "min_tokens": 2,
        "stop_token_ids": [7], "ignore_eos": True, "logit_bias": {3: -100.0}, "logprobs": 2,
    }  # fmt: skip


async def test_what_is_not_said_is_the_models_default_then_vllms(world) -> None:
    await world.complete()
    sampling = world.fleet.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.5, 20, 1.0, 16)
    assert sampling.logprobs is None
    await world.complete(temperature=1e-6)
    assert world.fleet.requests[1].sampling.temperature == 0.0


async def test_n_choices_are_n_requests_with_seeds_of_their_own(world) -> None:
    got = (await world.complete(prompt=["a", "b"], n=3, seed=2**63 - 1, max_tokens=2)).json
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3, 4, 5]
    seeds = [request.sampling.seed for request in world.fleet.requests]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1] * 2
    assert len({request.id for request in world.fleet.requests}) == 6
    assert got["usage"]["completion_tokens"] == 12
    assert got["usage"]["prompt_tokens"] == 2


async def test_many_choices_stream_side_by_side_each_complete(world) -> None:
    got = chunks((await world.complete(n=4, stream=True, max_tokens=100)).body)
    for index in range(4):
        mine = [c["choices"][0] for c in got if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == TEXT
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


async def test_best_of_returns_the_likeliest_and_counts_them_all(world) -> None:
    got = (await world.complete(n=1, best_of=3, seed=1, max_tokens=2, return_token_ids=True)).json
    assert len(got["choices"]) == 1
    assert got["choices"][0]["index"] == 0
    assert got["choices"][0]["logprobs"] is None
    assert got["usage"]["completion_tokens"] == 6


async def test_echo_puts_the_prompt_before_each_answer(world) -> None:
    got = (await world.complete(echo=True, n=2, max_tokens=100)).json
    assert [choice["text"] for choice in got["choices"]] == ["hello" + TEXT] * 2
    streamed = chunks((await world.complete(echo=True, max_tokens=100, stream=True)).body)
    assert "".join(c["choices"][0]["text"] for c in streamed) == "hello" + TEXT
    ids = world.text.encode("hello")
    assert (await world.complete(prompt=ids, echo=True)).json["choices"][0]["text"].startswith("hello")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_the_request_and_the_bill(world, stream: bool) -> None:
    answer = await world.complete(stop=["rich", "zzz"], max_tokens=100, stream=stream, stream_options={"include_usage": True} if stream else None)  # fmt: skip
    got = chunks(answer.body) if stream else [answer.json]
    choices = [c["choices"][0] for c in got if c["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Hello, Zü"
    assert choices[-1]["finish_reason"] == "stop"
    assert len(world.fleet.aborted) == 1, "the engine does not go on for nobody"
    usage = got[-1]["usage"]
    assert usage["completion_tokens"] < len(world.text.encode(TEXT))
    kept = await world.complete(stop="rich", max_tokens=100, include_stop_str_in_output=True)
    assert kept.json["choices"][0]["text"] == "Hello, Zürich"


async def test_tokens_behind_a_stop_string_in_the_same_message_are_nobodys(world) -> None:
    step = world.fleet.script.__globals__["Step"]
    ids = world.text.encode(TEXT, add_special=False)
    world.fleet.script = lambda request: [step(ids, "length")]
    got = (await world.complete(stop="rich", max_tokens=100, return_token_ids=True, logprobs=0)).json
    choice = got["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(ids) > got["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_one_entry_a_token_and_offsets_into_the_text(world, stream: bool) -> None:
    answer = await world.complete(logprobs=2, max_tokens=100, stream=stream, return_token_ids=True)
    got = chunks(answer.body) if stream else [answer.json]
    choices = [c["choices"][0] for c in got]
    ids = [i for choice in choices for i in choice["token_ids"]]
    assert ids == [*world.text.encode(TEXT), 0]
    logprobs = [choice["logprobs"] for choice in choices]
    tokens = [t for entry in logprobs for t in entry["tokens"]]
    assert tokens == [world.text.token_text(i) for i in ids]
    offsets = [o for entry in logprobs for o in entry["text_offset"]]
    assert offsets == [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    tops = [t for entry in logprobs for t in entry["top_logprobs"]]
    assert all(len(top) == 2 and top[token] == -0.5 for top, token in zip(tops, tokens, strict=True))
    assert choices[0]["prompt_token_ids"] == world.text.encode("hello")


async def test_a_named_engine_is_asked_for_and_told(world) -> None:
    body = {"model": "tiny", "prompt": "hello"}
    answer = await world.ask("POST", "/v1/completions", body, {"X-Interlock-Engine": "engine-7"})
    assert world.fleet.requests[0].engine == "engine-7"
    assert answer.headers["x-interlock-engine"] == "engine-7"
