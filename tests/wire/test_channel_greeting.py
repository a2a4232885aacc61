"""Who may speak: users, tokens, lives and twins, within a bounded time and a bounded first frame."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interlock.core.errors import LocalProtocolError, RemoteProtocolError, StaleError
from interlock.core.limits import HELLO_BYTES_MAX
from interlock.host.base import Peer
from interlock.host.real import RealHost
from interlock.wire import channel as channel_module
from interlock.wire import hello as hello_module
from interlock.wire.channel import connect_channel, serve_channels
from interlock.wire.envelope import Hello, Rejected, Welcome
from interlock.wire.framing import encode_frame
from interlock.wire.identity import Identity, KnownPeers, load_identity


async def test_an_older_life_is_refused_and_told_the_newer(place: Any) -> None:
    await place.serve()
    await place.connect("engine-0", 5)
    with pytest.raises(StaleError, match="engine-0") as caught:
        await place.connect("engine-0", 4)
    assert caught.value.highest == 5


async def test_several_channels_of_one_life_stand_side_by_side(place: Any) -> None:
    await place.serve()
    me = Identity("front-0", 5, b"life")
    channels = [await place.connect(me=me) for _ in range(3)]
    served = [await place.served.get() for _ in range(3)]
    for i, channel in enumerate(channels):
        await channel.send(place.Ask(str(i)))
        assert (await anext(served[i].messages())).body.text == str(i)


async def test_a_life_that_lost_its_directory_rises_and_is_accepted(place: Any, tmp_path: Path) -> None:
    await place.serve()
    far = 2**62
    await place.connect("engine-0", far)
    me = load_identity(place.host, tmp_path, "engine-0")
    assert me.incarnation < far
    channel = await place.connect(me=me)
    assert me.incarnation == far + 1
    assert str(far + 1) in (tmp_path / "identity.json").read_text()
    await place.served.get()
    assert (await place.served.get()).peer.incarnation == far + 1
    assert channel.closed is None


async def test_a_life_that_was_accepted_and_overtaken_is_over(place: Any, tmp_path: Path) -> None:
    await place.serve()
    me = load_identity(place.host, tmp_path, "engine-0")
    old = await place.connect(me=me)
    server_of_old = await place.served.get()
    await place.connect("engine-0", me.incarnation + 1)
    await old.send(place.Ask("a word of the dead"))
    with pytest.raises(StaleError) as caught:
        async with asyncio.timeout(20):
            await anext(old.messages())
    assert caught.value.highest == me.incarnation + 1
    assert [received async for received in server_of_old.messages()] == []
    with pytest.raises(StaleError, match="stop this process"):
        await place.connect(me=me)


async def test_a_server_of_an_old_life_is_not_believed(place: Any) -> None:
    listener = await place.serve()
    known = KnownPeers()
    await place.connect(known=known)
    await listener.close()
    place.me = Identity("server", 2)
    listener = await place.serve()
    await place.connect(known=known)
    await listener.close()
    place.me = Identity("server", 1)
    await place.serve()
    with pytest.raises(StaleError, match="server@1") as caught:
        await place.connect(known=known)
    assert caught.value.highest == 2


TWIN = """
import asyncio, sys
from interlock.host.real import RealHost
from interlock.wire.channel import connect_channel
from interlock.wire.identity import Identity
from interlock.wire.envelope import Pong
async def main():
    await connect_channel(RealHost(), sys.argv[1], me=Identity("engine-0", 5), role="x", accept=Pong, deadline_s=20)
try:
    asyncio.run(main())
except Exception as error:
    print(type(error).__name__, error)
