"""Tiny random checkpoints, made once a session, and what the library's own `generate` says of them."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tiny_models import Bench, Library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
async def bench(tmp_path: Path, library: Library) -> AsyncIterator[Callable[..., Bench]]:
    """`await bench("llama", step_tokens=32)`: a started engine; stopped at the end."""
    started: list[Bench] = []

    async def start(family: str, *, gated: bool = False, **options: object) -> Bench:
        made = Bench(library, family, tmp_path / f"engine-{len(started)}", options, gated=gated)
        started.append(made)
        await made.start()
        return made

    yield start  # type: ignore[misc]
    for made in started:
        await made.engine.stop()
