"""Over a real socket: the official client, clients that leave, and how a front takes its leave."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import openai
import pytest

from interlock.fleet.generation import Overloaded, RequestFailed
from interlock.host.ports import bind_port, port_of
from interlock.web.main import FrontServer, leave

TEXT = "Hello, Zürich 🚂!"
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


def client_of(url: str, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, **more)


async def until(condition: Any) -> None:
    """For what another task of this loop does: gives it turns, within a deadline."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_official_client_reads_completions_whole_and_streamed(world, serving) -> None:
    async with serving(world) as url, client_of(url) as client:
        whole = await client.completions.create(model="tiny", prompt="hello", max_tokens=99, logprobs=2, n=2)
        assert [choice.text for choice in whole.choices] == [TEXT] * 2
        assert whole.usage
        assert whole.usage.prompt_tokens_details
        assert whole.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
        assert whole.choices[0].logprobs
        assert len(whole.choices[0].logprobs.tokens or []) == whole.usage.completion_tokens // 2
        stream = await client.completions.create(
            model="tiny", prompt="hello", max_tokens=99, stream=True, stream_options={"include_usage": True}
        )
        got = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in got if chunk.choices) == TEXT
        assert got[-1].usage
        assert got[-1].usage.completion_tokens == whole.usage.completion_tokens // 2


async def test_the_official_client_reads_chats_whole_and_streamed(world, serving) -> None:
    async with serving(world) as url, client_of(url) as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1
        )
        assert whole.choices[0].message.content == TEXT
        assert whole.choices[0].logprobs
        assert whole.choices[0].logprobs.content
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == TEXT
        async with client.chat.completions.stream(model="tiny", messages=MESSAGES) as events:
            final = await events.get_final_completion()
        assert final.choices[0].message.content == TEXT
        assert final.choices[0].finish_reason == "stop"


async def test_an_answer_sent_back_as_history_is_accepted(world, serving) -> None:
    async with serving(world) as url, client_of(url) as client:
        first = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        said = first.choices[0].message.model_dump()
        again = await client.chat.completions.create(model="tiny", messages=[*MESSAGES, said, *MESSAGES])
        assert again.choices[0].message.content == TEXT


async def test_the_official_client_raises_what_it_documents(world, serving) -> None:
    async with serving(world) as url, client_of(url) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-4", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt=[10] * 256)
        assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "prompt")
        world.fleet.refuse = Overloaded("full")
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="tiny", prompt="x")
        assert full.value.response.headers["retry-after"] == "1"


async def test_an_error_in_mid_stream_raises_in_the_official_client(world, serving, step) -> None:
    world.fleet.script = lambda request: [step([20]), step(error=RequestFailed("engine_failed", "it broke"))]
    async with serving(world) as url, client_of(url) as client:
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="it broke"):
            async for _ in stream:
                pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_ends_its_generations_everywhere(
    world, serving, step, stream: bool, n: int
) -> None:
    world.fleet.script = lambda request: [step([20]), step(hold=asyncio.Event())]
    async with serving(world) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        body = json.dumps({"model": "tiny", "prompt": "x", "stream": stream, "n": n}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        writer.write(head + body)
        await until(lambda: len(world.fleet.requests) == n)
        if stream:
            async with asyncio.timeout(10):
                assert b"200 OK" in await reader.readuntil(b"\r\n")
                await reader.readuntil(b"data: ")
        assert not world.fleet.aborted, "it runs as long as its client listens"
        writer.close()
        await until(lambda: len(world.fleet.aborted) == n)
        await until(lambda: b'outcome="disconnected"} 1.0' in world.front.metrics.render())
        assert not world.fleet.running


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(world, serving) -> None:
    async with serving(world) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        await writer.drain()
        await until(lambda: world.front.body_bytes == 1)
        writer.close()
        await until(lambda: world.front.body_bytes == 0)
        assert not world.fleet.requests


async def test_a_body_that_does_not_arrive_is_given_up(
    world, serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.web.http.HTTP_BODY_SECONDS_MAX", 0.05)
    async with serving(world) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        async with asyncio.timeout(10):
            assert b" 408 " in await reader.readuntil(b"\r\n")
        writer.close()


async def test_a_client_that_takes_nothing_is_given_up(
    world, serving, step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.web.http.HTTP_SEND_SECONDS_MAX", 0.2)
    world.fleet.script = lambda request: [step([20] * 100) for _ in range(300)]  # some 30 MB with logprobs
    async with serving(world) as url:
        sock = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        with sock:
            body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "logprobs": 20}).encode()
            sock.sendall(
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            await until(lambda: b'outcome="disconnected"} 1.0' in world.front.metrics.render())
            assert world.fleet.aborted or not world.fleet.running


async def test_a_streams_headers_do_not_wait_for_ever_for_its_first_token(
    world, serving, step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.web.streaming.HTTP_HEADERS_WAIT_SECONDS", 0.02)
    go = asyncio.Event()
    world.fleet.script = lambda request: [step([20], "length", hold=go)]
    async with serving(world) as url, httpx.AsyncClient(timeout=10) as client:
        body = {"model": "tiny", "prompt": "x", "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            assert response.status_code == 200, "while nothing was generated"
            go.set()
            assert (await response.aread()).endswith(b"data: [DONE]\n\n")


async def test_many_requests_keep_one_connection(world, serving) -> None:
    async with (
        serving(world) as url,
        httpx.AsyncClient(timeout=10, limits=httpx.Limits(max_connections=1)) as client,
    ):
        for stream in (False, True, False):
            body = {"model": "tiny", "prompt": "x", "stream": stream}
            assert (await client.post(f"{url}/v1/completions", json=body)).status_code == 200
        assert (await client.post(f"{url}/v1/completions", content=b"{")).status_code == 400
        assert (await client.get(f"{url}/health")).status_code == 200


@pytest.mark.parametrize("ends_by_itself", [True, False])
async def test_a_front_that_leaves_lets_streams_end_and_tells_those_that_it_cuts(
    world, step, ends_by_itself: bool
) -> None:
    go = asyncio.Event()
    world.fleet.script = lambda request: [step([20]), step([21], "length", hold=go)]

    async def close() -> None:
        for generation in world.fleet.generations.values():
            generation.fail(RequestFailed("closed", "the front is shutting down", retryable=True))

    world.fleet.close = close
    sock = bind_port("127.0.0.1", 0)
    server = FrontServer(world.front)
    served = asyncio.create_task(server.serve(sockets=[sock]))
    await server.listening.wait()
    url = f"http://127.0.0.1:{port_of(sock)}"
    async with httpx.AsyncClient(timeout=10) as client:
        body = {"model": "tiny", "prompt": "x", "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.aiter_text()
            first = await anext(lines)
            leaving = asyncio.create_task(
                leave(world.front, world.fleet, server, served, 5.0 if ends_by_itself else 0.05)
            )
            await until(lambda: world.front.leaving)
            if ends_by_itself:
                go.set()
            rest = first + "".join([line async for line in lines])
        async with asyncio.timeout(10):
            await leaving
        assert served.done()
        assert rest.endswith("data: [DONE]\n\n") == ends_by_itself
        assert ('"code":"closed"' in rest) != ends_by_itself
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{url}/health")
    for task in list(world.fleet.running.values()):
        task.cancel()