"""


async def test_a_twin_in_another_process_is_refused_by_the_names_of_both(place: Any) -> None:
    await place.serve()
    first = await place.connect("engine-0", 5)
    argv = [sys.executable, "-c", TWIN, place.address]
    done = await place.host.in_thread(
        lambda: subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    )
    assert done.stdout.startswith("RemoteProtocolError")
    assert "two processes claim to be engine-0@5" in done.stdout
    assert f"process {os.getpid()}" in done.stdout
    await first.send(place.Ask("the first one is not disturbed"))
    assert (await anext((await place.served.get()).messages())).body.text.startswith("the first")


async def test_who_says_no_hello_in_time_is_closed_unanswered(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "HELLO_SECONDS_MAX", 0.05)
    await place.serve()
    raw = await place.raw()
    assert await raw.closed_after() == b""


@pytest.mark.parametrize(
    "first",
    [
        (HELLO_BYTES_MAX + 1).to_bytes(4, "big"),
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        encode_frame("raw", 1, 1, 0, Welcome(1)),
        encode_frame("raw", 1, 2, 0, Welcome(1)),
        encode_frame("raw", 0, 1, 0, Welcome(1)),
    ],
    ids=["too long", "4 GiB", "HTTP", "no Hello", "not the first", "no life"],
)
async def test_who_says_no_hello_at_all_is_closed_unanswered(place: Any, first: bytes) -> None:
    await place.serve()
    raw = await place.raw()
    await raw.stream.send(first)
    assert await raw.closed_after() == b""
    assert await place.connect() is not None


async def test_another_protocol_is_refused_in_words(place: Any) -> None:
    await place.serve()
    raw = await place.raw()
    answer = await raw.hello(protocol=99)
    refusal = msgspec.msgpack.decode(answer.body, type=Rejected)
    assert "protocol 99" in refusal.reason


async def test_another_user_is_closed_unanswered(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await place.serve()
    monkeypatch.setattr(hello_module.os, "getuid", lambda: os.geteuid() + 1)
    raw = await place.raw()
    with contextlib.suppress(ConnectionError):
        await raw.stream.send(encode_frame("raw", 1, 1, 0, Hello(1, "x", 1)))
    assert await raw.closed_after() == b""
    with pytest.raises(RemoteProtocolError, match="user"):
        await place.connect()


INTRUDER = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setgid(65534)
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect("s")
sock.settimeout(20)
try:
    sock.sendall(bytes.fromhex(sys.argv[2]))
    print(sock.recv(1000))
except ConnectionError:
    print(b"")
"""


async def test_a_stranger_who_reaches_the_socket_gets_no_answer(place: Any, tmp_path: Path) -> None:
    if os.getuid() != 0:
        return  # only root can become a stranger; the rule itself is tested above and below
    await place.serve()
    os.chmod(tmp_path / "s", 0o666)  # so that the check under test is all that keeps him out
    os.chmod(tmp_path, 0o755)
    hello = encode_frame("stranger", 1, 1, 0, Hello(1, "x", 1))
    argv = [sys.executable, "-c", INTRUDER, str(tmp_path), hello.hex()]
    run = functools.partial(subprocess.run, argv, capture_output=True, text=True, timeout=30)
    done = await place.host.in_thread(run)
    assert done.stdout == "b''\n", done.stderr
    assert place.served.empty()


@pytest.mark.parametrize("peer", [Peer("unix:/x", 1, 4242), Peer("unix:/x", None, None)])
def test_only_our_own_user_speaks_on_unix_sockets(peer: Peer) -> None:
    with pytest.raises(RemoteProtocolError, match="user"):
        hello_module.check_user(peer)
    hello_module.check_user(Peer("unix:/x", 1, os.getuid()))
    hello_module.check_user(Peer("tcp:host:1"))


async def test_tcp_needs_the_token_and_the_wrong_one_gets_no_answer(place: Any, host: RealHost) -> None:
    listener = await place.serve(address="tcp:127.0.0.1:0", token=b"secret")
    channel = await place.connect(address=listener.address, token=b"secret")
    assert channel.peer_process is None
    with pytest.raises(ConnectionError, match="unanswered"):
        await place.connect(address=listener.address, token=b"secreT")
    for call in (
        connect_channel(host, listener.address, me=place.me, role="x", accept=Welcome, deadline_s=1),
        serve_channels(host, "tcp:127.0.0.1:0", me=place.me, accept=Welcome, on_channel=print),
    ):
        with pytest.raises(LocalProtocolError, match="token"):
            await call


async def test_a_server_that_never_answers_is_given_up_at_the_deadline(place: Any, host: RealHost) -> None:
    async def mute(stream: Any) -> None:
        await asyncio.Event().wait()

    listener = await host.listen(place.address, mute)
    with pytest.raises(TimeoutError, match=r"Hello within 0\.05 s"):
        await place.connect(deadline_s=0.05)
    await listener.close()
