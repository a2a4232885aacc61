"""A local checkpoint directory, looked at before anything heavy starts: is it one, and can it be split as asked?

Only what the command line can say at once, in one sentence. Whether the engine supports the architecture is the engine's
to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
"""What families call the number of experts in a layer."""


class BadCheckpoint(Exception):  # noqa: N818 - says what is, as the others do
    """This cannot be served; the message says why and what to do."""


class Checkpoint(msgspec.Struct, frozen=True):
    """What the fleet needs to know of a model before an engine has loaded it."""

    path: Path
    architecture: str
    heads: int | None
    kv_heads: int | None
    experts: int | None = None


def read_checkpoint(named: str) -> Checkpoint:
    """Complete enough to be served. Raises `BadCheckpoint`."""
    found = read_shape(named)
    if not any(next(found.path.glob(pattern), None) for pattern in WEIGHTS):
        raise BadCheckpoint(f"{named} holds no weights (*.safetensors or *.bin); is the download complete?")
    if not (found.path / "tokenizer.json").is_file():
        raise BadCheckpoint(
            f"{named} has no tokenizer.json; save its tokenizer in the fast format beside the weights "
            "(transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    return found


def read_shape(named: str) -> Checkpoint:
    """What its config.json says: all that is needed to know into how many parts it can be split. Raises `BadCheckpoint`."""
    path = Path(named).expanduser()
    if not path.exists():
        raise BadCheckpoint(
            f"there is no directory {named}; name a local checkpoint directory (models are not downloaded), "
            "or leave MODEL out to serve the demo model"
        )
    if not path.is_dir():
        raise BadCheckpoint(f"{named} is a file; name the directory that holds config.json and the weights")
    path = path.resolve()
    config = _read_config(path, named)
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else config
    heads = _count(inner, "num_attention_heads")
    experts = next(filter(None, (_count(inner, name) for name in EXPERTS)), None)
    return Checkpoint(
        path, _architecture(config), heads, _count(inner, "num_key_value_heads") or heads, experts
    )


def check_tensor_parallel(checkpoint: Checkpoint, ranks: int) -> None:
    """Raises `BadCheckpoint` when this model cannot be split over `ranks`."""
    heads, kv_heads = checkpoint.heads, checkpoint.kv_heads
    if heads is not None and heads % ranks:
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise BadCheckpoint(
            f"--tp {ranks} does not divide the model's {heads} attention heads; choose one of {', '.join(fitting)}"
        )
    if kv_heads is not None and kv_heads % ranks and ranks % kv_heads:
        raise BadCheckpoint(
            f"--tp {ranks} can neither split nor replicate the model's {kv_heads} KV heads evenly; choose a divisor "
            "or a multiple of it"
        )


def check_data_parallel(checkpoint: Checkpoint, ranks: int) -> None:
    """Raises `BadCheckpoint` when the experts of this model cannot be dealt out to `ranks` in lockstep."""
    if ranks == 1:
        return
    experts = checkpoint.experts
    if experts is None or experts < 2:
        raise BadCheckpoint(
            f"{checkpoint.architecture} has no experts, so data-parallel ranks would share nothing; leave --data-parallel "
            "out and start more engines"
        )
    if experts % ranks:
        fitting = [str(n) for n in range(1, experts + 1) if experts % n == 0]
        raise BadCheckpoint(
            f"--data-parallel {ranks} does not divide the model's {experts} experts; choose one of {', '.join(fitting)}"
        )


def _read_config(path: Path, named: str) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise BadCheckpoint(
            f"{named} is no checkpoint: it has no config.json (Hugging Face format is needed)"
        )
    try:
        config = msgspec.json.decode(file.read_bytes())
    except (msgspec.DecodeError, OSError) as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{file} holds no JSON object; is this a model's config.json?")
    return config


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "unknown"))


def _count(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else None
