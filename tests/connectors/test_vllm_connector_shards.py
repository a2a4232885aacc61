"""The connector in real vLLM engines whose ranks hold layers, heads, or quantised values: what one kind saved others load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import connector_rig as rig
import pytest

from interlock.host.sweep import remove_shared_memory, shared_memory_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.usefixtures("vllm_environment")]

SAVED_BY_STAGES, SAVED_BY_ONE = rig.PROMPTS[4:6]
TO_SPOIL = 3
"""Of `rig.PROMPTS`: saved by stages, and then spoilt."""


@contextmanager
def grid(
    model: Path, store: rig.Store, state: Path, *, pipeline: int = 1, tensor: int = 1, **more: Any
) -> Iterator[rig.Engine]:
    if pipeline * tensor > 1:
        more |= {"distributed_executor_backend": "mp", "worker_cls": "stage_worker.StageWorker"}
    made: set[str] = set()
    try:
        with rig.engine(
            model,
            store=store.address,
            state=state,
            name=f"pp{pipeline}tp{tensor}",
            pipeline_parallel_size=pipeline,
            tensor_parallel_size=tensor,
            **more,
        ) as engine:
            made = shared_memory_of(os.getpid())
            yield engine
    finally:
        remove_shared_memory(made)  # vLLM ends its stages without removing what they talked through


def save(
    engine: rig.Engine, store: rig.Store, index: int, reference: list[Any], cuts: tuple[int, ...]
) -> None:
    """A prompt that nobody has saved is computed, and its blocks are published, cut where the engine's stages are."""
    prompt, loaded = rig.PROMPTS[index], engine.counts["loaded_blocks"]
    rig.assert_equal([reference[index]], engine.run([prompt]))
    assert engine.counts["loaded_blocks"] == loaded
    probe = rig.Probe(store, engine.connector.shape.layout)
    probe.wait_stored(engine.keys(prompt))
    assert [location.cuts for location in probe.stored(engine.keys(prompt))] == [cuts] * rig.FULL_BLOCKS
    probe.close()


def assert_loads_both(engine: rig.Engine, reference: list[Any], ranks: int) -> None:
    """Every block that two stages saved and that one rank saved, on each rank, and none is saved again."""
    before = engine.counts.copy()
    rig.assert_equal(reference[4:6], engine.run([SAVED_BY_STAGES, SAVED_BY_ONE]))
    grown = engine.counts - before
    assert grown["loaded_blocks"] == 2 * rig.FULL_BLOCKS
    assert grown["loaded_good_blocks"] == 2 * rig.FULL_BLOCKS * ranks
    assert grown["saved_blocks"] == 0


@pytest.fixture(scope="module")
def two_stages(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any], vllm_environment: None
) -> Iterator[rig.Engine]:
    """Running, after one prompt was saved by a single rank and two by these stages, which cost a quarter of a minute to start."""
    with grid(tiny_model, store, state) as one:
        save(one, store, 5, reference, cuts=())
    with grid(tiny_model, store, state, pipeline=2) as engine:
        save(engine, store, 4, reference, cuts=(2,))
        save(engine, store, TO_SPOIL, reference, cuts=(2,))
        engine.empty_own_cache()
        yield engine


@pytest.fixture(scope="module")
def saved(two_stages: rig.Engine) -> None:
    """The stages have saved and are ended: one process has one worker group. Their tests come first."""
    two_stages.close()


def test_two_stages_load_what_two_stages_and_what_one_rank_saved(
    two_stages: rig.Engine, reference: list[Any]
) -> None:
    assert_loads_both(two_stages, reference, ranks=2)


def test_a_block_that_one_stage_finds_spoilt_is_recomputed_on_all(
    two_stages: rig.Engine, store: rig.Store, reference: list[Any]
) -> None:
    engine, prompt = two_stages, rig.PROMPTS[TO_SPOIL]
    keys, layout = engine.keys(prompt), engine.connector.shape.layout
    probe = rig.Probe(store, layout)
    try:
        location = probe.stored(keys)[3]
        slot = probe._slab.offset(location.slot)
        probe._slab.view[slot + layout.head_bytes - 5] ^= 0x20  # the last layer of head 0: the second stage's
        before = engine.counts.copy()
        rig.assert_equal([reference[TO_SPOIL]], engine.run([prompt]))
        grown = engine.counts - before
        assert grown["loaded_mismatch_blocks"] == 1, "the first stage found nothing wrong"
        assert grown["failed_loads"] == 1
        assert len(probe.stored(keys)) == 3
    finally:
        probe.close()


def test_four_ranks_load_what_two_stages_and_what_one_rank_saved(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any], saved: None
) -> None:
    with grid(tiny_model, store, state, pipeline=2, tensor=2) as engine:
        assert_loads_both(engine, reference, ranks=4)


def test_fp8_blocks_come_back_with_their_scales_and_are_no_ones_else(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any], saved: None
) -> None:
    """The engine that must not find them loads what the others saved, as one rank does."""
    prompt = rig.PROMPTS[7]
    with rig.engine(tiny_model, kv_cache_dtype="fp8") as plain:
        (expected,) = plain.run([prompt])
    for name, tensor in (("fp8-one", 1), ("fp8-two", 2)):
        more = {"distributed_executor_backend": "mp"} if tensor > 1 else {}
        with rig.engine(
            tiny_model,
            store=store.address,
            state=state,
            name=name,
            kv_cache_dtype="fp8",
            tensor_parallel_size=tensor,
            **more,
        ) as engine:
            rig.assert_equal([expected], engine.run([prompt]))
            loads = engine.counts["loaded_good_blocks"]
            assert loads == (0 if tensor == 1 else rig.FULL_BLOCKS * tensor)
            probe = rig.Probe(store, engine.connector.shape.layout)
            probe.wait_stored(engine.keys(prompt))
            probe.close()
            quantised = engine.keys(prompt)
    with grid(tiny_model, store, state) as engine:
        assert_loads_both(engine, reference, ranks=1)
        loaded = engine.counts["loaded_blocks"]
        assert not set(engine.keys(prompt)) & set(quantised)
        rig.assert_equal([reference[7]], engine.run([prompt]))
        assert engine.counts["loaded_blocks"] == loaded
