"""A tenant's deletion on several nodes: nothing of his comes back from a node that was asked a moment later.

What can go wrong. Removing on one node alone undoes itself: the next look-up brings the blocks back from a peer. Asking every
node to remove does not help either: one that is done takes a block up again from one that is not, and the last to be asked
finds it gone, and so on around.

So a removal *holds* before it sweeps: from the moment a node hears of it, it takes up nothing from peers that the removal
concerns, also not what was under way. When every node has answered, none has such a block and none can be coming; only then
the holds are lifted. When one did not answer it may have them still, and its name goes back to whoever asked: the holds of the
others stay until their deadline, and the removal has to be said again when that node is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from interlock.core import limits
from interlock.core.errors import InterlockError
from interlock.host.base import Clock
from interlock.store.desk import concerns
from interlock.store.refusal import Refusal
from interlock.wire.store_messages import Done, HexPrefix, Remove, Tenant

_US = ""
"""In place of a peer's name."""
_log = logging.getLogger(__name__)


class RemoveHere(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Take up nothing of this from peers any more until `RemovedEverywhere`, and remove what you have. Answered by `Done`."""

    tenant: Tenant | None
    prefix: HexPrefix


class RemovedEverywhere(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Every node has removed it. Answered by `Done`."""

    tenant: Tenant | None
    prefix: HexPrefix


Ask = Callable[[str, msgspec.Struct, type[Done]], Awaitable[Done]]
Removal = tuple[Tenant | None, HexPrefix]


class PeerRemoval:
    """One node's part. `remove`: takes blocks away here, and returns when nothing that was under way before can arrive any
    more. `ask`: a peer's answer; raises what `TransferEngine.ask` does."""

    def __init__(
        self,
        clock: Clock,
        peers: Sequence[str],
        ask: Ask,
        remove: Callable[[Remove], Awaitable[int]],
    ) -> None:
        self._clock, self._peers, self._ask, self._remove = clock, list(peers), ask, remove
        self._held: dict[tuple[str, Removal], float] = {}
        """Who asked for which removal, and until when it holds at most."""

    def holds(self, key: bytes, tenant: str) -> bool:
        """Whether this block of a peer must not be taken up now."""
        if not self._held:
            return False
        now_s = self._clock.monotonic_s()
        self._held = {what: until_s for what, until_s in self._held.items() if until_s > now_s}
        return any(concerns(whose, prefix, key, tenant) for _, (whose, prefix) in self._held)

    async def everywhere(self, body: Remove) -> Done:
        """Here and at every peer. `Done.missed`: the peers that did not answer, or could not."""
        what = (body.tenant, body.prefix)
        self._hold(_US, what)
        answers = await asyncio.gather(
            self._remove(body),
            *(self._at(peer, RemoveHere(*what)) for peer in self._peers),
        )
        missed = [peer for peer, gone in zip(self._peers, answers[1:], strict=True) if gone is None]
        if not missed:
            self._held.pop((_US, what), None)
            # One that does not hear this goes on holding until its deadline, which costs it misses.
            await asyncio.gather(*(self._at(peer, RemovedEverywhere(*what)) for peer in self._peers))
        return Done(sum(gone or 0 for gone in answers), missed)

    async def heard(self, peer: str, question: RemoveHere | RemovedEverywhere) -> Done:
        """What a peer asks. Raises `Refusal`."""
        what = (question.tenant, question.prefix)
        if isinstance(question, RemovedEverywhere):
            self._held.pop((peer, what), None)
            return Done()
        if question.tenant is None and not question.prefix:
            raise Refusal("bad_remove", f"{peer} would have everything removed without saying so")
        self._hold(peer, what)
        return Done(await self._remove(Remove(question.tenant, question.prefix)))

    def _hold(self, who: str, what: Removal) -> None:
        if len(self._held) >= limits.PEER_REMOVALS_MAX and (who, what) not in self._held:
            raise Refusal(
                "too_many_removals",
                f"{limits.PEER_REMOVALS_MAX} removals are under way between the nodes",
                retryable=True,
            )
        self._held[who, what] = self._clock.monotonic_s() + 2 * limits.PEER_REMOVE_SECONDS_MAX

    async def _at(self, peer: str, question: RemoveHere | RemovedEverywhere) -> int | None:
        try:
            return (await self._ask(peer, question, Done)).count
        except (InterlockError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            _log.warning("node %s did not take part in a removal: %s", peer, error)
            return None
