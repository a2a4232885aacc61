"""What a lockstep group cannot be made of is refused in one sentence: before a process is started, where config.json tells."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lockstep_bench import make_engine
from tiny_models import Library
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from interlock.engines.base import EngineStartError
from interlock.engines.lockstep.experts import spread_experts


async def refused(library: Library, home: Path, **options: Any) -> str:
    """Why it does not start; no process was started, which a program that is none would show."""
    engine = make_engine(library, home, program=["/nowhere"], **options)
    with pytest.raises(EngineStartError) as error:
        await engine.start()
    assert not engine._living
    await engine.stop()
    return str(error.value)


async def test_a_model_without_experts_is_refused_in_a_sentence(library: Library, tmp_path: Path) -> None:
    library.model("llama")
    said = await refused(library, tmp_path, model=str(library.path("llama")))
    assert "LlamaForCausalLM has no experts" in said
    assert "leave --data-parallel out" in said


async def test_experts_that_cannot_be_dealt_out_evenly_are_refused(library: Library, tmp_path: Path) -> None:
    said = await refused(library, tmp_path, data_parallel=3)
    assert said == "--data-parallel 3 does not divide the model's 4 experts; choose one of 1, 2, 4"


async def test_ranks_that_are_split_further_are_refused(library: Library, tmp_path: Path) -> None:
    assert "leave --tp out" in await refused(library, tmp_path, tensor_parallel=2)


async def test_a_checkpoint_that_is_not_there_is_refused(library: Library, tmp_path: Path) -> None:
    assert "there is no directory" in await refused(library, tmp_path, model=str(tmp_path / "nothing"))


# --- what only the loaded model tells: refused by the ranks -----------------------------------------------------------


@pytest.fixture
def three_ranks() -> Iterator[None]:
    """A process group whose others are made up; nobody meets in it."""
    distributed.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    yield
    distributed.destroy_process_group()


def test_a_family_whose_experts_the_library_does_not_spread_is_refused(library: Library) -> None:
    with pytest.raises(EngineStartError, match="has no experts that the library spreads over ranks"):
        spread_experts(library.model("llama"), 3)


@pytest.mark.usefixtures("three_ranks")
def test_a_model_whose_config_named_no_experts_is_refused_by_its_layers(library: Library) -> None:
    with pytest.raises(EngineStartError, match="--data-parallel 3: Cannot evenly shard 4 experts"):
        spread_experts(copy.deepcopy(library.model("mixtral")), 3)


@pytest.mark.usefixtures("three_ranks")
def test_a_family_with_experts_but_a_checkpoint_without_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Dense(transformers.MixtralForCausalLM):  # type: ignore[misc]
        """A plan, and no layer that it fits."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers = torch.nn.ModuleList()

    config = transformers.MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    with pytest.raises(EngineStartError, match="no layer of Dense has experts"):
        spread_experts(Dense(config), 3)
