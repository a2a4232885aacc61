"""The worker's half: every granted write is reported once by the rank that copied, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interlock.connectors.vllm.config import EngineShape
from interlock.connectors.vllm.metadata import SaveTask
from interlock.connectors.vllm.worker import WorkerSide
from interlock.core.layouts import KVLayout
from interlock.store.client import WriteGrant
from interlock.wire.store_messages import Grant

LAYOUT = KVLayout(layers=2, heads=2, block_tokens=4, content=8, dtype="float32")
GRANT = WriteGrant("save-1", 1, 5, 7, [Grant(0, 3), Grant(2, 4)])
TASK = SaveTask(GRANT, [bytes(32), bytes(32)], [1, 2])


class ScriptedClient:
    """Has one slab, and keeps what is reported."""

    def __init__(self) -> None:
        self.slab: Any = SimpleNamespace(slab=7, node_incarnation=5)
        self.reports: list[tuple[int, list[bool], list[list[int]]]] = []
        self.reported = Event()

    def slab_of(self, slab: int) -> Any:
        return self.slab if slab == 7 else None

    def report(
        self, grant: WriteGrant, rank: int, good: Sequence[bool], checksums: Sequence[Sequence[int]]
    ) -> bool:
        assert grant is GRANT
        self.reports.append((rank, list(good), [list(sums) for sums in checksums]))
        self.reported.set()
        return True

    def heard(self) -> list[tuple[int, list[bool], list[list[int]]]]:
        """Reports come from the thread that stored the blocks."""
        assert self.reported.wait(10)
        return self.reports

    def start(self) -> None: ...

    def close(self) -> None: ...


class ScriptedMover:
    def batches(self, count: int) -> list[range]:
        return [range(count)]

    def staging(self) -> object:
        return object()

    def gather(self, blocks: Sequence[int], staging: object) -> None:
        assert list(blocks) == [1, 2]

    def put(self, slab: object, keys: object, slots: Sequence[int], staging: object) -> list[list[int]]:
        assert list(slots) == [3, 4]
        return [[1, 2], [3, 4]]


class BrokenMover(ScriptedMover):
    def put(self, *arguments: Any) -> list[list[int]]:
        raise MemoryError(arguments)


class UnreadableMover(ScriptedMover):
    def gather(self, *arguments: Any) -> None:
        raise MemoryError(arguments)


@pytest.fixture
def client() -> ScriptedClient:
    return ScriptedClient()


@pytest.fixture
def made() -> Iterator[list[WorkerSide]]:
    workers: list[WorkerSide] = []
    yield workers
    for worker in workers:
        worker.close()


def worker(
    client: ScriptedClient, mover: Any, made: list[WorkerSide], *, rank: int = 0, ranks: int = 1
) -> WorkerSide:
    shape = EngineShape(layout=LAYOUT, ranks=ranks, name="e", life="l", model="m", revision=None, variant=())
    side = WorkerSide(shape, rank, client, make_mover=lambda *_: mover)  # type: ignore[arg-type]
    made.append(side)
    start, stop = shape.heads_of(rank)
    tensors = torch.zeros((LAYOUT.layers, 6, stop - start, LAYOUT.block_tokens, LAYOUT.content))
    side.register({f"layers.{n}.attn": layer for n, layer in enumerate(tensors)})
    return side


def test_a_save_is_reported_good_with_the_movers_sums(client: ScriptedClient, made: list[WorkerSide]) -> None:
    side = worker(client, ScriptedMover(), made)
    side.save([TASK])
    assert client.heard() == [(0, [True, True], [[1, 2], [3, 4]])]
    news = side.take_news()
    assert news is not None
    assert news.counts["saved_blocks"] == 2
    assert side.take_news() is None


@pytest.mark.parametrize("mover", [BrokenMover(), UnreadableMover()])
def test_a_save_that_breaks_is_reported_bad_and_raises_nothing_into_the_engine(
    client: ScriptedClient, made: list[WorkerSide], mover: Any
) -> None:
    worker(client, mover, made).save([TASK])
    assert client.heard() == [(0, [False, False], [[], []])]


@pytest.mark.parametrize("slab", [None, SimpleNamespace(slab=7, node_incarnation=6)])
def test_a_save_into_another_life_of_the_node_touches_nothing(
    client: ScriptedClient, made: list[WorkerSide], slab: Any
) -> None:
    client.slab = slab
    worker(client, BrokenMover(), made).save([TASK])
    assert client.reports == [(0, [False, False], [[], []])]


def test_a_rank_whose_heads_a_lower_one_writes_promises_and_writes_nothing(
    client: ScriptedClient, made: list[WorkerSide]
) -> None:
    worker(client, BrokenMover(), made, rank=1, ranks=4).save([TASK])
    assert client.reports == [(1, [], [])]


def test_layers_are_taken_in_the_order_of_their_numbers(
    client: ScriptedClient, made: list[WorkerSide]
) -> None:
    layout = KVLayout(layers=12, heads=1, block_tokens=4, content=8, dtype="float32")
    shape = EngineShape(layout=layout, ranks=1, name="e", life="l", model="m", revision=None, variant=())
    kept: list[Any] = []

    def keep(kv: Any, layout: KVLayout, head_start: int) -> Any:
        kept.append(kv)
        return ScriptedMover()

    side = WorkerSide(shape, 0, client, make_mover=keep)  # type: ignore[arg-type]
    made.append(side)
    tensors = torch.zeros((12, 3, 1, 4, 8))
    for n, layer in enumerate(tensors):
        layer.fill_(n)
    shuffled = sorted(range(12), key=str)  # 0, 1, 10, 11, 2, …
    side.register({f"model.layers.{n}.self_attn.attn": tensors[n] for n in shuffled})
    ((_, whole),) = kept[0].pieces
    assert whole[:, 0, 0, 0, 0].tolist() == list(range(12))
