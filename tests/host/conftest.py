"""A real host, on both event loops, and children that say when they are ready."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest
import uvloop

from interlock.host.processes import RealChild
from interlock.host.real import RealHost


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def host() -> Iterator[RealHost]:
    host = RealHost()
    yield host
    host.close()


class Children:
    """Runs Python programs that write lines to descriptor `SAY`; ends all that is left of them."""

    def __init__(self, host: RealHost) -> None:
        self.host = host
        self.children: list[RealChild] = []
        self.ends: list[int] = []

    async def start(
        self, program: str, *arguments: str, env: Mapping[str, str] = os.environ
    ) -> tuple[RealChild, int]:
        reader, writer = os.pipe()
        program = f"import os, sys, time, signal\nSAY = {writer}\n{program}"
        child = await self.host.spawn(
            [sys.executable, "-c", program, *arguments], env=dict(env), log=None, pass_fds=[writer]
        )
        os.close(writer)
        self.children.append(child)
        self.ends.append(reader)
        return child, reader

    async def line(self, reader: int) -> str:
        said = b""
        while not said.endswith(b"\n"):
            piece = await asyncio.wait_for(self.host.in_thread(os.read, reader, 1), 20)
            if not piece:
                raise EOFError(f"the child left after saying {said!r}")
            said += piece
        return said.decode().strip()


@pytest.fixture
async def children(host: RealHost) -> AsyncIterator[Children]:
    children = Children(host)
    yield children
    for child in children.children:
        assert await child.end_tree(10)
    for end in children.ends:
        os.close(end)
