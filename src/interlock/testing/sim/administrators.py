"""Who commands the simulated fleet. What they are told is law for the checks, from their answer until they ask for its end.

In some worlds one administrator pauses now and then, by turns for two owners. In the others the two are people of their own, who
update, suspend and resume as well, in half of them stop and start it, get in each other's way, and sometimes ask for what makes no
sense.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from interlock.core.errors import ChannelFault, InterlockError
from interlock.core.targets import State
from interlock.fleet.client import CommandFailed, FleetClient
from interlock.testing.sim.host import SimHost
from interlock.testing.sim.tokens import WEIGHTS
from interlock.wire.fleet_messages import CommandProgress

if TYPE_CHECKING:
    from interlock.testing.sim.worlds import World

OWNERS = ("trainer", "operator")
FAILURES = (CommandFailed, ChannelFault, TimeoutError, OSError, InterlockError)
HOLD_SECONDS = 3.0


class Administrator:
    """The process in which they live. After the faults everybody lets go; where the shape says so, the fleet is stopped then."""

    def __init__(self, world: World, host: SimHost, coordinator: str) -> None:
        self._world, self._host = world, host
        self._client = FleetClient(host, coordinator)
        self._stopping = False
        """For good: nobody starts it any more."""
        self._people = {
            owner: Person(
                world, host, owner, FleetClient(host, coordinator) if world.shape.weights else self._client
            )
            for owner in OWNERS
        }

    async def run(self) -> int:
        if self._world.shape.weights:
            for person in self._people.values():
                self._host.process.run(person.run, person.owner)
            await asyncio.gather(*(person.left.wait() for person in self._people.values()))
        else:
            await self._take_turns()
        for person in self._people.values():
            await person.let_go()
        if self._world.shape.starts:
            self._host.process.run(self._keep_up, "who starts a fleet that was left stopped")
        self._world.probed("admin")
        if self._world.shape.stop:
            await self._stop()
        await asyncio.Event().wait()
        return 0

    async def _keep_up(self) -> None:
        """Somebody stopped it and did not come to start it again; a STOP may even still be under way."""
        person = self._people[OWNERS[0]]
        while not self._stopping:
            if await person.target() == State.STOPPED and not self._stopping:
                await person.start()
            await self._host.clock.sleep_s(0.3)

    async def _take_turns(self) -> None:
        rng = self._host.process.kernel.rng
        while not self._world.calm:
            await self._host.clock.sleep_s(rng.uniform(0.5, 5.0))
            owner = rng.choice(OWNERS)
            if not self._world.shape.quiet:
                await self._people[owner].pause_for_a_while()

    async def _stop(self) -> None:
        while self._world.unserved(besides_stop=True):
            await self._host.clock.sleep_s(0.2)
        if self._world.shape.starts:
            while await self._people[OWNERS[0]].target() in (None, State.STOPPED):
                await self._host.clock.sleep_s(
                    0.2
                )  # one of the others has stopped it, and it is about to be started
        self._world.aborting = self._stopping = True
        asleep = self._world.shape.weights and self._host.process.kernel.rng.random() < 0.5
        while True:
            try:
                if asleep:
                    await self._client.pause(owner="operator", timeout_s=10.0)
                    await self._client.suspend(owner="operator", timeout_s=10.0)
                    asleep = False
                await self._client.stop(owner="operator", timeout_s=20.0, composite=True)
            except FAILURES as error:
                self._world.kernel.note(f"operator could not stop the fleet: {error}")
                await self._host.clock.sleep_s(0.5)
            else:
                break
        self._world.probed("stop")


class Person:
    """One owner of holds."""

    def __init__(self, world: World, host: SimHost, owner: str, client: FleetClient) -> None:
        self._world, self._host, self.owner, self._client = world, host, owner, client
        self._rng = host.process.kernel.rng
        self.left = asyncio.Event()
        """Commands no more but to let go."""

    async def run(self) -> None:
        """Only in worlds with weights that change."""
        while not self._world.calm:
            await self._host.clock.sleep_s(self._rng.uniform(0.2, 3.0))
            if self._world.shape.quiet:
                continue
            if self._rng.random() < 0.2:
                await self._rng.choice((self._meddle, self._break_hold))()
            else:
                await self.pause_for_a_while()
        self.left.set()

    async def pause_for_a_while(self) -> None:
        modes = ("wait", "keep", "keep", "abort")
        weights = (
            self._world.shape.weights
        )  # much happens in these pauses: they are short, and most keep what runs
        mode = self._rng.choice((*modes, "keep", "keep", "keep") if weights else modes)
        self._world.aborting |= mode == "abort"
        ends = self._rng.random() < 0.2
        promises, breaks = self._world.promises, self._world.promises.breaks_of(self.owner)
        pausing = self._client.pause(
            mode,
            owner=self.owner,
            timeout_s=self._rng.uniform(1.0, 8.0),
            hold_seconds=HOLD_SECONDS if ends else None,
        )
        if await self._told("pause", pausing):
            self._world.kernel.note(f"{self.owner} was told that the fleet stands ({mode})")
            if not ends:
                now_s = self._host.clock.monotonic_s() - self._host.process.machine.boot_s
                promises.holds(self.owner, now_s, breaks)
        if weights:
            await self._use_the_pause()
        stay_s = self._rng.choice((0.1, 0.3, 2.0) if weights else (0.5, 2.0, 8.0))
        await self._host.clock.sleep_s(stay_s * self._rng.uniform(0.0, 2.0))
        await self.let_go()

    async def _use_the_pause(self) -> None:
        """Whether it stands or not: what is not legal is refused."""
        for _ in range(self._rng.choice((0, 1, 1, 2))):
            await self._host.clock.sleep_s(self._rng.uniform(0.0, 0.5))
            if self._rng.random() < 0.6:
                await self.update()
            else:
                if await self.suspend() and self._rng.random() < 0.3:
                    self._world.night()
                await self._host.clock.sleep_s(self._rng.choice((0.2, 0.5, 3.0)) * self._rng.random())
                if self._rng.random() < 0.9:
                    await self.resume()
        if self._world.shape.starts and self._rng.random() < 0.15:
            await self._stop_and_start()

    async def _stop_and_start(self) -> None:
        """Every engine ends, and new ones are launched: perhaps with other weights."""
        await self.stop()
        await self._host.clock.sleep_s(self._rng.choice((0.0, 0.5, 3.0)) * self._rng.random())
        version = self._world.next_version() if self._rng.random() < 0.3 else None
        while not await self.start(version):
            if await self.target() not in (None, State.STOPPED):
                break  # refused because it does not stand still, or somebody else was faster
            await self._host.clock.sleep_s(self._rng.uniform(0.1, 1.0))

    async def update(self) -> bool:
        """To the next version."""
        kv = self._rng.choice(("recompute", "keep"))
        version = self._world.next_version()
        promises = self._world.promises
        asked = promises.update_asked(kv)
        updating = self._client.update_weights(
            version, WEIGHTS + version, owner=self.owner, kv=kv, timeout_s=self._rng.uniform(1.0, 6.0)
        )

        def refused() -> None:
            if not self._world.spoilt:  # a coordinator that lost its state may refuse what it had begun
                promises.update_refused(asked)

        done = await self._told(f"update to {version}", updating, refused)
        if done:
            self._world.kernel.note(f"{self.owner} was told that weights {version} stand ({kv})")
            promises.update_done(version, asked)
        return done

    async def suspend(self) -> bool:
        asked, open_before = self._world.promises.suspend_asked(), list(self._world.open)
        done = await self._told(
            "suspend", self._client.suspend(owner=self.owner, timeout_s=self._rng.uniform(1.0, 5.0))
        )
        if done:
            self._world.kernel.note(f"{self.owner} was told that the fleet is suspended")
            self._world.promises.suspend_done(asked)
            self._world.suspended(open_before)
        return done

    async def resume(self) -> bool:
        self._world.promises.resume_asked()
        self._world.wakes()
        return await self._told(
            "resume", self._client.resume(owner=self.owner, timeout_s=self._rng.uniform(1.0, 5.0))
        )

    async def stop(self) -> bool:
        """From PAUSED or SUSPENDED; in some cases also from RUNNING, by way of a pause."""
        self._world.aborting = True
        self._world.wakes()  # what a suspended fleet kept ends with it
        asked = self._world.promises.stop_asked()
        stopping = self._client.stop(
            owner=self.owner, timeout_s=self._rng.uniform(1.0, 6.0), composite=self._rng.random() < 0.5
        )
        with self._world.promises.breaking(*OWNERS):
            done = await self._told("stop", stopping)
        if done:
            self._world.kernel.note(f"{self.owner} was told that the fleet is stopped")
            self._world.promises.stop_done(asked)
        return done

    async def start(self, version: str | None = None) -> bool:
        """A START begins without holds, whosever they were. `version`: with other weights than it had."""
        promises = self._world.promises
        promises.start_asked()
        asked = promises.update_asked("recompute") if version is not None else None

        def refused() -> None:
            if asked is not None and not self._world.spoilt:
                promises.update_refused(asked)

        starting = self._client.start(
            owner=self.owner,
            timeout_s=self._rng.uniform(2.0, 10.0),
            version=version,
            weights=WEIGHTS + version if version is not None else "",
        )
        with promises.breaking(*OWNERS):
            done = await self._told(f"start{f' with {version}' if version else ''}", starting, refused)
        if done:
            self._world.kernel.note(f"{self.owner} was told that the fleet is started")
            if version is not None and asked is not None:
                promises.start_done(version)
        return done

    async def target(self) -> str | None:
        """The state that the fleet shall be in; None while nobody can say."""
        try:
            return (await self._client.status(1.0)).target
        except FAILURES:
            return None

    async def _meddle(self) -> None:
        """Commands out of the blue; most are refused."""
        commands: list[Callable[[], Awaitable[object]]] = [self.update, self.suspend, self.resume]
        if self._world.shape.starts:
            commands.append(self.start)
        command = self._rng.choice(commands)
        await command()

    async def _break_hold(self) -> None:
        """An administrator's privilege: by name."""
        other = OWNERS[1 - OWNERS.index(self.owner)]
        with self._world.promises.breaking(other):
            breaking = self._client.unpause(owner=self.owner, break_hold_of=other, timeout_s=3.0)
            await self._told(f"break the hold of {other}", breaking)

    async def let_go(self) -> None:
        """UNPAUSE, as often as it takes until it is done or refused because nothing is held.

        Where it is refused because the fleet is suspended, or has no weights, that is put right first: by whoever it is.
        """
        refusals = 0
        while True:
            self._world.promises.held.pop(self.owner, None)
            try:
                await self._client.unpause(owner=self.owner, timeout_s=5.0)
            except ChannelFault as refused:
                refusals += not refused.retryable
                if not refused.retryable and not await self._put_right(waits=refusals % 2 == 1):
                    return
            except CommandFailed:
                return  # it was accepted: the hold is released, however long the members take
            except (TimeoutError, OSError, InterlockError) as error:
                self._world.kernel.note(f"{self.owner} could not unpause: {error}")
            else:
                return
            await self._host.clock.sleep_s(0.2)

    async def _put_right(self, *, waits: bool) -> bool:
        """Whether there was something in the way of the release of our hold. Two who put weights right at once would overtake each
        other's update for ever: first it is waited whether somebody else does."""
        try:
            status = await self._client.status(1.0)
        except FAILURES as error:
            self._world.kernel.note(f"{self.owner} could not ask for the status: {error}")
            return True
        if all(hold.owner != self.owner for hold in status.holds):
            return False
        if status.target == "SUSPENDED":
            await self.resume()
        elif status.target == "PAUSED" and waits:
            await self._host.clock.sleep_s(self._rng.uniform(1.0, 5.0))
        elif status.target == "PAUSED":
            await self.update()
        return status.target in ("SUSPENDED", "PAUSED")

    async def _told(
        self, what: str, asking: Awaitable[CommandProgress], on_refused: Callable[[], None] = lambda: None
    ) -> bool:
        try:
            await asking
        except FAILURES as error:
            if isinstance(error, ChannelFault):
                on_refused()
            self._world.kernel.note(f"{self.owner} could not {what}: {error}")
            return False
        return True
