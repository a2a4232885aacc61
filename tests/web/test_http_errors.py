"""Every refusal has OpenAI's shape, the right status, and a sentence that says what to do. Nothing is 500 but a defect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interlock.core import limits
from interlock.core.errors import ChannelFault
from interlock.fleet.generation import NoMember, Overloaded, RequestFailed
from interlock.web.front import Access
from interlock.web.schema import UNSUPPORTED, ChatRequest, CompletionRequest

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": None}, "prompt", "Expected"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "mixes"),
        ({"prompt": [1, [2]]}, "prompt", "mixes"),
        ({"prompt": [-1]}, "prompt", "vocabulary"),
        ({"prompt": [10**30]}, "prompt", "vocabulary"),
        ({"prompt": ["a"] * (limits.PROMPTS_PER_REQUEST_MAX + 1)}, "prompt", "send several"),
        ({"prompt": ["a"] * 100, "n": 3}, "prompt", "generations"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "int"),
        ({"max_tokens": "8"}, "max_tokens", "int"),
        ({"max_tokens": 10**40}, "max_tokens", "<="),
        ({"temperature": -0.1}, "temperature", ">= 0"),
        ({"temperature": 2.1}, "temperature", "<= 2"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"top_k": -2}, "top_k", ">= -1"),
        ({"min_p": 1.1}, "min_p", "<= 1"),
        ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "more than max_tokens"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": limits.CHOICES_MAX + 1}, "n", f"<= {limits.CHOICES_MAX}"),
        ({"best_of": 1, "n": 2}, "best_of", "less than n"),
        ({"best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"logprobs": limits.LOGPROBS_MAX + 1}, "logprobs", "<="),
        ({"logprobs": True}, "logprobs", "int"),
        ({"echo": True, "logprobs": 1}, "echo", "leave one"),
        ({"stop": [""]}, "stop[0]", "length >= 1"),
        ({"stop": ["a"] * 17}, "stop", "length <= 16"),
        ({"stop": "a" * 513}, "stop", "length <= 512"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "Expected `int`"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "vocabulary"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]", "<= 100"),
        ({"stop_token_ids": [5000]}, "stop_token_ids", "vocabulary"),
        ({"seed": 2**63}, "seed", "<="),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream to be true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"temprature": 1}, "temprature", "unknown field"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"prompt": "a\ud800"}, None, "no JSON"),
    ],
)
async def test_impossible_completions_are_400_and_name_the_field(
    world, body: dict[str, Any], param: str | None, words: str
) -> None:
    answer = await world.complete(**body)
    assert answer.status == 400, answer.body
    assert answer.headers["content-type"] == "application/json"
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert not world.fleet.requests, "nothing was begun"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "robot"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "needs content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type", "image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "no text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"audio": {}}, "audio", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"chat_template": "{{ x }}"}, "chat_template", "not supported"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must not set"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs", "must not set"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs to be true"),
        ({"logprobs": 2}, "logprobs", "bool"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"best_of": 2}, "best_of", "not of chats"),
        ({"prompt": "x"}, "prompt", "unknown field"),
    ],
)  # fmt: skip
async def test_impossible_chats_are_400_and_name_the_field(
    world, body: dict[str, Any], param: str, words: str
) -> None:
    answer = await world.chat(**body)
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param
    assert words in answer.error["message"]
    assert not world.fleet.requests


async def test_what_a_client_library_always_sends_is_no_error(world) -> None:
    neutral = {
        name: values[-1] for name, values in UNSUPPORTED.items() if name in ChatRequest.__struct_fields__
    }
    assert (await world.chat(**neutral)).status == 200
    nulls = dict.fromkeys(set(CompletionRequest.__struct_fields__) - {"model", "prompt"})
    assert (await world.complete(**nulls)).status == 200


async def test_variables_of_any_name_may_be_given_to_the_template(world) -> None:
    answer = await world.chat(chat_template_kwargs={"no_such": 1, "self": 2, "context": 3}, messages=USER)
    assert answer.status == 200, "unused variables are harmless, whatever their names"


@pytest.mark.parametrize("body", [b"", b"{", b'"x"', b"[]", b"null", b'{"a":1}{', b"\xff\xfe", b"[" * 5000])
async def test_bad_json_is_400(world, body: bytes) -> None:
    for path in (COMPLETION, CHAT):
        answer = await world.ask("POST", path, body)
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"


async def test_an_unknown_model_is_404_and_names_the_served_one(world) -> None:
    for answer in (await world.complete(model="gpt-4"), await world.chat(model="gpt-4")):
        assert answer.status == 404
        assert answer.error["code"] == "model_not_found"
        assert answer.error["param"] == "model"
        assert "`tiny`" in answer.error["message"]
    assert (await world.ask("GET", "/v1/models/gpt-4")).error["code"] == "model_not_found"


async def test_too_long_a_prompt_is_400_with_both_numbers(world) -> None:
    answer = await world.complete(prompt=[10] * 256)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (
        400,
        "context_length_exceeded",
        "prompt",
    )
    assert "256 tokens" in answer.error["message"]
    answer = await world.complete(prompt=[10] * 250, max_tokens=7)
    assert (answer.error["code"], answer.error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "257 tokens (250 in the prompt, 7 for the completion)" in answer.error["message"]
    assert (await world.complete(prompt=[10] * 250, max_tokens=6)).status == 200
    assert (await world.complete(prompt=[10] * 250)).status == 200, "the default fits itself to the room"
    answer = await world.chat(messages=[{"role": "user", "content": "abc " * 300}])
    assert answer.error["param"] == "messages"


async def test_a_body_over_the_bound_is_413_announced_or_not(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.web.http.HTTP_BODY_BYTES_MAX", 100)
    announced = {"content-length": "101"}
    for headers in (announced, None):
        answer = await world.ask("POST", COMPLETION, b" " * 101, headers)
        assert answer.status == 413
        assert answer.error["code"] == "too_large"
    assert world.front.body_bytes == 0


async def test_bodies_together_over_the_bound_are_429(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlock.web.http.HTTP_BODIES_BYTES_MAX", 10)
    answer = await world.ask("POST", COMPLETION, b" " * 11)
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    assert world.front.body_bytes == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("full", 1.5), 429, "overloaded"),
        (NoMember("no engine is alive"), 503, "no_engine"),
    ],
)
async def test_a_fleet_that_takes_nothing_says_when_to_ask_again(
    world, error: Any, status: int, code: str, stream: bool
) -> None:
    world.fleet.refuse = error
    answer = await world.complete(stream=stream)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("target", "words"), [("STOPPED", "`interlock ctl start`"), ("RUNNING", "they are started again")]
)
async def test_a_fleet_whose_engines_are_gone_does_not_say_that_none_has_come_yet(
    world, fleet_view, target: str, words: str
) -> None:
    world.fleet.membership = fleet_view(target=target, state="LOST")
    answer = await world.complete()
    assert (answer.status, answer.error["code"]) == (503, "no_engine")
    assert words in answer.error["message"]


async def test_before_any_engine_has_joined_a_request_is_503(world) -> None:
    world.fleet.membership = None
    answer = await world.complete()
    assert (answer.status, answer.error["code"]) == (503, "no_engine")
    assert answer.headers["retry-after"] == "1"


async def test_choices_begun_before_a_refusal_are_aborted(world, step) -> None:
    hold = asyncio.Event()
    world.fleet.script = lambda request: [step(hold=hold)]
    submit = world.fleet.submit

    def third_is_refused(request: Any) -> Any:
        if request.id.endswith("-2"):
            raise Overloaded("full")
        return submit(request)

    world.fleet.submit = third_is_refused
    answer = await world.complete(n=4)
    assert answer.status == 429
    assert len(world.fleet.aborted) == 2
    assert not world.fleet.running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [("invalid", 400), ("deadline", 504), ("no_member", 503), ("stopped", 503), ("engine_failed", 500),
     ("cannot_continue", 500), ("closed", 503)],
)  # fmt: skip
async def test_a_failure_before_the_first_token_is_a_status_also_for_a_stream(
    world, step, code: str, status: int, stream: bool
) -> None:
    world.fleet.script = lambda request: [step(error=RequestFailed(code, "it broke"))]
    answer = await world.complete(stream=stream)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert "it broke" in answer.error["message"]


async def test_a_failure_in_mid_stream_is_an_event_and_no_done_follows(world, step) -> None:
    failed = RequestFailed("cannot_continue", "the engine was lost and seed cannot be carried on")
    world.fleet.script = lambda request: [step([20]), step(error=failed)]
    for answer in (await world.complete(stream=True), await world.chat(stream=True)):
        assert answer.status == 200
        *_, last, rest = answer.body.decode().split("\n\n")
        assert rest == ""
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("cannot_continue", "server_error")
        assert "[DONE]" not in answer.body.decode()
    whole = await world.complete()
    assert whole.status == 500, "half an answer is none"


async def test_one_failed_choice_ends_the_whole_stream_and_the_other_choices(world, step) -> None:
    hold = asyncio.Event()

    def script(request: Any) -> list[Any]:
        if request.id.endswith("-0"):
            return [step([20]), step(error=RequestFailed("engine_failed", "it broke"))]
        return [step([20]), step(hold=hold)]

    world.fleet.script = script
    answer = await world.complete(n=3, stream=True)
    assert b"engine_failed" in answer.body
    assert len(world.fleet.aborted) == 2
    assert not world.fleet.running


async def test_a_pause_that_aborts_ends_a_request_as_vllm_does(world, step) -> None:
    world.fleet.script = lambda request: [step([20], "abort")]
    assert (await world.complete()).json["choices"][0]["finish_reason"] == "abort"
    world.front.leaving = True
    assert (await world.complete()).status == 503


async def test_no_path_and_no_method_have_the_same_shape(world) -> None:
    answer = await world.ask("GET", "/v1/embeddings")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    answer = await world.ask("GET", COMPLETION)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


async def test_a_defect_is_500_without_its_details(world, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: Any) -> Any:
        raise KeyError("secret detail")

    world.fleet.submit = broken
    answer = await world.complete()
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert b"secret" not in answer.body


async def test_with_an_api_key_nothing_but_health_answers_without_it(make_world) -> None:
    world = make_world(access=Access(api_key="sk-1"))
    paths = [("POST", COMPLETION), ("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"),
             ("GET", "/metrics"), ("GET", "/interlock/status"), ("POST", "/interlock/pause")]  # fmt: skip
    for method, path in paths:
        for headers in (
            {},
            {"authorization": "Bearer sk-2"},
            {"authorization": "Basic sk-1"},
            {"authorization": "Bearer"},
        ):
            answer = await world.ask(method, path, {}, headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
    assert (await world.ask("GET", "/health")).status == 200
    with_key = {"authorization": "Bearer sk-1"}
    assert (await world.ask("GET", "/v1/models", None, with_key)).status == 200
    assert not world.fleet.requests


async def test_commands_need_a_secret_even_where_the_model_is_open(make_world) -> None:
    nobody = make_world()
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Bearer "}):
        answer = await nobody.ask("POST", "/interlock/pause", None, headers)
        assert (answer.status, answer.error["code"]) == (403, "forbidden")
    assert not nobody.coordinator.calls
    world = make_world(access=Access(admin_token="t0k"))
    assert (await world.complete()).status == 200
    assert (await world.ask("POST", "/interlock/pause")).status == 401
    assert not world.coordinator.calls
    given = {"authorization": "Bearer t0k"}
    assert (await world.ask("GET", "/interlock/status", None, given)).json["holds"][0]["owner"] == "trainer"
    answer = await world.ask(
        "POST", "/interlock/pause?mode=abort&owner=me&timeout_s=2.5&allow_unknown=true", None, given
    )
    assert answer.json["ok"] is True
    await world.ask("POST", "/interlock/unpause?owner=me&break_hold_of=trainer", None, given)
    assert world.coordinator.calls[1:] == [
        (
            "pause",
            {"mode": "abort", "owner": "me", "timeout_s": 2.5, "hold_seconds": None, "allow_unknown": True},
        ),
        ("unpause", {"owner": "me", "timeout_s": 60.0, "break_hold_of": "trainer"}),
    ]


async def test_every_command_and_question_of_the_coordinator_has_its_path(make_world) -> None:
    world = make_world(access=Access(admin_token="t0k"))
    given = {"authorization": "Bearer t0k"}
    for verb in ("suspend", "resume", "drain", "stop"):
        assert (await world.ask("POST", f"/interlock/{verb}?owner=me", None, given)).status == 200
        assert (await world.ask("POST", f"/interlock/{verb}")).status == 401
    assert [verb for verb, _ in world.coordinator.calls] == ["suspend", "resume", "drain", "stop"]
    assert world.coordinator.calls[-1][1]["composite"] is True
    found = (await world.ask("GET", "/interlock/command?id=abc", None, given)).json
    assert (found["command_id"], found["progress"]["ok"]) == ("abc", True)
    told = (await world.ask("GET", "/interlock/events?after=7&ring=r", None, given)).json
    assert (told["events"][0]["number"], told["last"]) == (8, 8)
    assert (await world.ask("GET", "/interlock/events")).status == 401
    world.coordinator.error = ChannelFault("unknown_command", "no command abc is known")
    assert (await world.ask("GET", "/interlock/command?id=abc", None, given)).status == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [("mode=hard", "mode"), ("timeout_s=0", "timeout_s"), ("timeout_s=x", "timeout_s"), ("no=1", "no"),
     ("owner=", "owner"), ("mode=keep&mode=wait", None), ("owner=%ff", None), ("&".join(f"a{n}=1" for n in range(40)), None)],
)  # fmt: skip
async def test_impossible_commands_are_400_and_name_the_parameter(
    make_world, query: str, param: str | None
) -> None:
    world = make_world(access=Access(admin_token="t0k"))
    answer = await world.ask("POST", f"/interlock/pause?{query}", None, {"authorization": "Bearer t0k"})
    assert (answer.status, answer.error["param"]) == (400, param)
    assert not world.coordinator.calls


@pytest.mark.parametrize("said", [{"content-length": "17"}, {"transfer-encoding": "chunked"}])
async def test_a_command_in_a_body_is_refused_and_not_taken_for_the_default(
    make_world, said: dict[str, str]
) -> None:
    world = make_world(access=Access(admin_token="t0k"))
    headers = {"authorization": "Bearer t0k", **said}
    answer = await world.ask("POST", "/interlock/pause", b'{"mode": "abort"}', headers)
    assert (answer.status, answer.error["code"]) == (400, "unexpected_body")
    assert "/interlock/pause?owner=me" in answer.error["message"]
    assert not world.coordinator.calls
    headers["content-length"] = "0"
    headers.pop("transfer-encoding", None)
    assert (await world.ask("POST", "/interlock/pause", None, headers)).status == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ChannelFault("illegal", "PAUSE is not legal in STOPPED"), 409),
        (ChannelFault("recovering", "the coordinator listens"), 503),
        (TimeoutError("60 s"), 504),
        (ConnectionRefusedError("no coordinator"), 503),
    ],
)
async def test_what_the_coordinator_refuses_is_told_in_its_words(
    make_world, error: Exception, status: int
) -> None:
    world = make_world(access=Access(admin_token="t0k"))
    world.coordinator.error = error
    answer = await world.ask("POST", "/interlock/unpause", None, {"authorization": "Bearer t0k"})
    assert answer.status == status
    assert str(error.args[0]) in answer.error["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(set(CompletionRequest.__struct_fields__) | set(ChatRequest.__struct_fields__))
SENSIBLE = {
    "model": st.just("tiny"),
    "prompt": st.text(max_size=20) | st.lists(st.integers(0, 399), max_size=5) | st.lists(st.text(max_size=5), max_size=3),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=9)}),
        max_size=3,
    ),
    "stream": st.booleans(),
    "n": st.integers(0, 3),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "max_tokens": st.integers(-1, 300),
}  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly what the schema wants, some of it replaced by anything."""
    kind = draw(st.sampled_from(["prompt", "messages"]))
    body = {name: draw(SENSIBLE[name]) for name in ("model", kind)}
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=4, unique=True)):
        body[name] = draw(SENSIBLE.get(name, JSON) | JSON)
    return body


def check_answer(answer: Any) -> None:
    assert answer.status == 200 or 400 <= answer.status < 500, answer.body
    if answer.status != 200:
        assert set(answer.error) == {"message", "type", "param", "code"}
        assert (
            answer.error["message"].endswith((".", "out", "less", "messages", "text"))
            or answer.error["message"]
        )


@given(body=bodies() | JSON, path=st.sampled_from([COMPLETION, CHAT]))
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_any_json_is_answered_200_or_refused_in_openais_shape(world, body: Any, path: str) -> None:
    check_answer(await world.ask("POST", path, body))
    assert not world.fleet.running, "nothing runs on"
    assert world.front.body_bytes == 0


@given(body=st.binary(max_size=200), path=st.sampled_from([COMPLETION, CHAT]))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_any_bytes_are_refused_in_openais_shape(world, body: bytes, path: str) -> None:
    answer = await world.ask("POST", path, body)
    assert answer.status == 400
    check_answer(answer)
