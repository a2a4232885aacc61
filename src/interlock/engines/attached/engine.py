"""An attached vLLM as the member walks it: pause, update, suspend and their ends, with the traps of vLLM 0.32 around them.

* A pause clears vLLM's caches, and its connector's, unless told otherwise: it is told otherwise.
* An update changes weights in place, then drops every cached block, the connector's knowledge included, so that a request that comes
  afterwards hits no KV of the old version (`docs/decisions/005`, `020`). vLLM refuses to drop while a load is on its way: asked again
  until that has ended. Only then is the new version reported.
* Between our steps others may resume it. `look` sees that and pauses it again: a level, not a signal.
* A server may be started anew under us, with the weights it began with. vLLM's own label of its weights, which an update sets, tells:
  `look` raises `AnotherLife`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

from interlock.core.limits import ATTACH_STEP_SECONDS_MAX, RECONNECT_SECONDS_MAX
from interlock.core.targets import KeptCache, Mode, stricter
from interlock.engines.attached.calls import CallFailed, Calls, Described, Unreachable, not_attached
from interlock.engines.base import (
    Capabilities,
    Engine,
    EngineGone,
    EngineStartError,
    NotStanding,
    Progress,
    Unable,
    UpdateFailed,
    Work,
)
from interlock.host.base import Host
from interlock.wire.fleet_messages import Load

_log = logging.getLogger(__name__)

Update = Callable[[Path, str], Awaitable[None]]
"""How a trainer gives an engine its weights, called with (checkpoint directory, version) while the engine stands."""
DROP_SECONDS_MAX = 30.0
DROP_RETRY_SECONDS = 0.1


UNNAMED = "default"
"""vLLM's label of weights that nobody has named."""


class AnotherLife(Exception):  # noqa: N818 - says what is, as the others do
    """The engine is not the one that was attached any more: nothing is known of its weights or its pause."""


