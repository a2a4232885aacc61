"""The front over HTTP on the simulated network: uvicorn's own protocol on a transport of ours, clients who leave, and fronts that die."""

from __future__ import annotations

import asyncio
import contextlib

import h11
import msgspec
import pytest

from interlock.testing.plugin import Simulation
from interlock.testing.sim.faults import Fault, shape_of
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.http import BUFFER_BYTES_MAX, Answered, HttpTransport, ask, events_in
from interlock.testing.sim.runs import report
from interlock.testing.sim.streams import WINDOW_BYTES, SimStream
from interlock.testing.sim.tokens import TOKEN_IDS, answer_to, impossible_token
from interlock.testing.sim.vocabulary import text_model
from interlock.testing.sim.worlds import run_world
from interlock.text.stream import TextStream

pytest_plugins = ["interlock.testing.plugin"]
ADDRESS = "unix:/run/web"
HEAD = b"HTTP/1.1 200 OK\r\nx-request-id: seven\r\ncontent-length: 5\r\n\r\n"


class Speaker(asyncio.Protocol):
    """Writes what it is told to, and notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard.append(data.decode())

    def pause_writing(self) -> None:
        self.heard.append("paused")

    def resume_writing(self) -> None:
        self.heard.append("resumed")

    def connection_lost(self, error: Exception | None) -> None:
        self.heard.append(f"lost: {error}")


def serve(simulation: Simulation, speaker: Speaker) -> None:
    async def main(host: SimHost) -> int:
        async def one(stream: object) -> None:
            assert isinstance(stream, SimStream)
            await HttpTransport(stream, speaker).run()

        await host.listen(ADDRESS, one)
        await asyncio.Event().wait()
        return 0

    simulation.kernel.start("here", "server", main, lambda _: None)


def client(simulation: Simulation) -> SimHost:
    async def main(host: SimHost) -> int:
        await asyncio.Event().wait()
        return 0

    return simulation.kernel.start("there", "client", main, lambda _: None).host


def test_a_reader_who_takes_nothing_makes_the_writer_wait_and_go_on(simulation: Simulation) -> None:
    speaker = Speaker()
    serve(simulation, speaker)

    async def story() -> None:
        host = client(simulation)
        await asyncio.sleep(0.1)
        stream = await host.connect(ADDRESS)
        await stream.send(b"hello")
        await asyncio.sleep(1.0)
        written = 2 * (WINDOW_BYTES + BUFFER_BYTES_MAX)
        speaker.transport.write(b"x" * written)
        await asyncio.sleep(1.0)
        assert speaker.heard == ["hello", "paused"]
        assert await stream.receive_exactly(written) == b"x" * written
        await asyncio.sleep(1.0)
        assert speaker.heard == ["hello", "paused", "resumed"]
        stream.close()
        await asyncio.sleep(1.0)
        assert speaker.heard[-1] == "lost: None"

    simulation.run(story)


def test_what_was_written_leaves_before_the_connection_is_closed(simulation: Simulation) -> None:
    speaker = Speaker()
    serve(simulation, speaker)

    async def story() -> None:
        host = client(simulation)
        await asyncio.sleep(0.1)
        stream = await host.connect(ADDRESS)
        await asyncio.sleep(0.5)
        speaker.transport.write(b"farewell")
        speaker.transport.close()
        speaker.transport.write(b"too late")
        assert await stream.receive_exactly(8) == b"farewell"
        with pytest.raises(EOFError):
            await stream.receive_exactly(1)

    simulation.run(story)


def test_a_client_reads_head_and_body_and_notices_a_connection_that_breaks(simulation: Simulation) -> None:
    speaker = Speaker()
    serve(simulation, speaker)

    async def story() -> None:
        host = client(simulation)
        await asyncio.sleep(0.1)
        for rest in (b"whole", b"ha"):
            heard: list[Answered | bytes] = []

            async def answer(rest: bytes = rest) -> None:
                await asyncio.sleep(0.5)
                speaker.transport.write(HEAD + rest)
                speaker.transport.close()

            answering = asyncio.create_task(answer())
            async with contextlib.aclosing(ask(host, ADDRESS, "GET", "/x")) as parts:
                try:
                    async for part in parts:
                        heard.append(part)
                except (EOFError, h11.RemoteProtocolError) as error:
                    heard.append(type(error).__name__.encode())
            await answering
            assert isinstance(heard[0], Answered), heard
            assert heard[0].headers["x-request-id"] == "seven"
            assert (heard[-1] == b"whole") == (rest == b"whole"), heard

    simulation.run(story)


def test_an_event_is_heard_when_it_is_whole() -> None:
    buffer = bytearray(b"data: one\n\ndata: tw")
    assert events_in(buffer) == [b"one"]
    buffer += b"o\n\n"
    assert events_in(buffer) == [b"two"]
    assert not buffer


def test_the_made_up_vocabulary_has_every_token_and_words_that_share_a_character() -> None:
    model = text_model()
    assert model.vocabulary_size == TOKEN_IDS
    ends = next(n for n in range(1000, 1100) if n % 7 == 0)
    begins = ends + 1
    stream = TextStream(model)
    texts = [stream.push([token]) for token in (ends, begins)]
    assert "é" not in texts[0]
    assert texts[1].startswith("é")
    assert model.encode("lever 日本"), "chats are text"


def test_an_answer_that_broke_off_is_judged_by_all_weights_there_were() -> None:
    prompt = [3, 4]
    tokens = answer_to(prompt, 3, "2")
    assert impossible_token(prompt, tokens, ["0", "2"]) is None
    assert impossible_token(prompt, tokens, ["0"]) is not None
    assert impossible_token(prompt, tokens[1:], ["0", "2"]) is not None


@pytest.mark.simulator
@pytest.mark.timeout(120)
def test_answers_over_http_survive_their_front_and_are_taken_up_at_their_cursor() -> None:
    taken_up = 0
    for seed in range(3):
        shape = msgspec.structs.replace(shape_of(seed), web=True, fronts=1, run_s=12.0)
        faults = [Fault(2.0 + n, "crash", "front-0") for n in range(0, 10, 2)]
        faults += [Fault(2.5 + n, "reset", "front-0", "web-0") for n in range(0, 10, 3)]
        result = run_world(seed, shape, faults)
        assert result.ok, report(result)
        taken_up += sum("has all" in line for line in result.lines)
    assert taken_up >= 3
