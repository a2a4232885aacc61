"""The thread that keeps a store client connected, and delivers what must not be lost.

Two connections to the node: one for look-ups, used by the engine's threads with milliseconds to spend, and one of the
keeper's own, on which it attaches, asks now and then whether the node is still there, and delivers promises one by one
until each is acknowledged. With one connection a report under way would make a look-up wait.

A promise (report, abort, withdrawal) concerns one slab. When the node comes back with another, promises about the old one
are void: nobody else can be given those slots any more. One for a life of the node that we are not attached to yet waits: a
scheduler may be quicker than its ranks, at the start and when the node was restarted. When the same node life comes back after a broken connection,
they are delivered again; every one of them may be repeated (core/joins, core/sessions).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

import msgspec

from interlock.core import limits
from interlock.core.errors import (
    ChannelFault,
    InterlockError,
    LocalProtocolError,
    RemoteProtocolError,
    StaleError,
)
from interlock.host.threads import Condition, Thread, monotonic_s, start_thread
from interlock.store.mapping import MappedSlab
from interlock.wire.blocking import BlockingChannel
from interlock.wire.identity import Identity
from interlock.wire.store_messages import AbortWrite, Attach, Attached, Match, NodeMessage, Report, Withdraw

ROLE = "store-client"
DELIVERY_SECONDS_MAX = 1.0
_log = logging.getLogger(__name__)

PromiseBody = Report | AbortWrite | Withdraw


class Link(msgspec.Struct, frozen=True, eq=False):
    """Being attached to one life of the node."""

    lookups: BlockingChannel
    deliveries: BlockingChannel
    node_incarnation: int
    slab: int
    mapped: MappedSlab | None
    wants_tokens: bool = False

    @property
    def rank_slab(self) -> MappedSlab:
        """The slab, of a link that a rank has: only a scheduler's maps none."""
        assert self.mapped is not None, "a rank's link maps the slab"
        return self.mapped

    def close(self) -> None:
        """Ends both connections; the mapping goes with its last user."""
        self.lookups.close()
        self.deliveries.close()


class _Promise(msgspec.Struct):
    slab: int
    body: PromiseBody
    node: int
    """Life of the node that it is for; 0: of the one whose slab is ours."""


