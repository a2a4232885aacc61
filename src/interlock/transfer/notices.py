"""Notifications: small messages to a peer, acknowledged, repeated until then, delivered once in the life of their receiver.

The sender numbers them for each peer and life; the receiver remembers the numbers it delivered. Its memory is bounded, so the sender stays
within it: no number is sent that is NOTICES_REMEMBERED_MAX above one that is still unacknowledged. A receiver whose queue is full does not
acknowledge; then the sender asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.core.limits import NOTICE_BYTES_MAX, NOTICES_REMEMBERED_MAX, NOTICES_WAITING_MAX
from interlock.transfer.outcomes import TransferFailed
from interlock.wire.identity import Identity
from interlock.wire.transfer_messages import Notified, Notify

REPEAT_SECONDS = 0.5


class Notice(msgspec.Struct, frozen=True):
    """What a peer notified us of; `incarnation` is the life in which it did."""

    sender: str
    incarnation: int
    payload: bytes


class _Heard:
    """Which numbers of one life of one sender were delivered."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self._floor = 0
        self._numbers: set[int] = set()

    def has(self, number: int) -> bool:
        return number <= self._floor or number in self._numbers

    def add(self, number: int) -> None:
        self._numbers.add(number)
        while self._floor + 1 in self._numbers:
            self._floor += 1
            self._numbers.discard(self._floor)
        if len(self._numbers) > NOTICES_REMEMBERED_MAX:
            self._floor = min(self._numbers)
            self._numbers.discard(self._floor)


class Notices:
    """Both ends of notifications: sent until acknowledged, delivered once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._pending: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._heard: dict[str, _Heard] = {}
        self._queue: asyncio.Queue[Notice] = asyncio.Queue(NOTICES_WAITING_MAX)

    async def send(self, peer: str, payload: bytes, timeout_s: float, post: Callable[[Notify], None]) -> None:
        """Returns when the peer has it. Raises `TransferFailed` ("deadline": it may have it or not), `LocalProtocolError`."""
        if len(payload) > NOTICE_BYTES_MAX:
            raise LocalProtocolError(
                f"a notification of {len(payload)} bytes is too long, {NOTICE_BYTES_MAX} are allowed"
            )
        number = self._numbers.get(peer, 0) + 1
        waiting = [n for name, n in self._pending if name == peer]
        if len(waiting) >= NOTICES_WAITING_MAX or (
            waiting and number - min(waiting) >= NOTICES_REMEMBERED_MAX
        ):
            raise LocalProtocolError(
                f"{len(waiting)} notifications to {peer} are unacknowledged", hint="wait for some"
            )
        self._numbers[peer] = number
        answered = self._pending[peer, number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                while not answered.done():
                    post(Notify(number, bytes(payload)))
                    await asyncio.wait((answered,), timeout=REPEAT_SECONDS)
        except TimeoutError:
            raise TransferFailed(
                "deadline",
                f"{peer} did not acknowledge a notification within {timeout_s} s",
                peer=peer,
                retryable=True,
            ) from None
        finally:
            del self._pending[peer, number]

    def acknowledged(self, peer: str, number: int) -> None:
        """The peer has it; who waits in `send` goes on."""
        answered = self._pending.get((peer, number))
        if answered is not None and not answered.done():
            answered.set_result(None)

    def arrived(self, sender: Identity, said: Notify) -> Notified | None:
        """The acknowledgement to send; None: the queue is full, it shall come again."""
        heard = self._heard.get(sender.name)
        if heard is None or heard.incarnation < sender.incarnation:
            heard = self._heard[sender.name] = _Heard(sender.incarnation)
        if heard.incarnation > sender.incarnation:
            return None  # of a life that is over
        if not heard.has(said.number):
            try:
                self._queue.put_nowait(Notice(sender.name, sender.incarnation, said.payload))
            except asyncio.QueueFull:
                return None
            heard.add(said.number)
        return Notified(said.number)

    async def next(self) -> Notice:
        """The next one that came, in order of arrival; waits for it."""
        return await self._queue.get()