class AttachedEngine(Engine):
    """`engines.base.Engine` without requests: those are its owner's."""

    def __init__(self, host: Host, calls: Calls, update: Update | None = None) -> None:
        self._host, self._calls, self._update = host, calls, update
        self._mode: Mode | None = None
        """Of the pause in force or under way; None: not paused by us."""
        self._stands = False
        self._asleep = False
        self._broken = ""
        self._turn = asyncio.Lock()
        """One step, or one look, at a time: a look must not pause what has just been resumed."""
        self._load = Load()
        self._label = UNNAMED
        self.drifts = 0
        """How often it was found running though it should have stood."""

    async def start(self) -> Capabilities:
        found = await self.describe()
        return Capabilities(
            kind="vllm",
            model=found.model,
            max_model_tokens=found.max_model_tokens,
            pause_modes=frozenset(Mode),
            features=[],
            updates=True,
            suspends=found.sleeps,
        )

    async def describe(self) -> Described:
        """Raises `EngineStartError`."""
        try:
            return await self._calls.describe()
        except (Unreachable, CallFailed) as error:
            raise not_attached(self._calls.where, error) from error

    async def version(self) -> str | None:
        """Of its weights, as vLLM has it; None: nobody has named them. To be asked once, before it is walked."""
        self._label = await self._calls.weights_name()
        return None if self._label == UNNAMED else self._label

    def generate(self, work: Work) -> AsyncGenerator[Progress, None]:
        raise Unable(f"{self._calls.where} is attached: {work.key} is not ours to compute there")

    async def abort(self, key: str) -> None:
        """None of its requests are ours."""

    # --- standing still ------------------------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        if self._stands and not stricter(mode, self._mode):
            return
        if self._asleep:
            self._mode, self._stands = mode, True
            return
        # Not in turn: a stricter pause replaces one that waits for requests to end.
        self._mode, self._stands = mode, False
        await self._insist(lambda: self._calls.pause(mode.value), f"pausing ({mode})")
        self._stands = True

    async def unpause(self) -> None:
        if self._broken:
            raise UpdateFailed(
                f"{self._calls.where} has no weights that are known to be whole: {self._broken}"
            )
        async with self._turn:
            mode, self._mode, self._stands = self._mode, None, False
            if mode is None:
                return
            if self._asleep:
                await self._insist(lambda: self._calls.wake("kv_cache"), "waking")
                self._asleep = False
            else:
                await self._insist(self._calls.resume, "resuming")

    async def look(self) -> None:
        """Paused again where others have resumed it. Raises `Unreachable`, `CallFailed`, `EngineGone`, `AnotherLife`."""
        self._load = await self._calls.load()
        async with self._turn:
            label = await self._calls.weights_name()
            if label != self._label:
                raise AnotherLife(
                    f"its weights are called {label!r}, and were {self._label!r}: was it started anew?"
                )
            if not self._stands or self._asleep or self._mode is None or await self._calls.is_paused():
                return
            self.drifts += 1
            _log.warning(
                "%s was resumed past us while it should stand; it is paused again", self._calls.where
            )
            await self._calls.pause(self._mode.value)

    # --- weights and memory --------------------------------------------------------------------------------------

    async def update_weights(self, path: Path, version: str, kv: KeptCache = KeptCache.RECOMPUTE) -> None:
        if kv is KeptCache.KEEP:
            raise Unable(f"{self._calls.where} is attached: its KV cannot be kept over a change of weights")
        if not self._stands or self._asleep:
            raise NotStanding("weights change only while the engine is paused and not suspended")
        async with self._turn:
            self._broken = f"the change to version {version} did not end"
            try:
                async with asyncio.timeout(ATTACH_STEP_SECONDS_MAX):
                    if self._update is not None:
                        await self._update(path, version)
                    else:
                        await self._calls.reload(str(path))
                    await self._drop_caches()
                    await self._calls.name_weights(version)
                    self._label = version
            except EngineGone:
                raise
            except Exception as error:  # a trainer's own function may raise anything
                words = str(error) or type(error).__name__
                self._broken = f"version {version} from {path} was not loaded: {words}"
                raise UpdateFailed(self._broken) from error
            self._broken = ""

    async def _drop_caches(self) -> None:
        """A load on its way ends by itself, and until then vLLM refuses."""
        deadline_s = self._host.clock.monotonic_s() + DROP_SECONDS_MAX
        while True:
            try:
                return await self._calls.drop_caches()
            except CallFailed as error:
                if self._host.clock.monotonic_s() >= deadline_s:
                    why = f"its caches still hold KV of the old weights ({error}); pause with mode wait or abort, and update again"
                    raise UpdateFailed(why) from error
            await self._host.clock.sleep_s(DROP_RETRY_SECONDS)

    async def suspend(self) -> None:
        """Written against vLLM 0.32 for platforms that have sleep; not run on one in this project."""
        if self._asleep:
            return
        if not self._stands:
            raise NotStanding("the engine is suspended only while it is paused")
        if not (await self._calls.describe()).sleeps:
            raise Unable(f"{self._calls.where} was started without sleep mode, or its platform has none")
        async with self._turn:
            await self._insist(self._calls.sleep, "suspending")
            self._asleep = True

    async def resume(self) -> None:
        if not self._asleep:
            return
        async with self._turn:
            try:
                await self._insist(lambda: self._calls.wake("weights"), "resuming from sleep")
            except CallFailed as error:
                raise EngineStartError(
                    f"{self._calls.where} could not take its memory again: {error}"
                ) from error

    async def stop(self) -> None:
        """It stays as it is, paused: its processes are its owner's."""

    async def died(self) -> str:
        """Waits until it is dead for good; a server by URL never is, it only falls silent."""
        while True:
            with contextlib.suppress(Unreachable, CallFailed):
                try:
                    await self._calls.is_paused()
                except EngineGone as gone:
                    return str(gone)
            await self._host.clock.sleep_s(RECONNECT_SECONDS_MAX)

    def load(self) -> Load:
        return self._load

    async def _insist(self, call: Callable[[], Awaitable[None]], doing: str) -> None:
        """Until it is done: who is away for a moment is asked again. Raises `CallFailed` when it says that it cannot."""
        try:
            async with asyncio.timeout(ATTACH_STEP_SECONDS_MAX):
                while True:
                    try:
                        return await call()
                    except Unreachable as error:
                        _log.warning("%s, while %s: %s; it is asked again", self._calls.where, doing, error)
                    await self._host.clock.sleep_s(RECONNECT_SECONDS_MAX)
        except TimeoutError:
            raise CallFailed(
                f"{self._calls.where} did not get through with {doing} in {ATTACH_STEP_SECONDS_MAX:.0f} s"
            ) from None
