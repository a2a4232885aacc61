"""The connector in a real vLLM engine of two ranks, each on a socket of its own behind a gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import connector_rig as rig
import pytest
from report_gate import Gate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.usefixtures("vllm_environment")]

RANK_0_LATE, RANK_1_LATE = rig.PROMPTS[6:8]


@pytest.fixture(scope="session")
def undisturbed(reference: list[Any]) -> list[Any]:
    return reference[6:8]


@pytest.fixture(scope="module")
def gates(store: rig.Store) -> Iterator[list[Gate]]:
    gates = [Gate(f"{store.address}.rank{rank}", store.address) for rank in range(2)]
    yield gates
    for gate in gates:
        gate.close()


@pytest.fixture(scope="module")
def two_ranks(
    tiny_model: Path,
    store: rig.Store,
    gates: list[Gate],
    state: Path,
    undisturbed: list[Any],
    vllm_environment: None,
) -> Iterator[rig.Engine]:
    with rig.engine(
        tiny_model,
        store=store.address,
        state=state,
        name="two-ranks",
        connector=("GatedConnector", "gated_connector"),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as engine:
        assert all(gate.attached.wait(rig.PATIENCE_S) for gate in gates)
        yield engine


@pytest.fixture
def probe(store: rig.Store, two_ranks: rig.Engine) -> Iterator[rig.Probe]:
    probe = rig.Probe(store, two_ranks.connector.shape.layout)
    yield probe
    probe.close()


@pytest.mark.parametrize("late", [0, 1])
def test_a_block_is_published_only_after_both_ranks_reported_whichever_comes_last(
    two_ranks: rig.Engine, gates: list[Gate], probe: rig.Probe, undisturbed: list[Any], late: int
) -> None:
    prompt = (RANK_0_LATE, RANK_1_LATE)[late]
    keys = two_ranks.keys(prompt)
    gates[late].hold()
    passed = gates[1 - late].passed
    rig.assert_equal([undisturbed[late]], two_ranks.run([prompt]))
    assert gates[late].arrived.wait(rig.PATIENCE_S), (
        "the late rank has finished, its report stands at the gate"
    )
    rig.eventually(lambda: gates[1 - late].passed > passed, "the other rank's report is with the node")
    assert probe.stored(keys) == [], "half a block is no block"
    gates[late].release()
    probe.wait_stored(keys)


def test_a_load_that_fails_on_one_rank_is_recomputed_on_both(
    two_ranks: rig.Engine, probe: rig.Probe, undisturbed: list[Any]
) -> None:
    keys = two_ranks.keys(RANK_0_LATE)
    probe.flip_byte(keys, 3, head=3)  # heads 2 and 3 are rank 1's
    two_ranks.empty_own_cache()
    rig.assert_equal(undisturbed[:1], two_ranks.run([RANK_0_LATE]))
    assert two_ranks.counts["loaded_mismatch_blocks"] == 1, "rank 0 found nothing wrong"
    assert two_ranks.counts["loaded_good_blocks"] == 2 * rig.FULL_BLOCKS - 1
    assert two_ranks.counts["failed_loads"] == 1
    assert len(probe.stored(keys)) == 3


def test_what_two_ranks_saved_one_rank_loads(
    tiny_model: Path, store: rig.Store, state: Path, undisturbed: list[Any], two_ranks: rig.Engine
) -> None:
    """Runs last: it ends the engine of two ranks, since one process has one worker group."""
    two_ranks.close()
    with rig.engine(tiny_model, store=store.address, state=state, name="one-rank") as one_rank:
        rig.assert_equal(undisturbed[1:2], one_rank.run([RANK_1_LATE]))
        assert one_rank.counts["loaded_blocks"] == rig.FULL_BLOCKS
        assert one_rank.counts["saved_blocks"] == 0
