"""What a front says of its requests being on disk is so, whatever was asked for while it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from interlock.core.identity import Epoch
from interlock.core.sampling import Sampling
from interlock.fleet.keeping import RequestsKeeper
from interlock.fleet.kept_requests import KeptRequest
from interlock.fleet.ledger import GenerationRequest
from interlock.host.real import RealHost
from interlock.telemetry.events import EventLog
from interlock.wire.fleet_messages import Membership


class Requests:
    """One that never changes."""

    changes = 1

    def kept(self) -> list[KeptRequest]:
        request = GenerationRequest(id="r", prompt=[1, 2], sampling=Sampling(max_tokens=3))
        return [KeptRequest(request=request, prompt_tokens=2)]


class Machine(RealHost):
    """Tells when a thread has written, before anybody else hears of it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Callable[[], None] = lambda: None

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        result = await super().in_thread(function, *args)
        self.written()
        return result


def keeper(host: RealHost, folder: Path) -> RequestsKeeper:
    return RequestsKeeper(
        host,
        folder,
        "front",
        Requests(),
        EventLog(host.clock),
        on_word=lambda: None,
        on_released=lambda: None,
    )


def word(number: int, target: str) -> Membership:
    return Membership(Epoch(1, number), target, "0", [], [])


async def test_a_suspension_heard_while_the_file_is_emptied_is_written_before_it_is_told(
    tmp_path: Path,
) -> None:
    """It was told as kept with an empty file: nothing had changed since the last one that was written."""
    host = Machine()
    ours = keeper(host, tmp_path)
    ours.hear(word(1, "SUSPENDED"))
    await ours._turn()
    assert ours.kept_at == Epoch(1, 1)
    ours.hear(word(3, "RUNNING"))
    host.written = lambda: ours.hear(word(5, "SUSPENDED"))
    await ours._turn()
    host.written = lambda: None
    assert ours.holding
    await ours._turn()
    assert ours.kept_at == Epoch(1, 5)
    assert [kept.request.id for kept in keeper(host, tmp_path).load()] == ["r"]
    host.close()
