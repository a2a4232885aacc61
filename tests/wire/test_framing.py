"""Every byte from outside: refused in words, or one of the types that were named; nothing is allocated for a promise."""

from __future__ import annotations

import contextlib
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.errors import LocalProtocolError, RemoteProtocolError, StaleError
from interlock.core.limits import FRAME_BYTES_MAX, NAME_CHARS_MAX
from interlock.wire.conversation import Conversation, Invalid
from interlock.wire.envelope import Envelope, Hello, Ping, Rejected
from interlock.wire.framing import HEADER_BYTES, decode_envelope, encode_frame, frame_length
from interlock.wire.identity import Identity, KnownPeers
from interlock.wire.store_messages import ClientMessage, Match


def conversation(known: KnownPeers | None = None) -> Conversation:
    return Conversation(Identity("me", 1), Identity("peer", 7), ClientMessage, known)


def frame_of(
    body: bytes, *, sender: str = "peer", incarnation: int = 7, number: int = 2, answers: int = 0
) -> bytes:
    return msgspec.msgpack.encode(Envelope(sender, incarnation, number, answers, msgspec.Raw(body)))


def test_what_is_said_is_heard() -> None:
    match = Match([b"k" * 32])
    number, frame = Conversation(Identity("peer", 7), Identity("me", 1), ClientMessage, None).say(match)
    assert frame_length(frame[:HEADER_BYTES], FRAME_BYTES_MAX) == len(frame) - HEADER_BYTES
    envelope, body = conversation().hear(frame[HEADER_BYTES:])
    assert (envelope.sender, envelope.incarnation, envelope.number, body) == ("peer", 7, number, match)


@pytest.mark.parametrize("length", [0, FRAME_BYTES_MAX + 1, 0xFFFFFFFF])
def test_a_length_out_of_bounds_is_refused_by_its_four_bytes_alone(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=str(length)):
        frame_length(length.to_bytes(4, "big"), FRAME_BYTES_MAX)
    assert frame_length(FRAME_BYTES_MAX.to_bytes(4, "big"), FRAME_BYTES_MAX) == FRAME_BYTES_MAX


def test_a_frame_that_nobody_would_take_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="Hello of"):
        encode_frame("me", 1, 1, 0, Hello(1, "x" * FRAME_BYTES_MAX, 1))


@pytest.mark.parametrize(
    "claim",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"],
)
def test_lengths_inside_a_frame_claim_no_memory(claim: bytes) -> None:
    match = bytearray(msgspec.msgpack.encode({"type": "Match", "keys": []}))
    assert match.endswith(b"\x90")
    match[-1:] = claim
    tracemalloc.start()
    for frame in (claim, frame_of(bytes(match)), frame_of(claim)):
        with pytest.raises(RemoteProtocolError):
            conversation().hear(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_bodies_nested_without_end_are_refused() -> None:
    deep = b"\x91" * 200_000 + b"\xc0"
    with pytest.raises(RemoteProtocolError):
        decode_envelope(deep)
    try:
        _, body = conversation().hear(frame_of(deep))
        assert isinstance(body, Invalid)
    except RemoteProtocolError:
        pass


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_is_refused_or_invalid_and_never_anything_else(data: bytes) -> None:
    for frame in (data, frame_of(data)):
        try:
            _, body = conversation().hear(frame)
        except (RemoteProtocolError, StaleError):
            continue
        assert isinstance(body, Invalid | msgspec.Struct)


VALID = frame_of(msgspec.msgpack.encode(Match([b"k" * 32, b"l" * 32])))


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=6))
def test_a_message_with_some_bytes_changed_never_breaks_its_reader(at: int, change: bytes) -> None:
    body: object = Invalid("refused")
    with contextlib.suppress(RemoteProtocolError, StaleError):
        _, body = conversation().hear(VALID[:at] + change + VALID[at + len(change) :])
    assert isinstance(body, Invalid | msgspec.Struct)


@pytest.mark.parametrize(
    "header",
    [
        {"sender": "other"},
        {"sender": ""},
        {"sender": "x" * (NAME_CHARS_MAX + 1)},
        {"incarnation": 8},
        {"incarnation": 0},
        {"number": 1},
        {"number": 0},
        {"answers": -1},
        {"answers": 99},
    ],
)
def test_a_peer_keeps_its_name_its_life_and_its_order(header: dict[str, object]) -> None:
    ping = msgspec.msgpack.encode(Ping())
    conversation().hear(frame_of(ping))
    with pytest.raises(RemoteProtocolError):
        conversation().hear(frame_of(ping, **header))  # type: ignore[arg-type]


def test_a_body_of_another_contract_is_invalid_and_says_why() -> None:
    _, body = conversation().hear(frame_of(msgspec.msgpack.encode(Hello(1, "x", 1))))
    assert isinstance(body, Invalid)
    assert "Hello" in body.reason


def test_the_word_of_a_life_that_was_overtaken_is_not_heard() -> None:
    known = KnownPeers()
    known.admit("peer", 7, b"", None)
    talk = conversation(known)
    ping = msgspec.msgpack.encode(Ping())
    talk.hear(frame_of(ping))
    known.admit("peer", 8, b"", None)
    with pytest.raises(StaleError) as caught:
        talk.hear(frame_of(ping, number=3))
    assert caught.value.highest == 8


def test_being_told_of_a_newer_life_ends_ours() -> None:
    with pytest.raises(StaleError, match="stop this process") as caught:
        conversation().hear(frame_of(msgspec.msgpack.encode(Rejected("newer", 9))))
    assert caught.value.highest == 9
