"""A real vLLM engine whose store node dies: what it saved is on the disk, and a new life of the node serves it from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import connector_rig as rig
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.usefixtures("vllm_environment")]

PROMPTS = rig.PROMPTS[:4]
SAVED_BLOCKS = rig.FULL_BLOCKS * len(PROMPTS)


@pytest.fixture(scope="module")
def disk_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rig.Store]:
    directory = tmp_path_factory.mktemp("disk-store")
    store = rig.Store(directory, disk=directory / "packs")
    yield store
    store.close()


@pytest.fixture(scope="module")
def engine(
    tiny_model: Path, disk_store: rig.Store, tmp_path_factory: pytest.TempPathFactory, vllm_environment: None
) -> Iterator[rig.Engine]:
    state = tmp_path_factory.mktemp("state")
    state.chmod(0o700)
    with rig.engine(tiny_model, store=disk_store.address, state=state, name="disked") as engine:
        yield engine


@pytest.fixture(scope="module")
def computed(engine: rig.Engine, disk_store: rig.Store) -> list[Any]:
    """What the engine computes itself; all of its blocks are on the disk afterwards."""
    found = engine.run(PROMPTS)
    assert engine.counts["loaded_blocks"] == 0
    rig.eventually(
        lambda: disk_store.stats()["interlock_store_disk_written_blocks_total"] >= SAVED_BLOCKS,
        "every block was written behind",
    )
    return found


def kill(engine: rig.Engine, store: rig.Store) -> int:
    """The life of the node that ended."""
    life = engine.connector.client._keeper.link.node_incarnation
    store.kill()
    return int(life)


def begin_new_life(engine: rig.Engine, store: rig.Store, ended: int) -> None:
    store.start()
    for half in (engine.connector, engine.worker):
        keeper = half.client._keeper
        rig.eventually(
            lambda keeper=keeper: keeper.link is not None and keeper.link.node_incarnation > ended,
            "the engine attached again by itself",
        )
    engine.empty_own_cache()


def test_after_the_nodes_death_the_same_tokens_come_from_its_disk(
    engine: rig.Engine, disk_store: rig.Store, computed: list[Any]
) -> None:
    begin_new_life(engine, disk_store, kill(engine, disk_store))
    assert disk_store.stats()["interlock_store_published_blocks_total"] == 0
    before = engine.counts["loaded_blocks"]
    rig.assert_equal(computed, engine.run(PROMPTS))
    assert engine.counts["loaded_blocks"] - before == SAVED_BLOCKS
    assert engine.cached == [rig.FULL_BLOCKS * rig.BLOCK_TOKENS] * len(PROMPTS)
    found = disk_store.stats()
    assert found["interlock_store_disk_promoted_blocks_total"] == SAVED_BLOCKS
    assert found["interlock_store_disk_bad_blocks_total"] == 0


def test_a_block_that_rotted_on_the_disk_is_computed_again_and_its_neighbours_are_not(
    engine: rig.Engine, disk_store: rig.Store, computed: list[Any]
) -> None:
    store = disk_store
    ended = kill(engine, store)
    packs = sorted((store.directory / "packs").glob("*.safetensors"))
    assert packs
    size = engine.connector.shape.layout.block_bytes
    data = bytearray(packs[0].read_bytes())
    data[len(data) - 4096 - size // 2] ^= 1  # in the last block before the foot
    packs[0].write_bytes(data)
    begin_new_life(engine, store, ended)
    before = engine.counts["loaded_blocks"]
    rig.assert_equal(computed, engine.run(PROMPTS))
    assert 0 < engine.counts["loaded_blocks"] - before < SAVED_BLOCKS
    assert store.stats()["interlock_store_disk_bad_blocks_total"] == 1
