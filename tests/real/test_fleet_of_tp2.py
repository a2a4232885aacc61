"""One engine of two tensor-parallel ranks behind the same endpoint."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from interlock.cli import demo
from interlock.engines.demo_model import build_demo_model
from interlock.host.real import RealHost
from interlock.host.sockets import free_port
from interlock.text.model import TextModel

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]


@pytest.mark.parametrize("engine", [pytest.param("vllm:1", marks=pytest.mark.vllm), "transformers:1"])
async def test_one_engine_of_two_ranks_answers_and_ctrl_c_leaves_nothing(
    descendants: Callable[[int], list[int]], run_home: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_home))
    host, model = RealHost(), build_demo_model()
    prompt = demo.documents(TextModel.load(model).encode)[0]
    async with demo.running_fleet(host, str(model), free_port(), print, engine=engine, tp=2) as fleet:
        first = await fleet.answer(prompt, 16)
        again = await fleet.answer(prompt, 16)
        assert first.completion.tokens == again.completion.tokens
        assert again.cached_tokens > demo.DOCUMENT_TOKENS // 2
        tree = descendants(fleet.child.pid)
        os.kill(fleet.child.pid, signal.SIGINT)
        async with asyncio.timeout(30):
            assert await fleet.child.wait() == 0
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]
    assert [path for path in run_home.rglob("*") if not path.is_dir()] == []
