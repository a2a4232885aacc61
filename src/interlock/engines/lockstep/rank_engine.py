"""The Transformers engine of one rank: the same, but that it steps by grants and is asked by messages instead of iterators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future

import msgspec

from interlock.core.limits import FRAME_BYTES_MAX
from interlock.engines.base import Capabilities, EngineGone, EngineStartError, Progress, RequestState, Work
from interlock.engines.lockstep.seat import Seat
from interlock.engines.lockstep.stepping import LockstepLoop
from interlock.engines.transformers.engine import Told, TransformersEngine
from interlock.engines.transformers.plans import Moved
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.base import Host

STATE_BYTES_MAX = FRAME_BYTES_MAX // 2
"""Of a request's caches, handed out in one frame; what is larger is computed again where it goes on."""


class RankEngine(TransformersEngine):
    """Its listeners are called in the loop's thread: `on_made` after a step that made something, `on_said`, `on_death`."""

    def __init__(
        self,
        host: Host,
        config: TransformersConfig,
        *,
        on_made: Callable[[Told], None],
        on_said: Callable[[], None],
        on_death: Callable[[str], None],
    ) -> None:
        super().__init__(host, config)
        assert config.expert_group is not None
        self._rank = config.expert_group.rank
        self._on_made, self._on_said, self._on_death = on_made, on_said, on_death

    async def start(self) -> Capabilities:
        capabilities = await super().start()
        if not self._built.ranks.computer.nature.batches:
            raise EngineStartError(
                "this model computes its decoding requests one by one, and a step of a lockstep group is one forward; "
                "leave --data-parallel out and start more engines"
            )
        return capabilities

    @property
    def loop(self) -> LockstepLoop:
        assert isinstance(self._loop, LockstepLoop)
        return self._loop

    @property
    def seat(self) -> Seat:
        return self.loop.seat

    # --- requests ------------------------------------------------------------------------------------------------

    async def begin(self, work: Work) -> None:
        """Raises `RequestRejected`, `EngineGone`."""
        self._check(work)
        await self._ask(lambda: self.loop.add(lambda order: self._request(work, order)))

    async def put_back(self, state: RequestState) -> None:
        """Raises `RequestRejected`, `EngineGone`."""
        make = self._put_back(state)
        await self._ask(lambda: self.loop.add(make))

    async def forget(self, key: str, *, told: bool) -> None:
        """Ends a request; with `told` its last word is an abort."""

        def remove() -> None:
            if self.loop.remove(key) and told:
                self.loop.tell(key, Progress([], [], "abort", 0))

        await self._ask(remove)

    async def take_out(self, key: str) -> RequestState:
        """As `take`; without its caches where they are too large for one frame."""
        state = await self.take(key)
        if len(state.payload) <= STATE_BYTES_MAX:
            return state
        moved = msgspec.msgpack.decode(state.payload, type=Moved)
        bare = msgspec.structs.replace(moved, computed=0, caches=[])
        return msgspec.structs.replace(state, payload=msgspec.msgpack.encode(bare))

    async def states_page(self, after: int) -> tuple[list[RequestState], bool]:
        """As `states`, as many as fit into one frame after the first `after`; whether there are more."""
        states = await self.states()
        page: list[RequestState] = []
        size = 0
        for state in states[after:]:
            size += len(state.payload) + 5 * (len(state.work.prompt) + len(state.tokens))
            if page and size > STATE_BYTES_MAX:
                break
            page.append(state)
        return page, after + len(page) < len(states)

    def hold(self, number: int, mode: str) -> None:
        """Asked for in order: a later hold never comes before an earlier one. Nobody waits for its answer, so one that fails
        ends this rank."""
        asyncs = asyncio.get_running_loop()

        def failed(done: Future[None]) -> None:
            error = done.exception()
            if error is not None and not isinstance(error, EngineGone):
                with contextlib.suppress(RuntimeError):
                    asyncs.call_soon_threadsafe(self._die, f"hold {number} {mode!r} failed: {error}")

        self.loop.ask(lambda: self.loop.hold(number, mode)).add_done_callback(failed)

    # --- the loop's words ----------------------------------------------------------------------------------------

    def _make_loop(self, deliver: Callable[[Told], None], die: Callable[[str], None]) -> LockstepLoop:
        asyncs = asyncio.get_running_loop()

        def say() -> None:
            with contextlib.suppress(RuntimeError):  # nobody is left to hear it
                asyncs.call_soon_threadsafe(self._on_said)

        return LockstepLoop(deliver, die, say, self._rank)

    def _deliver(self, told: Told) -> None:
        self._on_made(told)

    def _die(self, why: str) -> None:
        super()._die(why)
        self._on_death(why)
