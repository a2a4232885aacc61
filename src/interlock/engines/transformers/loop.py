"""The engine's thread: one step at a time, and between two steps whatever was asked for.

Everything about requests belongs to this thread. The rest of the process hands it functions (`ask`), which it runs between
two steps, so a pause, an abort or a take never meets a forward. It hands back, once a step, all that the step made.

*Standing*: no step runs and nothing is left to be copied or dropped. A pause of mode WAIT steps on with the requests that
came before it until none of them is left; the others stand at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import msgspec

from interlock.core.targets import Mode, stricter
from interlock.engines.base import EngineGone, NotStanding, Progress, UpdateFailed
from interlock.engines.transformers.asking import AskedThread, promised
from interlock.engines.transformers.building import Built
from interlock.engines.transformers.hooks import Coming, Hooks
from interlock.engines.transformers.plans import Load, Put, Release, Step, Update
from interlock.engines.transformers.ranks import RankFailed, Ranks
from interlock.engines.transformers.scheduler import Request, Scheduler, choose
from interlock.host.threads import monotonic_s
from interlock.wire.fleet_messages import Load as Busy
from interlock.wire.token_ids import pack_ids

Told = list[tuple[str, Progress]]


class Loop(AskedThread):
    """Runs until `end`, or until it fails: then `on_death` is told why, once."""

    def __init__(self, deliver: Callable[[Told], None], on_death: Callable[[str], None]) -> None:
        """`deliver` and `on_death` are called in the engine's thread."""
        super().__init__()
        self._deliver, self._on_death = deliver, on_death
        self._ranks: Ranks | None = None
        self._hooks = Hooks()
        self._scheduler: Scheduler | None = None
        self._held: Mode | None = None
        self._before: int | None = None
        self._order = 0
        self._pausers: list[Future[None]] = []
        self.whole_weights = True
        self.suspended = False
        self._path = ""
        self.gate: Callable[[], bool] = lambda: True
        """Asked before each step, in the engine's thread: whether it may be taken now. `ask` makes it be asked again."""
        self.busy = Busy()
        self.counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "generated_tokens", "steps"), 0)

    def begin(self, build: Callable[[], Built]) -> Future[Built]:
        """Starts the thread, which builds the engine first; the future is done when it can step."""
        started: Future[Built] = promised()
        self._start(lambda: self._run(build, started))
        return started

    def make_scheduler(self, built: Built) -> Scheduler:
        return Scheduler(built.limits, built.hooks.scheduler)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self, build: Callable[[], Built], started: Future[Built]) -> None:
        try:
            built = build()
            self._ranks, self._hooks = built.ranks, built.hooks
            self._scheduler = self.make_scheduler(built)
        except BaseException as error:
            started.set_exception(error)
            self._gone(f"the engine did not start: {error}")
            return
        started.set_result(built)
        try:
            while self._serve_asked():
                if self._may_step():
                    self._step()
                self._settle()
        except Exception as error:
            self._gone(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            self._on_death(self._why_gone)
        else:
            self._gone("the engine was stopped")
        finally:
            self._ranks.close()
            for hook in (self._hooks.scheduler, self._hooks.worker):
                if hook is not None:
                    hook.close()

    def _gone(self, why: str) -> None:
        super()._gone(why)
        for pauser in self._pausers:
            pauser.set_exception(EngineGone(why))

    def _settle(self) -> None:
        self._stand_if_done()

    @property
    def scheduler(self) -> Scheduler:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def ranks(self) -> Ranks:
        assert self._ranks is not None
        return self._ranks

    def _seconds_to_step(self) -> float | None:
        if not self._has_to_step() or not self.gate():
            return None
        return self.scheduler.idle_s(self._admitted_before(), monotonic_s())

    def _admitted_before(self) -> int | None:
        return self._before if self._held is not None else None

    def _has_to_step(self) -> bool:
        """Whether it does not stand, or runs and has something to do."""
        if self.suspended or not self.whole_weights:
            return False
        if self._held is None:
            return bool(self.scheduler.running or self.scheduler.waiting or self.scheduler.unsaved)
        return self._held is Mode.WAIT and self._drains()

    def _drains(self) -> bool:
        """Whether requests that came before a WAIT are still here."""
        return self._before is not None and any(r.order < self._before for r in self.scheduler.requests)

    def _step(self) -> None:
        admitted = self.scheduler.admit(self._admitted_before(), monotonic_s())
        if admitted:
            self._flush()  # what is dropped of a request must not drop what is now loaded for it
        for request in admitted:
            self._begin(request)
        step = self.scheduler.plan()
        if step is not None:
            self._execute(step)

    def _execute(self, step: Step) -> None:
        logits = self.ranks.do(step)
        chosen, failed = choose(self.scheduler.running, logits)
        told = self.scheduler.advance(step, chosen, failed)
        for key, why in failed.items():
            self.remove(key)
            self.tell(key, Progress([], [], "error", 0, why))
        self.counts["steps"] += 1
        self.counts["generated_tokens"] += len(told)
        self.busy = self.scheduler.busy()
        if told:
            self._deliver([(request.key, progress) for request, progress in told])

    def _flush(self) -> None:
        step = self.scheduler.flush()
        if step is not None:
            self._execute(step)

    def _begin(self, request: Request) -> None:
        """Where its first chunk starts: after the cache it was put with, after a stored prefix, or at its first token."""
        if not request.begun:
            request.begun = True
            self.counts["prompt_tokens"] += len(request.work.prompt)
        parked, request.parked = request.parked, None
        if parked is not None:
            try:
                self.ranks.do(Put(request.key, *parked))
            except RankFailed as error:
                request.computed = parked[0]  # some rank may have taken it over: it is dropped on all
                self.remove(request.key)
                self.tell(
                    request.key, Progress([], [], "error", 0, f"its saved cache cannot be used: {error}")
                )
                return
            request.computed = parked[0]
            request.saved_blocks = parked[0] // self.scheduler.limits.block_tokens
        else:
            self._load_prefix(request)

    def _load_prefix(self, request: Request) -> None:
        """Asks the store once a request; again when it has to begin anew, or when the store says that more is coming."""
        store, nature = self._hooks.scheduler, self.ranks.computer.nature
        if store is None or request.computed or request.mixed:
            return
        whole = nature.begins_from_blocks
        if not whole and not (nature.continues and self._hooks.boundary is not None):
            return
        block = self.scheduler.limits.block_tokens
        known = msgspec.structs.replace(request.work, packed_prompt=pack_ids(request.known))
        found = store.lookup(known, (len(request.known) - 1) // block)
        if isinstance(found, Coming):
            self.scheduler.postpone(request, monotonic_s() + found.again_s)
            return
        if found is None or found.blocks == 0 or not (whole or found.snapshot):
            return
        tokens = request.known[: found.blocks * block]
        salt = request.work.cache_salt
        good = self.ranks.do(Load(request.key, found.blocks, found.orders, tokens, salt, found.snapshot))
        self.scheduler.loaded(request, good)
        self.counts["cached_tokens"] += good * block if not request.output else 0

    # --- what can be asked for -----------------------------------------------------------------------------------

    def add(self, make: Callable[[int], Request]) -> None:
        """`make` is given the request's place in the order of arrival. Raises `RequestRejected`."""
        self._order += 1
        self.scheduler.add(make(self._order))
        self.busy = self.scheduler.busy()

    def tell(self, key: str, progress: Progress) -> None:
        """To whoever streams this request."""
        self._deliver([(key, progress)])

    def remove(self, key: str) -> bool:
        """Whether it was here."""
        found = self.scheduler.remove(key) is not None
        self.busy = self.scheduler.busy()
        return found

    def pause(self, mode: Mode, standing: Future[None]) -> None:
        if self._held is None:
            self._before = self._order + 1
        if stricter(mode, self._held):
            self._held = mode
        if mode is Mode.ABORT:
            assert self._before is not None
            self._abort_before(self._before)
        self._pausers.append(standing)
        self._stand_if_done()

    def _abort_before(self, order: int) -> None:
        told: Told = []
        for request in [r for r in self.scheduler.requests if r.order < order]:
            self.scheduler.remove(request.key)
            told.append((request.key, Progress([], [], "abort", request.cached_tokens)))
        if told:
            self._deliver(told)
        self.busy = self.scheduler.busy()

    @property
    def paused(self) -> bool:
        """A pause is in force or under way; may be read by other threads."""
        return self._held is not None

    def _stand_if_done(self) -> None:
        if not self._pausers or self._held is None or self._has_to_step():
            return
        if not self.suspended and self.whole_weights:
            self._flush()
        pausers, self._pausers = self._pausers, []
        for pauser in pausers:
            if not pauser.done():
                pauser.set_result(None)

    def demand_standing(self, what: str) -> None:
        """Raises `NotStanding` unless paused, with no request on its way out."""
        if self._held is None or self._has_to_step():
            raise NotStanding(f"{what} needs a paused engine; this one runs")

    def unpause(self) -> None:
        if self.suspended:
            raise NotStanding("a suspended engine must be resumed before it runs")
        if not self.whole_weights:
            raise UpdateFailed("the engine has no whole weights; update them again, or stop it")
        self._held = self._before = None

    def update(self, path: str, *, drop_caches: bool) -> None:
        """Raises `NotStanding`, `UpdateFailed`."""
        self.demand_standing("an update of weights")
        if self.suspended:
            raise NotStanding("an update of weights needs a resumed engine; this one is suspended")
        if self.whole_weights:
            self._flush()
        self.whole_weights = False
        try:
            self.ranks.do(Update(path, drop_caches))
        except RankFailed as error:
            raise UpdateFailed(f"the engine has no weights now: {error}") from error
        self.whole_weights, self._path = True, path
        for request in self.scheduler.requests:
            request.mixed = True
            request.parked = None if drop_caches else request.parked
        if drop_caches:
            self.scheduler.forget_caches()
        if self._hooks.scheduler is not None:
            self._hooks.scheduler.weights_changed(path)

    def suspend(self) -> None:
        """Raises `NotStanding`."""
        self.demand_standing("a suspension")
        if self.suspended:
            return
        self._flush()
        self.ranks.do(Release())
        self.scheduler.forget_caches()
        self.suspended = True

    def resume(self) -> None:
        """Raises `RankFailed`: still suspended then."""
        if self.suspended:
            self.ranks.do(Update(self._path, drop_caches=True))
            self.suspended = False
