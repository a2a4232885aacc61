"""The connector in real vLLM engines of one rank, one after the other at one store node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import connector_rig as rig
import pytest

from interlock.store import rank_slots

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240), pytest.mark.usefixtures("vllm_environment")]

PROMPTS = rig.PROMPTS[:4]
SAVED_BLOCKS = rig.FULL_BLOCKS * len(PROMPTS)


@pytest.fixture(scope="module")
def saved(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any], vllm_environment: None
) -> int:
    """A first engine computes and saves the prompts, and ends. Returns how many blocks it saved."""
    with rig.engine(tiny_model, store=store.address, state=state, name="first") as first:
        rig.assert_equal(reference[:4], first.run(PROMPTS))
        assert first.counts["loaded_blocks"] == 0
        assert first.counts["saved_blocks"] == SAVED_BLOCKS
        probe = rig.Probe(store, first.connector.shape.layout)
        for one in PROMPTS:
            probe.wait_stored(first.keys(one))
        probe.close()
        return first.counts["saved_blocks"]


@pytest.fixture(scope="module")
def second(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any], saved: int
) -> Iterator[rig.Engine]:
    with rig.engine(tiny_model, store=store.address, state=state, name="second") as engine:
        yield engine


@pytest.fixture
def probe(store: rig.Store, second: rig.Engine) -> Iterator[rig.Probe]:
    probe = rig.Probe(store, second.connector.shape.layout)
    yield probe
    probe.close()


def test_an_engine_reuses_what_an_ended_one_saved(second: rig.Engine, reference: list[Any]) -> None:
    """Its own prefix cache is empty: it has computed nothing yet."""
    rig.assert_equal(reference[:4], second.run(PROMPTS))
    assert second.counts["loaded_blocks"] == SAVED_BLOCKS
    assert second.counts["saved_blocks"] == 0
    assert second.cached == [rig.FULL_BLOCKS * rig.BLOCK_TOKENS] * len(PROMPTS)
    assert second.connector.client.counts()["match_hit_blocks"] == SAVED_BLOCKS


def test_flipped_bytes_change_tokens_unverified_and_are_noticed_verified(
    second: rig.Engine, probe: rig.Probe, reference: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, block = second.keys(PROMPTS[0]), 4
    probe.flip_block(keys, block)
    with monkeypatch.context() as unverified:
        unverified.setattr(rank_slots, "verify_block", lambda *_, **__: True)
        second.empty_own_cache()
        (spoilt,) = rig.comparisons(reference[:1], second.run(PROMPTS[:1]))
        assert not spoilt.equal, "a comparison that cannot fail proves nothing"
    probe.flip_block(keys, block)
    probe.flip_byte(keys, block, head=1)
    before = dict(second.counts)
    second.empty_own_cache()
    rig.assert_equal(reference[:1], second.run(PROMPTS[:1]))
    assert second.counts["loaded_mismatch_blocks"] == 1
    assert second.counts["failed_loads"] - before.get("failed_loads", 0) == 1
    assert len(probe.stored(keys)) == block, "the corrupt block left the index"


def test_an_aborted_load_keeps_its_blocks_until_nothing_can_touch_them(
    second: rig.Engine, reference: list[Any]
) -> None:
    second.empty_own_cache()
    all_free = second.free_blocks()
    gate, entered = threading.Event(), threading.Event()
    loader = second.worker.worker._loader
    real = loader._mover

    class Held:
        def load(self, *arguments: Any) -> list[str]:
            entered.set()
            assert gate.wait(rig.PATIENCE_S)
            return real.load(*arguments)

    loader._mover = Held()
    try:
        second.add("doomed", PROMPTS[1])
        second.step()
        assert entered.wait(rig.PATIENCE_S)
        assert second.connector.has_pending_push_work()
        second.llm.llm_engine.abort_request(["doomed"])
        for _ in range(3):
            second.step()
        assert second.connector.has_pending_push_work(), "vLLM must hear of the load of an aborted request"
        assert second.free_blocks() < all_free, "the loader may still write into these blocks"
    finally:
        gate.set()
        loader._mover = real
    while second.connector.has_pending_push_work():
        second.step()
    assert second.free_blocks() == all_free
    rig.assert_equal(reference[1:2], second.run(PROMPTS[1:2]))


def test_preempted_requests_resume_with_equal_tokens_and_save_nothing_wrong(
    second: rig.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests of nine blocks each grow over a KV space of twenty."""
    prompts = [rig.prompt(seed, 200) for seed in (20, 21, 22)]
    undisturbed = second.run(prompts, tokens=60)
    second.empty_own_cache()
    scheduler = second.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 20)
    victims: list[str] = []
    preempt = scheduler._preempt_request

    def watched(request: Any, *rest: Any, **more: Any) -> None:
        victims.append(request.request_id)
        preempt(request, *rest, **more)

    monkeypatch.setattr(scheduler, "_preempt_request", watched)
    try:
        rig.assert_equal(undisturbed, second.run(prompts, tokens=60))
    finally:
        pool.free_blocks(taken)
    assert victims, "the KV space was not small enough to preempt anybody"
    second.empty_own_cache()
    before = second.counts["loaded_blocks"]
    rig.assert_equal(undisturbed, second.run(prompts, tokens=60))
    assert second.counts["loaded_blocks"] >= before + 3 * 6, (
        "what was saved meanwhile is read back, and right"
    )


def test_a_killed_store_is_a_miss_and_a_restarted_one_serves_again(
    second: rig.Engine, store: rig.Store, reference: list[Any]
) -> None:
    store.kill()
    second.empty_own_cache()
    before = second.counts["loaded_blocks"]
    rig.assert_equal(reference[2:4], second.run(PROMPTS[2:4]))
    assert second.counts["loaded_blocks"] == before
    assert second.counts["lookup_unanswered"] > 0
    store.start()
    for half in (second.connector, second.worker):
        rig.eventually(lambda half=half: half.client.ready, "the engine attached again by itself")
    second.empty_own_cache()
    rig.assert_equal(reference[2:4], second.run(PROMPTS[2:4]))
    probe = rig.Probe(store, second.connector.shape.layout)
    for one in PROMPTS[2:4]:
        probe.wait_stored(second.keys(one))
    probe.close()
    second.empty_own_cache()
    rig.assert_equal(reference[2:4], second.run(PROMPTS[2:4]))
    assert second.counts["loaded_blocks"] == before + 2 * rig.FULL_BLOCKS
