"""A blocking stream that is closed by another thread wakes who waits, and touches no file that got its number."""

from __future__ import annotations

import socket
import threading

from interlock.host.blocking import BlockingStream, monotonic_s

ROUNDS = 300


def test_whoever_waits_is_woken_also_when_the_number_is_used_again_at_once() -> None:
    seen: set[str] = set()

    def wait(stream: BlockingStream) -> None:
        try:
            stream.peek(4, monotonic_s() + 20.0)
        except (ConnectionError, TimeoutError, EOFError) as error:
            seen.add(type(error).__name__)

    for round_ in range(ROUNDS):
        ours, theirs = socket.socketpair()
        stream = BlockingStream(ours, "unix:/x")
        waiting = threading.Thread(target=wait, args=(stream,))
        waiting.start()
        for _ in range(round_ % 50):
            pass  # another moment of the wait each time
        stream.close()
        successors = socket.socketpair()
        waiting.join(5.0)
        assert not waiting.is_alive(), f"round {round_}: it waits for a file that is not its own"
        for sock in (theirs, *successors):
            sock.close()
    assert "TimeoutError" not in seen
