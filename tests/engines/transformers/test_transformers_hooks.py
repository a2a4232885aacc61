"""KV blocks and boundary snapshots leave and come back through the hooks; here they are kept in a dictionary."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
import torch
from tiny_models import Heard, Library, prompts, work

from interlock.core.targets import Mode
from interlock.engines.base import Work
from interlock.engines.transformers import blocks
from interlock.engines.transformers.hooks import Boundary, Coming, Found, Hooks, KVView

BLOCK = 16
PREFIX, REST, OTHER = prompts((64, 11, 21))


class Shelf:
    """All three hooks over one dictionary. `bad`: the prefix (in blocks) from which a load fails."""

    def __init__(self, computer: Any) -> None:
        self.computer = computer
        self.kv: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.snapshots: dict[tuple[int, ...], bytes] = {}
        self.bad: int | None = None
        self.saved: list[tuple[str, int, int]] = []
        self.ended_keys: list[str] = []
        self.alive: set[str] = set()
        self.coming: set[str] = set()
        self.again_s = 0.005
        self.lookups: list[str] = []

    # on rank 0
    def lookup(self, work: Work, blocks_max: int) -> Found | Coming | None:
        self.alive.add(work.key)
        self.lookups.append(work.key)
        if work.key in self.coming:
            return Coming(self.again_s)
        snapshot = not self.computer.nature.begins_from_blocks
        for count in range(blocks_max, 0, -1):
            prefixes = [tuple(work.prompt[: n * BLOCK]) for n in range(1, count + 1)]
            known = all(p in self.kv for p in prefixes) or not self.computer.nature.cuttable
            if known and (not snapshot or prefixes[-1] in self.snapshots):
                return Found(count, msgspec.msgpack.encode(prefixes), snapshot)
        return None

    def completed(self, key: str, tokens: Sequence[int], first_block: int, stop_block: int) -> bytes | None:
        assert key in self.alive, "blocks of a request that has ended, or was never looked up"
        assert len(tokens) >= stop_block * BLOCK, "a block is announced before its tokens are computed"
        self.saved.append((key, first_block, stop_block))
        return msgspec.msgpack.encode((key, list(tokens), first_block, stop_block))

    def loaded(self, key: str, blocks: int) -> None: ...

    def weights_changed(self, path: str) -> None:
        self.kv.clear()

    def ended(self, key: str) -> None:
        self.alive.discard(key)
        self.ended_keys.append(key)

    def counts(self) -> Mapping[str, int]:
        return {"saved_blocks": sum(stop - first for _, first, stop in self.saved)}

    def close(self) -> None: ...

    # on every rank
    def save(self, orders: bytes, views: dict[str, KVView]) -> None:
        key, tokens, first, stop = msgspec.msgpack.decode(orders)
        view = views[key]
        for block in range(first, stop):
            start, end = block * BLOCK, (block + 1) * BLOCK
            pairs = [view.read(layer, start, end) for layer in view.layers]
            self.kv[tuple(tokens[:end])] = [(k.clone(), v.clone()) for k, v in pairs]

    def load(self, orders: bytes, blocks: int) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        prefixes = [tuple(p) for p in msgspec.msgpack.decode(orders)]
        good = blocks if self.bad is None else min(blocks, self.bad)
        if good == 0:
            return 0, []
        if good < 0:
            raise OSError("the shelf has fallen")
        pieces = [self.kv[p] for p in prefixes[:good]]
        return good, [
            tuple(torch.cat([piece[layer][part] for piece in pieces], dim=1)[None] for part in (0, 1))
            for layer in range(len(pieces[0]))
        ]  # type: ignore[return-value]

    def wants(self, boundary: Boundary) -> bool:
        return True

    def captured(self, boundary: Boundary, data: bytes) -> None:
        self.snapshots[tuple(boundary.tokens)] = data

    def find(self, tokens: Sequence[int], salt: str, blocks: int) -> bytes | None:
        return self.snapshots.get(tuple(tokens))


@pytest.fixture
def shelves(monkeypatch: pytest.MonkeyPatch) -> list[Shelf]:
    made: list[Shelf] = []

    def open_hooks(access: bytes, computer: Any, rank: int) -> Hooks:
        shelf = Shelf(computer)
        made.append(shelf)
        computer.worker, computer.boundary = shelf, shelf
        return Hooks(shelf, shelf, None if computer.nature.begins_from_blocks else shelf)

    monkeypatch.setattr(blocks, "open_access_of", lambda config, computer: b"shelf")
    monkeypatch.setattr(blocks, "open_hooks", open_hooks)
    return made


FAMILIES = ["llama", "mixtral", "gemma3", "mamba2", "falcon_h1", "qwen3_next"]


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_prefix_that_was_saved_is_begun_from_and_gives_the_same_tokens(
    family: str, bench: Any, library: Library, shelves: list[Shelf]
) -> None:
    made = await bench(family, store="shelf", snapshot_blocks=1)
    first = (await made.run(work("first", [*PREFIX, *REST])))[0]
    (again, other) = await made.run(work("again", [*PREFIX, *OTHER]), work("other", OTHER))
    assert first.tokens == library.greedy(family, [*PREFIX, *REST])
    assert again.tokens == library.greedy(family, [*PREFIX, *OTHER])
    assert other.tokens == library.greedy(family, OTHER)
    assert first.last.cached_tokens == 0  # type: ignore[union-attr]
    assert again.last.cached_tokens == 64  # type: ignore[union-attr]
    assert made.engine.counts()["cached_tokens"] == 64
    await made.engine._ask(lambda: None)
    await made.engine.pause(Mode.KEEP)
    assert sorted(shelves[0].ended_keys) == ["again", "first", "other"]


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
async def test_the_comparison_fails_when_one_saved_block_is_wrong(
    family: str, bench: Any, library: Library, shelves: list[Shelf]
) -> None:
    made = await bench(family, store="shelf", snapshot_blocks=1)
    await made.run(work("first", [*PREFIX, *REST]))
    keys, _ = shelves[0].kv[tuple(PREFIX[:32])][0]
    keys *= -1
    again = (await made.run(work("again", [*PREFIX, *OTHER])))[0]
    assert again.tokens != library.greedy(family, [*PREFIX, *OTHER])


@pytest.mark.parametrize(("bad", "cached"), [(0, 0), (2, 32), (-1, 0)])
async def test_blocks_that_cannot_be_loaded_are_computed(
    bad: int, cached: int, bench: Any, library: Library, shelves: list[Shelf]
) -> None:
    made = await bench("llama", store="shelf")
    await made.run(work("first", [*PREFIX, *REST]))
    shelves[0].bad = bad
    again = (await made.run(work("again", [*PREFIX, *OTHER])))[0]
    assert again.tokens == library.greedy("llama", [*PREFIX, *OTHER])
    assert again.last.cached_tokens == cached  # type: ignore[union-attr]


async def test_made_tokens_are_saved_too_and_each_block_once(bench: Any, shelves: list[Shelf]) -> None:
    made = await bench("llama", store="shelf")
    heard = (await made.run(work("a", PREFIX, max_tokens=50)))[0]
    spans = [(first, stop) for _, first, stop in shelves[0].saved]
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    computed = len(PREFIX) + len(heard.tokens) - 1
    assert spans[-1][1] == computed // BLOCK
    await made.run(work("b", [1]))
    assert tuple([*PREFIX, *heard.tokens][:96]) in shelves[0].kv


async def test_a_request_that_lived_through_other_weights_saves_nothing(
    bench: Any, library: Library, shelves: list[Shelf]
) -> None:
    made = await bench("llama", store="shelf", gated=True)
    listening = asyncio.create_task(Heard().listen(made.engine.generate(work("a", PREFIX, max_tokens=40))))
    await asyncio.sleep(0)
    await made.step(2)
    await made.engine.pause(Mode.KEEP)
    before = len(shelves[0].saved)
    await made.engine.update_weights(library.path("llama"), "v2")
    await made.engine.unpause()
    await made.step(60)
    assert (await listening).finish == "length"
    assert len(shelves[0].saved) == before > 0


async def test_a_request_whose_blocks_are_coming_stops_nobody_elses_steps_and_begins_from_them(
    bench: Any, library: Library, shelves: list[Shelf]
) -> None:
    made = await bench("llama", store="shelf")
    await made.run(work("first", [*PREFIX, *REST]))
    shelf = shelves[0]
    shelf.coming.add("late")
    late = asyncio.create_task(Heard().listen(made.engine.generate(work("late", [*PREFIX, *OTHER]))))
    (other,) = await made.run(work("other", OTHER))
    assert other.tokens == library.greedy("llama", OTHER)
    while shelf.lookups.count("late") < 3:  # with nothing else to step it is asked for again by itself
        await asyncio.sleep(0.001)
    assert not late.done()
    await made.engine.pause(Mode.KEEP)
    shelf.coming.clear()
    await made.engine.unpause()
    heard = await late
    assert heard.tokens == library.greedy("llama", [*PREFIX, *OTHER])
    assert heard.last is not None
    assert heard.last.cached_tokens == 64


async def test_while_all_that_is_there_waits_for_blocks_the_engine_does_not_spin(
    bench: Any, shelves: list[Shelf]
) -> None:
    made = await bench("llama", store="shelf")
    shelf = shelves[0]
    shelf.coming.add("late")
    shelf.again_s = 3600.0
    late = asyncio.create_task(Heard().listen(made.engine.generate(work("late", PREFIX))))
    while not shelf.lookups:
        await asyncio.sleep(0.001)
    rounds = 0
    step = made.loop._step

    def counted() -> None:
        nonlocal rounds
        rounds += 1
        step()

    made.loop._step = counted
    for _ in range(20):
        await made.engine._ask(lambda: None)
    assert rounds == 0
    shelf.coming.add("unwanted")
    unwanted = asyncio.create_task(Heard().listen(made.engine.generate(work("unwanted", PREFIX))))
    while "unwanted" not in shelf.lookups:
        await asyncio.sleep(0.001)
    await made.engine.abort("unwanted")
    assert (await unwanted).finish == "abort"
    assert "unwanted" in shelf.ended_keys
    assert not late.done()
    await made.engine.pause(Mode.ABORT)
    assert (await late).finish == "abort"
    assert "late" in shelf.ended_keys
