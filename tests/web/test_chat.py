"""POST /v1/chat/completions: the template, and the shapes of its answers."""

from __future__ import annotations

import json

import pytest

TEXT = "Hello, Zürich 🚂!"


def chunks(body: bytes) -> list[dict]:
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_messages_pass_through_the_models_template_once(world) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": "d", "name": "somebody"},
    ]
    answer = await world.chat(messages=messages)
    assert answer.status == 200
    said = "<|begin|><|system|>Be brief.<|end|><|user|>a\nb<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>"
    assert world.fleet.requests[0].prompt == world.text.encode(said, add_special=False)


async def test_a_whole_answer_has_all_fields_of_openai(world) -> None:
    got = (await world.chat()).json
    assert got["object"] == "chat.completion"
    assert got["id"].startswith("chatcmpl-")
    assert got["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == got["usage"]["prompt_tokens"] - 1
    assert set(got) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}


async def test_a_stream_opens_with_the_role_and_closes_with_an_empty_delta(world) -> None:
    got = chunks((await world.chat(stream=True, stream_options={"include_usage": True})).body)
    assert {c["object"] for c in got} == {"chat.completion.chunk"}
    assert len({c["id"] for c in got}) == 1
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in got[:-1]) == TEXT
    assert got[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["total_tokens"] > 0
    assert all(c["usage"] is None for c in got[:-1])


async def test_a_chat_may_fill_the_context_unless_a_bound_is_given(world) -> None:
    await world.chat()
    request = world.fleet.requests[0]
    assert request.sampling.max_tokens == 256 - len(request.prompt)
    await world.chat(max_completion_tokens=5)
    await world.chat(max_tokens=6)
    assert [r.sampling.max_tokens for r in world.fleet.requests[1:]] == [5, 6]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_show_tokens_bytes_and_alternatives(world, stream: bool) -> None:
    answer = await world.chat(logprobs=True, top_logprobs=3, stream=stream)
    got = chunks(answer.body) if stream else [answer.json]
    content = [entry for c in got for entry in ((c["choices"][0]["logprobs"] or {}).get("content", []))]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == TEXT
    assert content[-1]["token"] == "<|end|>"
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert content[0]["top_logprobs"][0] == {
        "token": content[0]["token"], "logprob": -0.5, "bytes": content[0]["bytes"],
    }  # fmt: skip
    bare = (await world.chat(logprobs=True)).json["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in bare)


async def test_each_of_n_choices_opens_and_closes(world) -> None:
    got = chunks((await world.chat(n=2, stream=True)).body)
    for index in (0, 1):
        mine = [c["choices"][0] for c in got if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT
        assert mine[-1]["finish_reason"] == "stop"
