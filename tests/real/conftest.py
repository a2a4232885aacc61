"""What the tests with real engines share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from interlock.cli import demo
from interlock.engines.plain import Question, complete
from interlock.host.processes import list_processes
from interlock.testing.equality import Completion


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], list[int]]:
    """The processes below one, by descent, whatever session they are in."""

    def below(root: int) -> list[int]:
        entries = list_processes()
        found, frontier = [], {root}
        while frontier:
            frontier = {entry.pid for entry in entries if entry.parent in frontier}
            found += sorted(frontier)
        return found

    return below


@pytest.fixture(scope="session")
def by_the_library() -> Callable[[Path, list[list[int]]], list[Completion]]:
    """Greedy continuations by the library's own `generate`, in this process: another would import the library once more."""

    def completed(model: Path, prompts: list[list[int]]) -> list[Completion]:
        import torch

        torch.set_num_threads(1)
        question = Question(
            model=str(model), prompts=prompts, tokens=demo.STREAM_TOKENS, engine="transformers"
        )
        with mock.patch.dict(os.environ):
            answers = complete(question)
        return [Completion(answer.tokens, answer.logprobs, answer.margins) for answer in answers]

    return completed


@pytest.fixture(scope="module")
def run_home() -> Iterator[Path]:
    """A private home for run directories, with the short path that sockets need; pytest's own are too long."""
    home = Path(tempfile.mkdtemp(prefix="il-"))
    yield home
    shutil.rmtree(home)
