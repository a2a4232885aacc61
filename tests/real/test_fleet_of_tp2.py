"""Engines of two tensor-parallel ranks, one of each kind, behind the same endpoint."""

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

pytestmark = [pytest.mark.fleet, pytest.mark.vllm, pytest.mark.timeout(300)]
TOKENS = 16


async def test_engines_of_two_ranks_answer_and_ctrl_c_leaves_nothing(
    descendants: Callable[[int], list[int]], run_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_home))
    host, model, engines = RealHost(), build_demo_model(), "vllm:1,transformers:1"
    prompts = demo.documents(TextModel.load(model).encode)
    async with demo.running_fleet(host, str(model), free_port(), print, engine=engines, tp=2) as fleet:
        names = {member["facts"]["engine"]: member["name"] for member in (await fleet.status())["members"]}
        assert sorted(names) == ["transformers", "vllm"]
        for prompt, kind, other in zip(prompts, names, reversed(names), strict=False):
            first = await fleet.answer(prompt, TOKENS, names[kind])
            again = await fleet.answer(prompt, TOKENS, names[kind])
            assert first.cached_tokens < 64, "the documents have next to nothing in common"
            assert first.completion.tokens == again.completion.tokens, kind
            assert again.cached_tokens > demo.DOCUMENT_TOKENS // 2, kind
            read = await fleet.answer(prompt, TOKENS, names[other])
            assert first.completion.tokens == read.completion.tokens, f"computed by {kind}, asked of {other}"
        tree = descendants(fleet.child.pid)
        os.kill(fleet.child.pid, signal.SIGINT)
        async with asyncio.timeout(30):
            assert await fleet.child.wait() == 0
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]
    assert [path for path in run_home.rglob("*") if not path.is_dir()] == []
