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


@pytest.fixture(scope="module")
def saved(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any], vllm_environment: None
) -> None:
    """One prompt saved by two pipeline stages, another by a single rank."""
    for pipeline, prompt, expected in ((2, SAVED_BY_STAGES, reference[4]), (1, SAVED_BY_ONE, reference[5])):
        with grid(tiny_model, store, state, pipeline=pipeline) as engine:
            rig.assert_equal([expected], engine.run([prompt]))
            assert engine.counts["loaded_blocks"] == 0
            probe = rig.Probe(store, engine.connector.shape.layout)
            probe.wait_stored(engine.keys(prompt))
            cuts = [location.cuts for location in probe.stored(engine.keys(prompt))]
            assert cuts == [(2,) if pipeline == 2 else ()] * rig.FULL_BLOCKS
            probe.close()


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_any_grid_of_ranks_loads_what_two_stages_and_what_one_rank_saved(
    tiny_model: Path,
    store: rig.Store,
    state: Path,
    reference: list[Any],
    saved: None,
    pipeline: int,
    tensor: int,
) -> None:
    with grid(tiny_model, store, state, pipeline=pipeline, tensor=tensor) as engine:
        rig.assert_equal(reference[4:6], engine.run([SAVED_BY_STAGES, SAVED_BY_ONE]))
        assert engine.counts["loaded_blocks"] == 2 * rig.FULL_BLOCKS
        assert engine.counts["loaded_good_blocks"] == 2 * rig.FULL_BLOCKS * pipeline * tensor
        assert engine.counts["saved_blocks"] == 0


def test_a_block_that_one_stage_finds_spoilt_is_recomputed_on_all(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any], saved: None
) -> None:
    with grid(tiny_model, store, state, pipeline=2) as engine:
        keys, layout = engine.keys(SAVED_BY_STAGES), engine.connector.shape.layout
        probe = rig.Probe(store, layout)
        try:
            location = probe.stored(keys)[3]
            slot = probe._slab.offset(location.slot)
            probe._slab.view[slot + layout.head_bytes - 5] ^= (
                0x20  # the last layer of head 0: the second stage's
            )
            rig.assert_equal(reference[4:5], engine.run([SAVED_BY_STAGES]))
            assert engine.counts["loaded_mismatch_blocks"] == 1, "the first stage found nothing wrong"
            assert engine.counts["failed_loads"] == 1
            assert len(probe.stored(keys)) == 3
        finally:
            probe.close()


def test_fp8_blocks_come_back_with_their_scales_and_are_no_ones_else(
    tiny_model: Path, store: rig.Store, state: Path, reference: list[Any]
) -> None:
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
        assert not set(engine.keys(prompt)) & set(quantised)
        rig.assert_equal([reference[7]], engine.run([prompt]))
