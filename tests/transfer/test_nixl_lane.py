"""The NIXL lane over UCX's transports that this machine has; where NIXL is not installed, it is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interlock.core.errors import LocalProtocolError
from interlock.transfer.engine import LaneOptions

from .conftest import Yard

CONFORMS = """
import asyncio, os, sys
from pathlib import Path
from interlock.testing.check_lane import check_lane
from interlock.transfer.engine import LaneOptions
asyncio.run(check_lane(LaneOptions(kinds=("nixl",)), Path(sys.argv[1])))
print("conforms", flush=True)
os._exit(0)  # NIXL 1.5.1 without CUDA crashes where an interpreter ends that ever had an agent, with none of our code in it
"""


@pytest.mark.parametrize("transports", ["tcp", "tcp,sysv,posix,cma,self"])
def test_the_nixl_lane_conforms(transports: str, tmp_path: Path) -> None:
    """In a process of its own: UCX reads its environment once, and keeps threads."""
    done = subprocess.run(
        [sys.executable, "-c", CONFORMS, str(tmp_path)],
        env={**os.environ, "UCX_TLS": transports},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("conforms\n")


async def test_without_nixl_its_lane_is_refused_by_name(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(LocalProtocolError, match="NIXL is not installed"):
        await yard.make("a", LaneOptions(kinds=("nixl",)))
    await yard.make("b")
