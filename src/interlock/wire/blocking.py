"""Channels for code on a foreign engine's threads: one question at a time, each with its own deadline.

Nothing runs between calls, so nothing is read then either: what the peer said meanwhile (late answers, pings) is taken in
and dropped at the next call. After a time-out the channel goes on, for the late answer is known by its number; only a
time-out in the middle of sending closes it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from interlock.core.errors import (
    ChannelClosed,
    ChannelFault,
    InterlockError,
    LocalProtocolError,
    RemoteProtocolError,
    StaleError,
)
from interlock.core.limits import FRAME_BYTES_MAX, HELLO_BYTES_MAX
from interlock.host.blocking import BlockingStream, connect_blocking, monotonic_s
from interlock.host.threads import Lock
from interlock.host.watch import ProcessWatch
from interlock.wire.conversation import Conversation, Invalid
from interlock.wire.envelope import Envelope, Fault, Ping, Pong
from interlock.wire.framing import HEADER_BYTES, decode_envelope, frame_length
from interlock.wire.hello import check_token, check_user, hello_frame, read_answer
from interlock.wire.identity import Identity

RAISES_MAX = 8
POST_SECONDS_MAX = 1.0
"""A message without an answer waits so long for room in the socket: its peer drains it off its own threads."""


class BlockingChannel:
    """Safe to use from several threads; they take turns."""

    def __init__(self, stream: BlockingStream, talk: Conversation) -> None:
        self._stream, self._talk = stream, talk
        self._peer_process = stream.watch_peer()
        self._turn = Lock()
        self._closed: InterlockError | None = None

    @classmethod
    def connect(
        cls, address: str, *, me: Identity, role: str, accept: Any, timeout_s: float, token: bytes = b""
    ) -> BlockingChannel:
        """Raises what `wire.channel.connect_channel` raises."""
        check_token(address, token)
        deadline_s = monotonic_s() + timeout_s
        for _ in range(RAISES_MAX):
            stream = connect_blocking(address, deadline_s)
            try:
                peer = _greet(stream, address, me, role, token, deadline_s)
                if peer is not None:
                    return cls(stream, Conversation(me, peer, accept, None))
            except BaseException:
                stream.close()
                raise
            stream.close()
        raise LocalProtocolError(
            f"{me} was refused as an old life {RAISES_MAX} times", hint="is a twin of it running?"
        )

    @property
    def peer(self) -> Identity:
        """Who answered our Hello, in which life."""
        return self._talk.peer

    @property
    def peer_process(self) -> ProcessWatch | None:
        """Proof of the peer's exit (`.exited` needs no loop); None where it has no process on this machine."""
        return self._peer_process

    @property
    def closed(self) -> InterlockError | None:
        """Why the channel is closed, as far as the last call noticed, or None."""
        return self._closed

    def request(self, body: msgspec.Struct, timeout_s: float) -> Any:
        """The answer's body. Raises `ChannelFault` when the peer refused, `TimeoutError`, `ChannelClosed`.

        `timeout_s` covers the turns of other threads too. Descriptors that came with the answer wait in `take_fds`.
        """
        deadline_s = monotonic_s() + timeout_s
        with self._in_turn(timeout_s):
            number = self._say(body, deadline_s)
            while True:
                envelope, answer = self._hear(deadline_s)
                if envelope.answers == number:
                    break
        if isinstance(answer, Fault):
            raise ChannelFault(answer.code, answer.message, answer.retryable)
        if isinstance(answer, Invalid):
            raise RemoteProtocolError(
                f"the answer of {self.peer} is none that is understood here: {answer.reason}"
            )
        return answer

    def post(self, body: msgspec.Struct) -> None:
        """Sends; whatever is answered is dropped. Raises `ChannelClosed`, and `TimeoutError` when no room was had."""
        deadline_s = monotonic_s() + POST_SECONDS_MAX
        with self._in_turn(POST_SECONDS_MAX):
            self._drain(deadline_s)
            self._say(body, deadline_s)

    def take_fds(self) -> list[int]:
        """Descriptors received so far, owned by the caller from now on."""
        return self._stream.take_fds()

    def close(self) -> None:
        """Also while another thread waits in a call, which then raises `ChannelClosed`. Idempotent."""
        self._shut(ChannelClosed(f"this side closed the channel to {self.peer}"))

    @contextlib.contextmanager
    def _in_turn(self, timeout_s: float) -> Any:
        if not self._turn.acquire(timeout=max(0.0, timeout_s)):
            raise TimeoutError(f"other threads used the channel to {self.peer} until the deadline")
        try:
            if self._closed is not None:
                raise ChannelClosed(str(self._closed)) from self._closed
            yield
        except EOFError:
            raise self._shut(ChannelClosed(f"{self.peer} closed the channel")) from None
        except ConnectionError as error:
            if isinstance(error, ChannelClosed):
                raise
            raise self._shut(ChannelClosed(f"the connection to {self.peer} broke: {error}")) from error
        except (RemoteProtocolError, StaleError) as error:
            why = self._shut(error)
            raise ChannelClosed(str(why)) from why
        finally:
            self._turn.release()

    def _say(self, body: msgspec.Struct, deadline_s: float, answers: int = 0) -> int:
        number, frame = self._talk.say(body, answers)
        try:
            self._stream.send(frame, deadline_s)
        except TimeoutError:
            # Half a frame may have left, and the next would be read as its rest.
            self._shut(
                ChannelClosed(f"{self.peer} read too slowly: a message did not leave before its deadline")
            )
            raise
        return number

    def _hear(self, deadline_s: float) -> tuple[Envelope, Any]:
        """The next message. A frame is taken whole or not at all, so a time-out loses nothing."""
        length = frame_length(self._stream.peek(HEADER_BYTES, deadline_s), FRAME_BYTES_MAX)
        frame = self._stream.receive_exactly(HEADER_BYTES + length, deadline_s)
        envelope, body = self._talk.hear(frame[HEADER_BYTES:])
        if isinstance(body, Ping):
            self._say(Pong(), deadline_s, envelope.number)
        return envelope, body

    def _drain(self, deadline_s: float) -> None:
        """Takes what has arrived: unread answers would fill the socket until the peer gave this channel up."""
        self._stream.receive_available()
        while self._stream.buffered_bytes >= HEADER_BYTES:
            length = frame_length(self._stream.peek(HEADER_BYTES, deadline_s), FRAME_BYTES_MAX)
            if self._stream.buffered_bytes < HEADER_BYTES + length:
                return
            self._hear(deadline_s)

    def _shut(self, why: InterlockError) -> InterlockError:
        if self._closed is None:
            self._closed = why
        self._stream.close()
        return self._closed


def _greet(
    stream: BlockingStream, address: str, me: Identity, role: str, token: bytes, deadline_s: float
) -> Identity | None:
    check_user(stream.peer)
    stream.send(hello_frame(me, role, token), deadline_s)
    try:
        length = frame_length(stream.receive_exactly(HEADER_BYTES, deadline_s), HELLO_BYTES_MAX)
        envelope = decode_envelope(stream.receive_exactly(length, deadline_s))
    except EOFError:
        raise ChannelClosed(
            f"{address} closed the connection unanswered", hint="is it our token and user?"
        ) from None
    return read_answer(envelope, address, me)
