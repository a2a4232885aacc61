"""KV blocks of the Transformers engine at a real store node: what is saved, what is loaded, and who else can read it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "connectors"))

from connector_rig import Store, eventually

from interlock.connectors.vllm.keys import Salts
from interlock.connectors.vllm.movers import GOOD, CpuMover
from interlock.connectors.vllm.tensors import KVBlocks
from interlock.core.layouts import KVLayout, heads_of_rank
from interlock.core.limits import PROMOTION_WAIT_SECONDS_MAX
from interlock.core.sampling import Sampling
from interlock.engines.base import Work
from interlock.engines.random_llama import TINY, write_llama
from interlock.engines.transformers import sharing
from interlock.engines.transformers.block_worker import StoreWorker
from interlock.engines.transformers.blocks import StoreScheduler
from interlock.engines.transformers.engine import TransformersEngine
from interlock.engines.transformers.hooks import Coming, Found
from interlock.engines.transformers.setup import TransformersConfig
from interlock.engines.transformers.sharing import StoreAccess
from interlock.host.real import RealHost
from interlock.store.client import MatchResult, StoreClient
from interlock.store.keys import KeyChain, ModelSalt
from interlock.testing.check_engine import Bench, Ground
from interlock.wire.locations import Location

PATIENCE_S = 10.0
LAYOUT = KVLayout(layers=3, heads=4, block_tokens=8, content=32, dtype="float32")
SIZE = LAYOUT.content // 2
TOKENS = list(range(100, 100 + 6 * LAYOUT.block_tokens))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("s"), 64 << 20)
    yield store
    store.close()


class View:
    """`hooks.KVView` over tensors of this test: `[layer, K or V, head, token, size]`."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole
        self.layers: Sequence[int] = range(len(whole))

    def read(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.whole[layer, 0, :, start:stop], self.whole[layer, 1, :, start:stop]


def kv(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((LAYOUT.layers, 2, LAYOUT.heads, len(TOKENS), SIZE), generator=generator).to(dtype)


class Fleet:
    """One engine's life at the store: its deciding half and all its ranks, in this process."""

    lives = 0

    def __init__(
        self, store: Store, home: Path, *, ranks: int = 1, model: str = "m", layout: KVLayout = LAYOUT
    ) -> None:
        Fleet.lives += 1
        self.access = StoreAccess(
            address=store.address,
            engine=f"engine-{Fleet.lives}",
            incarnation=Fleet.lives,
            ranks=ranks,
            salt=ModelSalt(model=model, layout=layout),
            state_dir=str(home),
        )
        self.clients = [self.client(rank) for rank in (None, *range(ranks))]
        self.scheduler = StoreScheduler(self.access, self.clients[0])
        self.workers = [StoreWorker(self.access, r, client=self.clients[1 + r]) for r in range(ranks)]
        for client in self.clients:
            assert client.wait_ready(PATIENCE_S), client.last_error

    def client(self, rank: int | None) -> StoreClient:
        """With a look-up that may take as long as this machine needs."""
        made = self.access.client(rank)
        made._lookup_timeout_s = PATIENCE_S
        return made

    def heads(self, rank: int) -> slice:
        return slice(*heads_of_rank(rank, self.access.ranks, LAYOUT.heads))

    def save(self, whole: torch.Tensor, key: str = "a", blocks: int = 6, salt: str = "t:0") -> bool:
        """A request that computes everything; whether there was anything to save."""
        self.scheduler.lookup(work(key, salt), 0)
        orders = self.scheduler.completed(key, TOKENS, 0, blocks)
        if orders is not None:
            for rank, worker in enumerate(self.workers):
                worker.save(orders, {key: View(whole[:, :, self.heads(rank)])})
        self.delivered()
        return orders is not None

    def delivered(self) -> None:
        assert all(client.wait_delivered(PATIENCE_S) for client in self.clients)

    def load(self, key: str = "b", salt: str = "t:0", blocks: int = 6) -> tuple[int, list[Any]]:
        """As the engine does it: the least of all ranks. Each rank's caches."""
        found = self.scheduler.lookup(work(key, salt), blocks)
        assert not isinstance(found, Coming), "this store has no disk"
        if found is None:
            return 0, []
        answers = [worker.load(found.orders, found.blocks) for worker in self.workers]
        good = min(count for count, _ in answers)
        self.scheduler.loaded(key, good)
        return good, [caches for _, caches in answers]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.scheduler.close()


def work(key: str, salt: str) -> Work:
    return Work.of(key, TOKENS, Sampling(max_tokens=1), salt)


def joined(good: int, per_rank: list[Any]) -> torch.Tensor:
    """`[layer, K or V, head, token, size]` of all ranks."""
    parts = [torch.stack([torch.stack([k[0], v[0]]) for k, v in caches]) for caches in per_rank]
    whole = torch.cat(parts, dim=2)
    assert whole.shape[3] == good * LAYOUT.block_tokens
    return whole


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)])
def test_what_any_number_of_ranks_saves_any_number_loads_bit_for_bit(
    store: Store, tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    salt = f"{saved_by}{loaded_by}:0"
    writer, reader = Fleet(store, tmp_path, ranks=saved_by), Fleet(store, tmp_path, ranks=loaded_by)
    whole = kv(1)
    assert writer.save(whole, salt=salt)
    good, caches = reader.load(salt=salt)
    assert good == 6
    assert torch.equal(joined(good, caches), whole)
    assert reader.scheduler.counts()["loaded_blocks"] == 6
    writer.close()
    reader.close()


def test_bfloat16_goes_through_unchanged(store: Store, tmp_path: Path) -> None:
    layout = msgspec.structs.replace(LAYOUT, dtype="bfloat16")
    fleet, whole = Fleet(store, tmp_path, layout=layout), kv(2, torch.bfloat16)
    fleet.save(whole)
    good, caches = fleet.load()
    assert good == 6
    assert torch.equal(joined(good, caches), whole)
    fleet.close()


def as_vllm(whole: torch.Tensor) -> list[torch.Tensor]:
    """vLLM's tensor of each layer, `[block, head, token, K‖V]`; block 0 is nobody's there."""
    layers = []
    for keys, values in whole:
        content = torch.cat([keys, values], dim=-1)
        heads = content.shape[0]
        blocks = content.reshape(heads, -1, LAYOUT.block_tokens, LAYOUT.content).transpose(0, 1)
        layers.append(torch.cat([torch.zeros_like(blocks[:1]), blocks]).contiguous())
    return layers


def test_what_this_engine_saves_vllms_mover_loads_and_the_other_way_round(
    store: Store, tmp_path: Path
) -> None:
    writer, whole = Fleet(store, tmp_path), kv(3)
    writer.save(whole, salt="both:0")
    found = writer.clients[0].match(chain(writer, "both:0"))
    assert found is not None
    slab = writer.clients[1].slab_of(found.slab)
    assert slab is not None
    into = as_vllm(torch.zeros_like(whole))
    mover = CpuMover(KVBlocks(into, LAYOUT, LAYOUT.heads), LAYOUT, 0)
    block_ids = list(range(1, 7))
    assert mover.load(slab, chain(writer, "both:0"), found.locations, block_ids, lambda: True) == [GOOD] * 6
    assert all(torch.equal(a, b) for a, b in zip(into, as_vllm(whole), strict=True))

    keys = chain(writer, "vllm:0")
    grant = writer.clients[0].start_write("by vllm", 1, keys, [b"", *keys[:-1]])
    assert grant is not None
    theirs = CpuMover(KVBlocks(as_vllm(whole), LAYOUT, LAYOUT.heads), LAYOUT, 0)
    staging = theirs.staging()
    theirs.gather(block_ids, staging)
    sums = theirs.put(slab, keys, [given.slot for given in grant.grants], staging)
    writer.clients[1].report(grant, 0, [True] * 6, sums)
    writer.delivered()
    good, caches = writer.load("x", salt="vllm:0")
    assert good == 6
    assert torch.equal(joined(good, caches), whole)
    writer.close()


def chain(fleet: Fleet, salt: str) -> list[bytes]:
    """The keys that vLLM's connector gives these tokens."""
    salts = Salts(fleet.access.salt, adapter_identity=lambda _: "")
    request = SimpleNamespace(
        prompt_token_ids=TOKENS,
        prompt_embeds=None,
        pooling_params=None,
        resumable=False,
        lora_request=None,
        mm_features=[],
        cache_salt=salt,
    )
    digest = salts.of(request)
    assert digest is not None
    return KeyChain(digest, LAYOUT.block_tokens).upto(6, TOKENS)


def test_another_salt_or_model_or_layout_is_a_miss(store: Store, tmp_path: Path) -> None:
    fleet = Fleet(store, tmp_path)
    fleet.save(kv(4), salt="mine:0")
    assert fleet.load(salt="mine:0")[0] == 6
    assert fleet.load("c", salt="yours:0")[0] == 0
    for other in (
        Fleet(store, tmp_path, model="n"),
        Fleet(store, tmp_path, layout=msgspec.structs.replace(LAYOUT, content=64)),
    ):
        assert other.load(salt="mine:0")[0] == 0
        other.close()
    fleet.close()


def test_a_block_that_is_not_what_was_promised_ends_the_prefix_and_is_withdrawn(
    store: Store, tmp_path: Path
) -> None:
    fleet, whole = Fleet(store, tmp_path), kv(5)
    fleet.save(whole, salt="bad:0")
    found = fleet.clients[0].match(chain(fleet, "bad:0"))
    assert found is not None
    slab = fleet.clients[1].slab_of(found.slab)
    assert slab is not None
    slab.block(found.locations[2].slot)[77] ^= 1
    good, caches = fleet.load(salt="bad:0")
    assert good == 2
    assert torch.equal(joined(2, caches), whole[:, :, :, : 2 * LAYOUT.block_tokens])
    assert fleet.scheduler.counts()["failed_loads"] == 1
    assert fleet.scheduler.completed("b", TOKENS, 2, 6) is None, "a request whose load failed saves nothing"
    fleet.delivered()
    assert fleet.load("next", salt="bad:0")[0] == 2
    fleet.save(whole, key="healer", salt="bad:0")
    assert fleet.load("after", salt="bad:0")[0] == 6
    fleet.close()


def test_a_request_without_a_cache_saves_nothing_and_leaves_no_slot_taken(
    store: Store, tmp_path: Path
) -> None:
    fleet = Fleet(store, tmp_path)
    fleet.scheduler.lookup(work("gone", "gone:0"), 0)
    orders = fleet.scheduler.completed("gone", TOKENS, 0, 6)
    assert orders is not None
    fleet.workers[0].save(orders, {})
    fleet.delivered()
    assert fleet.load("d", salt="gone:0")[0] == 0
    stats = store.stats()
    assert stats["interlock_store_slots_writing"] == stats["interlock_store_slots_quarantined"] == 0
    fleet.close()


def test_a_refused_save_is_made_up_for_by_the_next(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, whole = Fleet(store, tmp_path), kv(6)
    fleet.scheduler.lookup(work("r", "refused:0"), 0)
    with monkeypatch.context() as patch:
        patch.setattr(fleet.clients[0], "start_write", lambda *_, **__: None)
        assert fleet.scheduler.completed("r", TOKENS, 0, 3) is None
    orders = fleet.scheduler.completed("r", TOKENS, 3, 6)
    assert orders is not None
    fleet.workers[0].save(orders, {"r": View(whole)})
    fleet.delivered()
    good, caches = fleet.load("s", salt="refused:0")
    assert good == 6
    assert torch.equal(joined(good, caches), whole)
    fleet.close()


def test_new_weights_name_new_blocks_and_unknown_ones_none(store: Store, tmp_path: Path) -> None:
    fleet = Fleet(store, tmp_path)
    fleet.save(kv(7), salt="w:0")
    fleet.scheduler.weights_changed(str(write_llama(tmp_path / "new", TINY, seed=9)))
    assert fleet.load("e", salt="w:0")[0] == 0
    fleet.scheduler.weights_changed(str(tmp_path / "nowhere"))
    assert fleet.load("f", salt="w:0")[0] == 0
    assert not fleet.save(kv(7), key="g", salt="w:0")
    fleet.scheduler.weights_changed("")
    assert fleet.load("h", salt="w:0")[0] == 6
    fleet.close()


def test_nothing_raises_when_the_store_is_gone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = Store(tmp_path_factory.mktemp("g"), 16 << 20)
    fleet, whole = Fleet(store, tmp_path), kv(8)
    fleet.save(whole)
    found = fleet.scheduler.lookup(work("i", "t:0"), 6)
    fleet.scheduler.lookup(work("j", "t:0"), 0)
    orders = fleet.scheduler.completed("j", [n + 1 for n in TOKENS], 0, 6)
    assert isinstance(found, Found)
    assert orders is not None
    store.kill()
    eventually(lambda: not fleet.clients[1].ready, "the rank sees that the store is gone")
    assert fleet.workers[0].load(found.orders, 6) == (0, [])
    fleet.workers[0].save(orders, {"j": View(whole)})
    assert fleet.scheduler.lookup(work("k", "t:0"), 6) is None
    assert fleet.workers[0].load(b"no message", 6) == (0, [])
    fleet.close()


# --- whole engines -----------------------------------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up may take as long as this busy machine needs: here a miss would be a fault."""
    monkeypatch.setattr(sharing, "LOOKUP_SECONDS", PATIENCE_S)


def engine_at(store: Store, model: Path, home: Path, name: str, **more: Any) -> TransformersEngine:
    config = TransformersConfig(
        model=str(model),
        model_id=f"model {model.name}",
        name=name,
        store=store.address,
        state_dir=str(home / name / "state"),
        scratch_dir=str(home),
        step_tokens=64,
        **more,
    )
    (home / name).mkdir()
    return TransformersEngine(RealHost(), config)


async def opened(engine: TransformersEngine) -> Bench:
    def kill(_: object) -> None:
        raise NotImplementedError

    bench = Bench(engine, await engine.start(), Ground(vocabulary=TINY.vocabulary, kill=kill))
    assert bench.capabilities.saves
    for client in clients(bench):
        assert await asyncio.to_thread(client.wait_ready, PATIENCE_S), client.last_error
    return bench


def clients(bench: Bench) -> list[StoreClient]:
    hooks = bench.engine._built.hooks  # type: ignore[attr-defined]
    return [hooks.scheduler._client, hooks.worker._client]


async def settled(bench: Bench) -> None:
    """What it saved so far is published: the pause gives its ranks their last orders."""
    await bench.pause()
    await bench.unpause()
    for client in clients(bench):
        assert await asyncio.to_thread(client.wait_delivered, PATIENCE_S)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("patient")
async def test_a_prefix_computed_by_one_engine_is_hit_by_another_with_equal_tokens(
    store: Store, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "tiny", TINY, seed=7)
    alone = await opened(engine_at(store, model, tmp_path, "alone"))
    prompt = alone.prompt(1, 300)
    first = await alone.answer(prompt, 40)
    assert first.steps[-1].cached_tokens == 0
    await settled(alone)
    other = await opened(engine_at(store, model, tmp_path, "other"))
    again = await other.answer(prompt, 40)
    assert again.steps[-1].cached_tokens == 288
    other.same(first, again, "from the store")
    whole = [*prompt, *first.tokens]
    longer = await other.answer(whole, 4)
    assert longer.steps[-1].cached_tokens >= 320, "blocks that decoding completed are saved too"
    unshared = await other.answer(prompt, 40, salt="another:0")
    assert unshared.steps[-1].cached_tokens == 0
    other.same(unshared, again, "computed against loaded")
    for bench in (alone, other):
        await bench.engine.stop()


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("patient")
async def test_after_a_restart_of_the_node_a_request_waits_for_its_disk_and_hits(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.store.waiting.PROMOTION_WAIT_SECONDS_MAX", PATIENCE_S)
    folder = tmp_path_factory.mktemp("d")
    store = Store(folder, 64 << 20, disk=folder / "disk")
    try:
        model = write_llama(tmp_path / "tiny", TINY, seed=7)
        bench = await opened(engine_at(store, model, tmp_path, "waits"))
        prompt = bench.prompt(3, 300)
        first = await bench.answer(prompt, 16)
        await settled(bench)
        await asyncio.to_thread(store.close)  # in peace: what it holds goes to its disk
        for client in clients(bench):
            await asyncio.to_thread(eventually, lambda: not client.ready, "the engine sees that it is gone")  # noqa: B023
        await asyncio.to_thread(store.start)
        for client in clients(bench):
            assert await asyncio.to_thread(client.wait_ready, PATIENCE_S), client.last_error
        again = await bench.answer(prompt, 16)
        assert bench.engine.counts()["asked_again"] >= 1, "a block that was still in memory needs no disk"
        assert again.steps[-1].cached_tokens == 288
        bench.same(first, again, "from the disk")
        await bench.engine.stop()
    finally:
        await asyncio.to_thread(store.close)


class Promising:
    """A store client of which the first `there` keys can be read and more is always on its way."""

    def __init__(self, there: int) -> None:
        self.there, self.asked = there, 0

    def start(self) -> None: ...

    def match(self, keys: Sequence[bytes]) -> MatchResult:
        self.asked += 1
        return MatchResult(7, [Location(slot, [0]) for slot in range(self.there)], len(keys) - self.there)


def test_a_request_waits_for_coming_blocks_no_longer_than_its_bound_in_all_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("interlock.engines.transformers.blocks.monotonic_s", lambda: now_s)
    access = StoreAccess(
        address="unix:/nowhere", engine="e", incarnation=1, ranks=1, salt=ModelSalt(model="m", layout=LAYOUT),
        state_dir=str(tmp_path),
    )  # fmt: skip
    client = Promising(2)
    scheduler = StoreScheduler(access, client)  # type: ignore[arg-type]
    answer = scheduler.lookup(work("a", "t:0"), 6)
    while isinstance(answer, Coming):
        now_s += answer.again_s
        answer = scheduler.lookup(work("a", "t:0"), 6)
    assert now_s == pytest.approx(100.0 + PROMOTION_WAIT_SECONDS_MAX, abs=0.02)
    assert answer is not None
    assert answer.blocks == 2, "what is there is taken when the bound has passed"
    asked = client.asked
    assert isinstance(scheduler.lookup(work("a", "t:0"), 6), Found), (
        "preempted, it does not begin to wait anew"
    )
    assert client.asked == asked + 1
    scheduler.ended("a")
    assert isinstance(scheduler.lookup(work("b", "t:0"), 6), Coming)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("patient")
async def test_a_flipped_byte_is_computed_and_unverified_it_would_change_tokens(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(tmp_path / "tiny", TINY, seed=7)
    bench = await opened(engine_at(store, model, tmp_path, "flipped"))
    prompt = bench.prompt(2, 300)
    reference = await bench.answer(prompt, 24, salt="flip:0")
    await settled(bench)
    salt = bench.engine._built.hooks.scheduler._salt.of("flip:0")  # type: ignore[attr-defined]
    scheduler, worker = clients(bench)
    found = await asyncio.to_thread(scheduler.match, KeyChain(salt, 32).upto(9, prompt))
    assert found is not None
    slab = worker.slab_of(found.slab)
    assert slab is not None
    heads = np.frombuffer(slab.block(found.locations[1].slot), dtype=np.float32)
    heads[:] = np.roll(heads, 64)
    with monkeypatch.context() as patch:
        patch.setattr("interlock.store.rank_slots.verify_block", lambda *_, **__: True)
        wrong = await bench.answer(prompt, 24, salt="flip:0")
    assert wrong.steps[-1].cached_tokens == 288
    assert wrong.tokens != reference.tokens, "the comparison can fail"
    right = await bench.answer(prompt, 24, salt="flip:0")
    assert right.steps[-1].cached_tokens == 32, "one good block before the bad one"
    bench.same(reference, right, "verified")
    await bench.engine.stop()
