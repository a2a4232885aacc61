"""Channels between two living ends: requests, messages, descriptors, heartbeats, bounds, ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import msgspec
import pytest

from interlock.core.errors import ChannelClosed, ChannelFault, LocalProtocolError, RemoteProtocolError
from interlock.core.limits import (
    FDS_PER_MESSAGE_MAX,
    FRAME_BYTES_MAX,
    HEARTBEAT_SECONDS,
    INBOX_MESSAGES_MAX,
    OUTBOX_MESSAGES_MAX,
)
from interlock.host.real import RealHost
from interlock.wire.envelope import Fault, Ping, Pong
from interlock.wire.framing import channel_bodies, encode_frame
from interlock.wire.identity import Identity


async def echo(place: Any, channel: Any) -> None:
    async for received in channel.messages():
        await channel.reply(received, place.Tell(received.body.text))


async def test_each_request_gets_its_own_answer_in_whatever_order(place: Any) -> None:
    async def backwards(channel: Any) -> None:
        held = []
        async for received in channel.messages():
            held.append(received)
            if len(held) == 50:
                for each in reversed(held):
                    await channel.reply(each, place.Tell(each.body.text))

    await place.serve(backwards)
    client = await place.connect()
    answers = await asyncio.gather(*(client.request(place.Ask(str(i)), 20) for i in range(50)))
    assert answers == [place.Tell(str(i)) for i in range(50)]


async def test_both_sides_may_ask_at_once(place: Any) -> None:
    client, server = await place.pair()
    tasks = [asyncio.create_task(echo(place, end)) for end in (client, server)]
    assert await client.request(place.Ask("c"), 20) == place.Tell("c")
    assert await server.request(place.Ask("s"), 20) == place.Tell("s")
    assert (client.peer, server.peer) == (place.me, Identity("client", 1))
    assert server.peer_role == "test"
    await client.close()
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)


async def test_a_fault_is_raised_where_it_was_asked_and_harms_nothing_else(place: Any) -> None:
    client, server = await place.pair()
    request = asyncio.create_task(client.request(place.Ask("?"), 20))
    messages = server.messages()
    await server.fault(await anext(messages), "busy", "come back later", retryable=True)
    with pytest.raises(ChannelFault) as caught:
        await request
    assert (caught.value.code, caught.value.message, caught.value.retryable) == (
        "busy",
        "come back later",
        True,
    )
    await client.send(place.Ask("still here"))
    assert (await anext(messages)).body.text == "still here"


async def test_an_answer_to_a_plain_message_arrives_as_a_message_that_names_it(place: Any) -> None:
    client, server = await place.pair()
    number = await client.send(place.Ask("tell me some time"))
    received = await anext(server.messages())
    await server.reply(received, place.Tell("now"))
    await server.fault(received, "no", "not again")
    answers = client.messages()
    first, second = await anext(answers), await anext(answers)
    assert (first.answers, first.body) == (number, place.Tell("now"))
    assert (second.answers, second.body) == (number, Fault("no", "not again"))


async def test_a_late_answer_is_dropped_and_the_next_request_gets_its_own(place: Any) -> None:
    client, server = await place.pair()
    messages = server.messages()
    with pytest.raises(TimeoutError, match="Ask"):
        await client.request(place.Ask("slow"), 0.01)
    late = await anext(messages)
    request = asyncio.create_task(client.request(place.Ask("next"), 20))
    current = await anext(messages)
    await server.reply(late, place.Tell("late"))
    await server.reply(current, place.Tell("mine"))
    await server.reply(current, place.Tell("mine twice"))
    await server.send(place.Tell("and a message"))
    assert await request == place.Tell("mine")
    assert (await anext(client.messages())).body == place.Tell("and a message")


async def test_descriptors_arrive_with_the_message_they_belong_to(place: Any) -> None:
    client, server = await place.pair()
    pipes = [os.pipe() for _ in range(3)]
    for i, (_, writer) in enumerate(pipes):
        await client.send(place.Ask(f"before {i}"))
        await client.send(place.Ask(f"with {i}"), fds=[writer])
        os.close(writer)  # theirs now: ours is not needed any more once send returned
    got = {}
    messages = server.messages()
    for _ in range(6):
        received = await anext(messages)
        got[received.body.text] = received.fds
    for i, (reader, _) in enumerate(pipes):
        assert got[f"before {i}"] == ()
        (fd,) = got[f"with {i}"]
        os.write(fd, b"%d" % i)
        os.close(fd)
        assert os.read(reader, 10) == b"%d" % i
        os.close(reader)


async def test_descriptors_of_an_answer_wait_for_whoever_asked(place: Any) -> None:
    client, server = await place.pair()
    request = asyncio.create_task(client.request(place.Ask(), 20))
    reader, writer = os.pipe()
    await server.reply(await anext(server.messages()), place.Tell(), fds=[writer])
    os.close(writer)
    await request
    (fd,) = client.take_fds()
    os.close(fd)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert client.take_fds() == []
    with pytest.raises(LocalProtocolError):
        await client.send(place.Ask(), fds=[0] * (FDS_PER_MESSAGE_MAX + 1))


async def test_descriptors_that_were_announced_and_not_sent_end_the_channel(place: Any) -> None:
    await place.serve()
    raw = await place.raw()
    await raw.hello()
    server = await place.served.get()
    await raw.stream.send(encode_frame("raw", 1, 2, 0, place.Ask(), fds=1))
    with pytest.raises(RemoteProtocolError, match="announced 1 descriptors"):
        await anext(server.messages())


async def test_a_wrong_body_is_answered_by_its_number_and_the_channel_goes_on(place: Any) -> None:
    await place.serve()
    raw = await place.raw()
    await raw.hello()
    await raw.stream.send(encode_frame("raw", 1, 2, 0, Fault("x", "no", True)))
    await raw.stream.send(encode_frame("raw", 1, 3, 0, msgspec.defstruct("Unknown", [], tag=True)()))
    answer = await raw.frame()
    fault = channel_bodies(place.Either).decode(answer.body)
    assert answer.answers == 3
    assert isinstance(fault, Fault)
    assert "Unknown" in fault.message
    await raw.stream.send(encode_frame("raw", 1, 4, 0, place.Ask("fine")))
    server = await place.served.get()
    messages = server.messages()
    assert isinstance((await anext(messages)).body, Fault)
    assert (await anext(messages)).body.text == "fine"


async def test_a_wrong_answer_fails_the_request_alone(place: Any) -> None:
    client, server = await place.pair(accept=msgspec.defstruct("Other", [], tag=True))
    request = asyncio.create_task(client.request(place.Ask(), 20))
    await server.reply(await anext(server.messages()), place.Tell())
    with pytest.raises(RemoteProtocolError, match="Tell"):
        await request
    assert client.closed is None


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\xff\xff\xff", (FRAME_BYTES_MAX + 1).to_bytes(4, "big"), bytes(4), b"\x00\x00\x00\x04nope"],
    ids=["4 GiB", "one too long", "empty", "no envelope"],
)
async def test_garbage_ends_its_own_channel_and_disturbs_no_other(place: Any, garbage: bytes) -> None:
    async def serve(channel: Any) -> None:
        await echo(place, channel)

    await place.serve(serve)
    good, bad = await place.connect("good"), await place.raw()
    await bad.hello()
    await bad.stream.send(
        garbage
    )  # of a frame too long only its length: it is judged before the rest is read
    await bad.closed_after()
    assert await good.request(place.Ask("x"), 20) == place.Tell("x")


async def test_a_slow_reader_loses_its_channel_and_its_sender_never_waits(place: Any) -> None:
    await place.serve()
    raw = await place.raw()
    await raw.hello()
    server = await place.served.get()
    async with asyncio.timeout(20):
        with pytest.raises(ChannelClosed, match="reads too slowly"):
            for _ in range(OUTBOX_MESSAGES_MAX * 4):
                await server.send(place.Tell(data=bytes(1000)))
    assert server.closed is not None
    with pytest.raises(ChannelClosed, match="reads too slowly"):
        await server.send(place.Tell())


async def test_few_large_messages_fill_an_outbox_too(place: Any) -> None:
    await place.serve()
    raw = await place.raw()
    await raw.hello()
    server = await place.served.get()
    sent = 0
    async with asyncio.timeout(20):
        with pytest.raises(ChannelClosed, match="reads too slowly"):
            while True:
                await server.send(place.Tell(data=bytes(15_000_000)))
                sent += 1
    assert sent <= 6


async def test_a_burst_to_a_peer_that_reads_is_no_slow_reader(place: Any) -> None:
    client, server = await place.pair()
    total = OUTBOX_MESSAGES_MAX * 3

    async def count() -> int:
        seen = 0
        async for received in server.messages():
            assert received.body.text == str(seen)
            seen += 1
            if seen == total:
                break
        return seen

    counting = asyncio.create_task(count())
    for i in range(total):
        await client.send(place.Ask(str(i)))
    assert await asyncio.wait_for(counting, 30) == total


async def test_what_nobody_takes_stays_with_the_sender_and_arrives_in_order(place: Any) -> None:
    client, server = await place.pair()
    total = INBOX_MESSAGES_MAX * 3
    for i in range(total):
        await client.send(place.Ask(str(i), data=bytes(2000)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(server._inbox) <= INBOX_MESSAGES_MAX
    messages = server.messages()
    assert [(await anext(messages)).body.text for _ in range(total)] == [str(i) for i in range(total)]


async def test_waiting_requests_end_with_the_channel_whoever_closes_it(place: Any) -> None:
    client, server = await place.pair()
    asked = [asyncio.create_task(client.request(place.Ask(), 20)) for _ in range(3)]
    asking_back = asyncio.create_task(server.request(place.Tell(), 20))
    await anext(server.messages())
    await client.close()
    await client.close()
    for task in (*asked, asking_back):
        with pytest.raises(ChannelClosed):
            await asyncio.wait_for(task, 20)
    with pytest.raises(ChannelClosed):
        await client.request(place.Ask(), 1)
    assert isinstance(client.closed, ChannelClosed)


async def test_messages_end_quietly_when_either_side_closes(place: Any) -> None:
    client, server = await place.pair()
    await server.send(place.Tell("last words"))
    await server.close()
    assert [received.body.text async for received in client.messages()] == ["last words"]
    assert [received async for received in server.messages()] == []


async def test_a_handler_that_returns_closes_its_channel_after_its_last_words(place: Any) -> None:
    async def serve(channel: Any) -> None:
        await channel.reply(await anext(channel.messages()), place.Tell("bye"))

    await place.serve(serve)
    client = await place.connect()
    assert await client.request(place.Ask(), 20) == place.Tell("bye")
    assert [received async for received in client.messages()] == []


async def test_closing_the_listener_closes_its_channels(place: Any) -> None:
    listener = await place.serve()
    client = await place.connect()
    await listener.close()
    assert [received async for received in client.messages()] == []
    with pytest.raises(ConnectionError):
        await place.connect()


CHILD = """
import asyncio, sys
from interlock.host.real import RealHost
from interlock.wire.channel import connect_channel
from interlock.wire.identity import Identity
from interlock.wire.envelope import Pong
async def main():
    channel = await connect_channel(RealHost(), sys.argv[1], me=Identity("child", 1), role="x", accept=Pong, deadline_s=20)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_killed_peers_exit_is_proven_beyond_its_channel(place: Any, host: RealHost) -> None:
    await place.serve()
    child = await host.spawn([sys.executable, "-c", CHILD, place.address], env=dict(os.environ), log=None)
    try:
        server = await asyncio.wait_for(place.served.get(), 30)
        watch = server.peer_process
        assert watch is not None
        assert watch.pid == child.pid
        os.kill(child.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            assert [received async for received in server.messages()] == []
            assert server.closed is not None
            await watch.wait_exited()
        assert watch.exited
    finally:
        assert await child.end_tree(10)


class HeldClock:
    """Time that passes when the test says so; everything that sleeps then wakes."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ns(self) -> int:
        return 1

    async def sleep_s(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waiter = asyncio.get_running_loop().create_future()
        self.sleepers.append((self.now_s + seconds, waiter))
        await waiter

    async def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        due = [waiter for at, waiter in self.sleepers if at <= self.now_s]
        self.sleepers = [(at, waiter) for at, waiter in self.sleepers if at > self.now_s]
        for waiter in due:
            if not waiter.done():
                waiter.set_result(None)
        await asyncio.sleep(0)


class HeldHost(RealHost):
    def __init__(self) -> None:
        super().__init__()
        self._clock = HeldClock()  # type: ignore[assignment]


async def test_idle_is_not_silence_and_silence_is_measured(place: Any) -> None:
    place.host.close()
    place.host = HeldHost()
    clock = place.host.clock
    await place.serve()
    raw = await place.raw()
    await raw.hello()
    server = await place.served.get()
    await asyncio.sleep(0)  # its heartbeat begins to sleep
    await clock.pass_s(HEARTBEAT_SECONDS)
    ping = await asyncio.wait_for(raw.frame(), 20)
    assert isinstance(channel_bodies(place.Either).decode(ping.body), Ping)
    assert server.silent_for_s == HEARTBEAT_SECONDS
    for _ in range(50):
        await clock.pass_s(HEARTBEAT_SECONDS)
    assert server.silent_for_s == 51 * HEARTBEAT_SECONDS, "silence is measured, it closes nothing"
    assert server.closed is None
    await raw.stream.send(encode_frame("raw", 1, 2, ping.number, Pong()))
    await raw.stream.send(encode_frame("raw", 1, 3, 0, place.Ask("heard")))
    await anext(server.messages())
    assert server.silent_for_s == 0
    await clock.pass_s(HEARTBEAT_SECONDS)
    assert (await raw.frame()).number == ping.number + 1, "one ping waited, not fifty"
    place.host.close()


async def test_a_ping_is_answered(place: Any) -> None:
    await place.serve()
    raw = await place.raw()
    await raw.hello()
    await raw.stream.send(encode_frame("raw", 1, 2, 0, Ping()))
    pong = await raw.frame()
    assert (type(channel_bodies(place.Either).decode(pong.body)), pong.answers) == (Pong, 2)


async def test_a_message_too_long_for_any_receiver_is_refused_here_and_nothing_is_lost(place: Any) -> None:
    client, server = await place.pair()
    with pytest.raises(LocalProtocolError, match="parts"):
        await client.send(place.Ask(data=bytes(FRAME_BYTES_MAX)))
    await client.send(place.Ask("short"))
    assert (await anext(server.messages())).body.text == "short"


async def test_cancelled_requests_leave_nothing_behind(place: Any) -> None:
    client, server = await place.pair()
    request = asyncio.create_task(client.request(place.Ask(), 20))
    received = await anext(server.messages())
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await server.reply(received, place.Tell("late"))
    await server.send(place.Tell("message"))
    assert (await anext(client.messages())).body.text == "message"
    assert not client._pending


async def test_a_close_that_is_cancelled_closes_all_the_same(place: Any) -> None:
    """Whoever closes may have a deadline of its own: nobody else would end the three tasks and the connection."""
    client, _ = await place.pair()
    sending = asyncio.Event()

    async def stuck(*_: object) -> None:
        sending.set()
        await asyncio.Event().wait()

    client._stream.send = stuck
    await client.send(place.Ask("this does not leave"))
    await sending.wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await client.close()
    assert client.closed is not None
    async with asyncio.timeout(20):
        await asyncio.gather(*client._tasks, return_exceptions=True)


async def test_descriptors_of_a_message_that_found_no_room_are_closed_with_the_channel(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.wire.duplex.INBOX_MESSAGES_MAX", 1)
    client, server = await place.pair()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    await client.send(place.Ask("takes the room"))
    await client.send(place.Ask("waits"), fds=[writer])
    os.close(writer)
    async with asyncio.timeout(20):
        while server._talk._heard < 3:
            await asyncio.sleep(0.001)
    assert not server._arrived_fds, "the message that waits has them"
    await server.close()
    assert os.read(reader, 1) == b"", "nobody has the other end any more"
    os.close(reader)
