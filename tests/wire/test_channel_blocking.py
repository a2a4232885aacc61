"""The blocking channel against a living asynchronous one, each on its own thread."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from interlock.core.errors import ChannelClosed, ChannelFault, RemoteProtocolError, StaleError
from interlock.wire.blocking import BlockingChannel
from interlock.wire.envelope import Ping, Welcome
from interlock.wire.framing import encode_frame
from interlock.wire.identity import Identity, load_identity


def connect(place: Any, **more: Any) -> BlockingChannel:
    options = {"me": Identity("rank-0", 1), "role": "rank", "accept": place.Either, "timeout_s": 20, **more}
    channel = BlockingChannel.connect(place.address, **options)
    place.ends.append(channel)
    return channel


async def open_both(place: Any) -> tuple[BlockingChannel, Any, Any]:
    """(blocking end, the other end, its messages)"""
    await place.serve()
    client = await place.host.in_thread(connect, place)
    server = await asyncio.wait_for(place.served.get(), 20)
    return client, server, server.messages()


def later(place: Any, function: Any, *args: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(place.host.in_thread(functools.partial(function, *args)))


async def test_a_request_gets_its_answer(place: Any) -> None:
    client, server, messages = await open_both(place)
    asking = later(place, client.request, place.Ask("a" * 1_000_000), 20)
    received = await anext(messages)
    await server.reply(received, place.Tell(received.body.text))
    assert await asking == place.Tell("a" * 1_000_000)
    assert (client.peer, server.peer, server.peer_role) == (place.me, Identity("rank-0", 1), "rank")
    assert client.peer_process is not None
    assert client.peer_process.pid == os.getpid()


async def test_a_fault_is_raised_and_the_channel_goes_on(place: Any) -> None:
    client, server, messages = await open_both(place)
    asking = later(place, client.request, place.Ask(), 20)
    await server.fault(await anext(messages), "no", "not today")
    with pytest.raises(ChannelFault, match="not today"):
        await asking
    asking = later(place, client.request, place.Ask(), 20)
    await server.reply(await anext(messages), place.Tell("yes"))
    assert (await asking).text == "yes"


async def test_a_silent_peer_costs_the_deadline_and_its_late_answer_is_dropped(place: Any) -> None:
    client, server, messages = await open_both(place)
    before = time.monotonic()
    with pytest.raises(TimeoutError):
        await later(place, client.request, place.Ask("slow"), 0.005)
    assert time.monotonic() - before < 1.0
    late = await anext(messages)
    asking = later(place, client.request, place.Ask("next"), 20)
    current = await anext(messages)
    await server.reply(late, place.Tell("late"))
    await server.send(place.Tell("a message nobody asked for"))
    await server.reply(current, place.Tell("mine"))
    assert (await asking).text == "mine"


async def test_an_answer_cut_by_the_deadline_is_read_on_at_the_next_call(place: Any) -> None:
    await place.serve()
    halves: asyncio.Queue[Any] = asyncio.Queue()

    async def serve(stream: Any) -> None:
        length = int.from_bytes(await stream.receive_exactly(4), "big")
        await stream.receive_exactly(length)
        await stream.send(encode_frame("server", 1, 1, 1, Welcome(1)))
        halves.put_nowait(stream)
        await asyncio.Event().wait()

    place.address += "-halves"
    listener = await place.host.listen(place.address, serve)
    client = await place.host.in_thread(connect, place)
    stream = await halves.get()
    answer = encode_frame("server", 1, 2, 2, place.Tell("first"))
    await stream.send(answer[:7])
    with pytest.raises(TimeoutError):
        await later(place, client.request, place.Ask(), 0.02)
    await stream.send(answer[7:])
    await stream.send(encode_frame("server", 1, 3, 3, place.Tell("second")))
    assert (await later(place, client.request, place.Ask(), 20)).text == "second"
    client.close()
    await listener.close()


async def test_descriptors_come_with_the_answer(place: Any) -> None:
    client, server, messages = await open_both(place)
    asking = later(place, client.request, place.Ask(), 20)
    reader, writer = os.pipe()
    await server.reply(await anext(messages), place.Tell(), fds=[writer])
    os.close(writer)
    await asking
    (fd,) = client.take_fds()
    os.write(fd, b"x")
    os.close(fd)
    assert os.read(reader, 2) == b"x"
    os.close(reader)


async def test_posting_never_leaves_answers_to_pile_up(place: Any) -> None:
    async def serve(channel: Any) -> None:
        async for received in channel.messages():
            await channel.reply(received, place.Tell("an answer that nobody reads " * 20))

    await place.serve(serve)
    client = await place.host.in_thread(connect, place)

    def post_many() -> None:
        for _ in range(6000):
            client.post(place.Ask())

    await place.host.in_thread(post_many)
    assert (await later(place, client.request, place.Ask(), 20)).text.startswith("an answer")


async def test_a_ping_is_answered_at_the_next_call(place: Any) -> None:
    client, server, messages = await open_both(place)
    await server.send(Ping())
    for _ in range(3):
        await asyncio.sleep(0)
    asking = later(place, client.request, place.Ask(), 20)
    received = await anext(messages)
    await server.reply(received, place.Tell())
    await asking
    assert server.closed is None


async def test_a_post_after_a_ping_does_not_wait_for_more(place: Any) -> None:
    client, server, messages = await open_both(place)
    await server.send(Ping())
    await asyncio.wait_for(server._outbox_empty.wait(), 20)
    before = time.monotonic()
    await later(place, client.post, place.Ask("posted"))
    assert (await anext(messages)).body.text == "posted"
    assert time.monotonic() - before < 0.5


async def test_a_peer_that_leaves_ends_the_request_and_the_channel(place: Any) -> None:
    client, server, messages = await open_both(place)
    asking = later(place, client.request, place.Ask(), 20)
    await anext(messages)
    await server.close()
    with pytest.raises(ChannelClosed, match="closed"):
        await asking
    for call in (lambda: client.request(place.Ask(), 1), lambda: client.post(place.Ask())):
        with pytest.raises(ChannelClosed):
            call()
    assert client.closed is not None


async def test_closing_wakes_whoever_waits_in_a_request(place: Any) -> None:
    client, _server, messages = await open_both(place)
    asking = later(place, client.request, place.Ask(), 20)
    await anext(messages)
    client.close()
    client.close()
    with pytest.raises(ChannelClosed):
        await asyncio.wait_for(asking, 10)


async def test_threads_take_turns_and_each_gets_its_own_answer(place: Any) -> None:
    async def serve(channel: Any) -> None:
        async for received in channel.messages():
            await channel.reply(received, place.Tell(received.body.text))

    await place.serve(serve)
    client = await place.host.in_thread(connect, place)
    wrong: list[str] = []

    def ask(name: str) -> None:
        for i in range(100):
            text = f"{name} {i}"
            if client.request(place.Ask(text), 20).text != text:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, 20)
    assert wrong == []


async def test_a_thread_that_waits_for_its_turn_has_a_deadline_too(place: Any) -> None:
    client, server, messages = await open_both(place)
    asking = later(place, client.request, place.Ask(), 20)
    received = await anext(messages)
    with pytest.raises(TimeoutError, match="other threads"):
        await later(place, client.request, place.Ask(), 0.01)
    await server.reply(received, place.Tell())
    await asking


async def test_a_message_that_does_not_leave_in_time_closes_the_channel(place: Any) -> None:
    async def mute(stream: Any) -> None:
        length = int.from_bytes(await stream.receive_exactly(4), "big")
        await stream.receive_exactly(length)
        await stream.send(encode_frame("server", 1, 1, 1, Welcome(1)))
        await asyncio.Event().wait()

    listener = await place.host.listen(place.address, mute)
    client = await place.host.in_thread(connect, place)
    with pytest.raises(TimeoutError):
        await later(place, client.request, place.Ask(data=bytes(5_000_000)), 0.05)
    with pytest.raises(ChannelClosed, match="too slowly"):
        client.post(place.Ask())
    await listener.close()


async def test_garbage_from_the_server_closes_the_channel_and_nothing_more(place: Any) -> None:
    client, server, messages = await open_both(place)
    asking = later(place, client.request, place.Ask(), 20)
    await anext(messages)
    await server._stream.send(b"\xff\xff\xff\xff")
    with pytest.raises(ChannelClosed) as caught:
        await asking
    assert isinstance(caught.value.__cause__, RemoteProtocolError)


async def test_old_lives_rise_or_end_here_too(place: Any, tmp_path: Path) -> None:
    await place.serve()
    far = 2**62
    await place.connect("rank-0", far)
    me = load_identity(place.host, tmp_path, "rank-0")
    client = await place.host.in_thread(functools.partial(connect, place, me=me))
    assert me.incarnation == far + 1
    await place.connect("rank-0", far + 2)
    asking = later(place, client.request, place.Ask(), 20)
    with pytest.raises(ChannelClosed) as caught:
        await asking
    assert isinstance(caught.value.__cause__, StaleError)
    with pytest.raises(StaleError):
        await place.host.in_thread(functools.partial(connect, place, me=me))


async def test_nobody_there_is_a_connection_error(place: Any) -> None:
    with pytest.raises(ConnectionError):
        await place.host.in_thread(connect, place)
