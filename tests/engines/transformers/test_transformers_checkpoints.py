"""Checkpoints that are damaged or not whole: none is served, and the sentence names what is wrong; so at a start and at an update."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Bench, Library, prompts, work

from interlock.core.targets import Mode
from interlock.engines.base import EngineStartError, UpdateFailed

TENSOR = "model.layers.1.mlp.gate_proj.weight"
Damage = Callable[[Path], None]


def rewritten(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def of_no_known_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobodys"}))


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a tensor missing": (rewritten(lambda tensors: tensors.pop(TENSOR)), f"lacks {TENSOR}"),
    "half of its tensors missing": (
        rewritten(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1." in name]),
        r"lacks model\.layers\.1\.\S+ and \d+ tensors more of LlamaForCausalLM",
    ),
    "a tensor of another shape": (
        rewritten(lambda tensors: tensors.update({TENSOR: tensors[TENSOR][:-1].clone()})),
        f"has {TENSOR} in other shapes",
    ),
    "a value that is no number": (
        rewritten(lambda tensors: tensors[TENSOR].view(-1)[7:8].fill_(float("nan"))),
        f"no numbers .* in {TENSOR}",
    ),
    "an infinite value": (
        rewritten(lambda tensors: tensors[TENSOR].view(-1)[7:8].fill_(float("inf"))),
        f"no numbers .* in {TENSOR}",
    ),
    "weights cut short": (cut_short, "cannot be loaded"),
    "no weights": (without_weights, "cannot be loaded: .*model.safetensors"),
    "an unknown kind of model": (of_no_known_kind, "model type `nobodys`"),
    "its config cut short": (cut_config, "config.json"),
}


@pytest.fixture
def damaged(library: Library, tmp_path: Path) -> Callable[[str], Path]:
    def make(damage: str) -> Path:
        library.model("llama")
        folder = tmp_path / "damaged"
        shutil.copytree(library.path("llama"), folder)
        DAMAGES[damage][0](folder)
        return folder

    return make


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_checkpoint_is_refused_at_the_start_and_at_an_update(
    damage: str, damaged: Callable[[str], Path], bench: Any, library: Library
) -> None:
    folder, said = damaged(damage), DAMAGES[damage][1]
    with pytest.raises(EngineStartError, match=said):
        await bench("llama", model=str(folder))

    made: Bench = await bench("llama")
    await made.engine.pause(Mode.KEEP)
    with pytest.raises(UpdateFailed, match=said):
        await made.engine.update_weights(folder, "v1")
    with pytest.raises(UpdateFailed):
        await made.engine.unpause()
    await made.engine.update_weights(library.path("llama"), "v2")
    await made.engine.unpause()
    (heard,) = await made.run(work("after", prompts()[0]))
    assert heard.tokens == library.greedy("llama", prompts()[0])


async def test_large_values_are_not_taken_for_infinite_ones_and_what_they_compute_is_judged(
    bench: Any, library: Library, tmp_path: Path
) -> None:
    library.model("llama")
    folder = tmp_path / "large"
    shutil.copytree(library.path("llama"), folder)
    rewritten(lambda tensors: tensors[TENSOR].fill_(3e38))(folder)
    with pytest.raises(EngineStartError, match="left nothing in its cache, or logits that are no numbers"):
        await bench("llama", model=str(folder))
    assert torch.isfinite(load_file(folder / "model.safetensors")[TENSOR]).all()