class Silence:
    """How long one connection has answered nothing that was asked: it may be half-open, and nobody would ever tell us."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._since_s = 0.0

    def is_too_long(self, link: Link, now_s: float) -> bool:
        """One more question on `link` was not answered in time."""
        if self._link is not link:
            self._link, self._since_s = link, now_s
        return now_s - self._since_s > limits.SILENCE_SECONDS_MAX

    def ended(self) -> None:
        """It has answered."""
        self._link = None


class Keeper:
    """Owns the link. `count` is called, from any thread, with the reason of whatever went wrong."""

    def __init__(
        self, address: str, me: Identity, attach: Attach, token: bytes, count: Callable[[str], None]
    ) -> None:
        self._address, self._me, self._attach, self._token = address, me, attach, token
        self._count = count
        self._changed = Condition()
        self._link: Link | None = None
        self._last_slab = self._last_node = 0
        self._promises: deque[_Promise] = deque()
        self._thread: Thread | None = None
        self._deliveries = Silence()
        self._closing = False
        self.last_error = "not connected yet"

    @property
    def link(self) -> Link | None:
        """The link there is now, or None."""
        return self._link

    @property
    def last_slab(self) -> int:
        """The slab we were last attached to; 0 before the first."""
        return self._last_slab

    def start(self) -> None:
        """Starts the thread, once. Returns at once."""
        if self._thread is not None:
            return
        with self._changed:
            if self._thread is None and not self._closing:
                self._thread = start_thread(f"interlock-store-{self._me.name}", self._run)

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether we were attached within `timeout_s`."""
        self.start()
        with self._changed:
            return self._changed.wait_for(lambda: self._link is not None or self._closing, timeout_s) and (
                self._link is not None
            )

    def promise(self, slab: int, body: PromiseBody, node: int = 0) -> bool:
        """Queues it for delivery. False: it is void, or there is no room (the slots then wait for our exit)."""
        self.start()
        with self._changed:
            if not slab or (slab != self._last_slab and node <= self._last_node):
                reason = "stale_slab"
            elif len(self._promises) >= limits.PENDING_REPORTS_MAX:
                reason = "queue_full"
            else:
                self._promises.append(_Promise(slab, body, node))
                self._changed.notify_all()
                return True
        self._count(f"{type(body).__name__.lower()}_dropped_{reason}")
        return False

    def wait_delivered(self, timeout_s: float) -> bool:
        """Whether every promise was acknowledged or became void within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._promises, timeout_s)

    def broken(self, link: Link, error: BaseException) -> None:
        """That link is of no more use; the keeper makes a new one."""
        with self._changed:
            if self._link is not link:
                return
            self._link = None
            self.last_error = str(error)
            self._changed.notify_all()
        self._count("link_broken")
        link.close()

    def close(self) -> None:
        """Ends the thread, after a last try to deliver what is promised."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(limits.REPORT_RETRY_SECONDS + DELIVERY_SECONDS_MAX)
        link = self._link
        if link is not None:
            self.broken(link, InterlockError("closed"))

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except Exception:  # of ours: without this thread no promise would ever be delivered again
                _log.exception("%s: the keeper of the store's link failed and goes on", self._me.name)
                self._count("keeper_error")
                self._pause()
        deadline_s = monotonic_s() + limits.REPORT_RETRY_SECONDS
        while (link := self._link) is not None and self._deliver(link) and monotonic_s() < deadline_s:
            pass
        if link is not None:  # `close` may have waited no longer
            self.broken(link, InterlockError("closed"))

    def _turn(self) -> None:
        link = self._link
        if link is None:
            if not self._connect():
                self._wait(limits.BREAKER_PROBE_SECONDS)
        elif not self._deliver(link):
            self._wait(limits.HEARTBEAT_SECONDS)
            if self._link is link and self._next(link) is None and not self._closing:
                self._ask(link, Match([]))

    def _wait(self, timeout_s: float) -> None:
        """Until there is something to do, or `timeout_s` passed."""
        with self._changed:
            before = self._link
            self._changed.wait_for(
                lambda: self._closing or self._link is not before or bool(before and self._next(before)),
                timeout_s,
            )

    def _connect(self) -> bool:
        try:
            link = self._make_link()
        except StaleError as error:  # a newer life of ours exists: this one must not come back
            self._closing = True
            return self._failed(error)
        except (InterlockError, OSError, TimeoutError, ValueError) as error:
            return self._failed(error)
        with self._changed:
            kept = [p for p in self._promises if p.slab == link.slab or p.node > link.node_incarnation]
            void = [p for p in self._promises if p.slab != link.slab and p.node <= link.node_incarnation]
            self._promises = deque(kept)
            self._link, self._last_slab, self.last_error = link, link.slab, ""
            self._last_node = link.node_incarnation
            self._changed.notify_all()
        for promise in void:
            self._count(f"{type(promise.body).__name__.lower()}_dropped_stale_slab")
        self._count("attached")
        return True

    def _failed(self, error: BaseException) -> bool:
        if str(error) != self.last_error:
            _log.warning("%s: not attached to the store: %s", self._me.name, error)
        self.last_error = str(error)
        self._count("attach_failed")
        return False

    def _make_link(self) -> Link:
        deliveries = self._open()
        try:
            attached = _attached(deliveries.request(self._attach, limits.STORE_ATTACH_SECONDS_MAX))
            mapped = self._map(deliveries, attached)
            lookups = self._open()
            try:
                if self._attach.rank is None or self._attach.leads:  # write sessions are begun on this one
                    again = _attached(lookups.request(self._attach, limits.STORE_ATTACH_SECONDS_MAX))
                    for fd in lookups.take_fds():  # the same slab once more
                        os.close(fd)
                    if again.slab != attached.slab:
                        raise ConnectionError("the store was restarted while we attached")
                life = deliveries.peer.incarnation
                return Link(lookups, deliveries, life, attached.slab, mapped, attached.wants_tokens)
            except BaseException:
                lookups.close()
                raise
        except BaseException:
            deliveries.close()
            raise

    def _open(self) -> BlockingChannel:
        return BlockingChannel.connect(
            self._address,
            me=self._me,
            role=ROLE,
            accept=NodeMessage,
            timeout_s=limits.STORE_ATTACH_SECONDS_MAX,
            token=self._token,
        )

    def _map(self, channel: BlockingChannel, attached: Attached) -> MappedSlab | None:
        fds, wanted = channel.take_fds(), int(self._attach.rank is not None)
        if len(fds) != wanted:
            for fd in fds:
                os.close(fd)
            raise ValueError(f"the store sent {len(fds)} descriptors with its slab, not {wanted}")
        if not fds:
            return None
        return MappedSlab(
            fds[0],
            slab=attached.slab,
            node_incarnation=channel.peer.incarnation,
            size_bytes=attached.slab_bytes,
            layout=self._attach.layout,
            writable=self._attach.writes,
        )

    def _deliver(self, link: Link) -> bool:
        """Delivers the promise that waits longest; False when there is none or it has to wait."""
        with self._changed:
            promise = self._next(link)
        if promise is None:
            return False
        heard, settled = self._ask(link, promise.body)
        if not heard:
            return False
        with self._changed:
            if any(kept is promise for kept in self._promises):
                self._promises = deque(kept for kept in self._promises if kept is not promise)
                if not settled:
                    self._promises.append(promise)
            self._changed.notify_all()
        if not settled:
            self._pause()
        return settled

    def _next(self, link: Link) -> _Promise | None:
        """The promise for this life of the node that waits longest."""
        return next((promise for promise in self._promises if promise.slab == link.slab), None)

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, limits.REPORT_RETRY_SECONDS)

    def _ask(self, link: Link, body: PromiseBody | Match) -> tuple[bool, bool]:
        """(answered at all, nothing more to do about it)."""
        word = type(body).__name__.lower()
        try:
            link.deliveries.request(body, DELIVERY_SECONDS_MAX)
        except ChannelFault as fault:
            self._count(f"{word}_refused_{fault.code}")
            self._deliveries.ended()
            return True, not fault.retryable
        except TimeoutError as error:
            self._count(f"{word}_timeout")
            if self._deliveries.is_too_long(link, monotonic_s()):
                self.broken(link, error)
            return False, False
        except LocalProtocolError as error:  # fits into no frame, now or later; its slots wait for our exit
            _log.error("%s: %s", self._me.name, error)
            self._count(f"{word}_dropped_unsayable")
            return True, True
        except (InterlockError, OSError) as error:
            self.broken(link, error)
            return False, False
        self._deliveries.ended()
        return True, True


def _attached(answer: object) -> Attached:
    if not isinstance(answer, Attached):
        raise RemoteProtocolError(f"the store answered an attachment with {type(answer).__name__}")
    return answer
