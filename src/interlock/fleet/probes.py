"""Is a part of the fleet up? Asked as a user would ask: by its own address, and answered by what it does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from interlock.core.errors import InterlockError
from interlock.fleet.client import FleetClient
from interlock.fleet.plan import FleetPlan
from interlock.host.base import Host

PROBE_ANSWER_SECONDS_MAX = 2.0

Probe = Callable[[], Awaitable[bool]]


class Probes:
    """One for each kind of part; each is true once the part serves. None raises what only says that it does not yet."""

    def __init__(self, host: Host, plan: FleetPlan, client: FleetClient) -> None:
        self._host, self._plan, self._client = host, plan, client

    async def target(self) -> str | None:
        """The state that the fleet shall be in; None while nobody can say."""
        try:
            return (await self._client.status(PROBE_ANSWER_SECONDS_MAX)).target
        except (OSError, InterlockError, TimeoutError):
            return None

    async def coordinator(self) -> bool:
        """One that is still RECOVERING answers, too."""
        try:
            await self._client.status(PROBE_ANSWER_SECONDS_MAX)
        except (OSError, InterlockError) as error:
            return getattr(error, "code", "") == "recovering"
        return True

    def member(self, name: str) -> Probe:
        """Whether this engine is where the fleet shall be."""

        async def probe() -> bool:
            try:
                fleet = await self._client.status(PROBE_ANSWER_SECONDS_MAX)
            except (OSError, InterlockError):
                return False
            return any(m.name == name and m.state == fleet.target and m.standing for m in fleet.members)

        return probe

    async def store(self) -> bool:
        try:
            stream = await self._host.connect(self._plan.store_address)
        except OSError:
            return False
        stream.close()
        return True

    async def front(self) -> bool:
        """Its health page answers; whatever it says, HTTP is served."""
        try:
            stream = await self._host.connect(f"tcp:{self._plan.reachable_host}:{self._plan.http_port}")
        except OSError:
            return False
        try:
            await stream.send(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return (await stream.receive_exactly(5)) == b"HTTP/"
        except (OSError, EOFError):
            return False
        finally:
            stream.close()
