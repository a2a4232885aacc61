"""Each rank keeps its part of the experts; tokens travel to them and back in every layer that has some.

The library's own token dispatch ("ep_dispatch_experts", transformers 5.19): counts, tokens and results by three all-to-alls a
layer, with any number of tokens on each rank. Its public entry wants FSDP beside it, which gathers weights in every forward, so
its own step for experts is called alone: attention and the rest stay whole on each rank (docs/decisions/018).
"""

from __future__ import annotations

import logging
from typing import Any

from interlock.engines.base import EngineStartError

_log = logging.getLogger(__name__)
DISPATCH = "ep_dispatch_experts"


def spread_experts(model: Any, ranks: int) -> Any:
    """The model with this rank's experts only. The process group is there; nothing meets before the first forward.

    Raises `EngineStartError` for a model without experts, or whose experts cannot be dealt out evenly.
    """
    from torch import distributed
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.tensor_parallel import apply_expert_parallelism

    plan = model.ep_plan
    if DISPATCH not in plan.values():
        raise EngineStartError(
            f"{type(model).__name__} has no experts that the library spreads over ranks with requests of their own; "
            "leave --data-parallel out and start more engines"
        )
    mesh = DeviceMesh.from_group(distributed.group.WORLD, "cpu", mesh_dim_names=("ep",))
    try:
        spread = apply_expert_parallelism(model, mesh, None, plan)
    except ValueError as error:
        raise EngineStartError(f"--data-parallel {ranks}: {error}") from error
    held = [
        module.num_experts for module in spread.modules() if getattr(module, "_is_expert_parallel", False)
    ]
    if held:
        _log.info("this rank holds %d of the experts in each of %d layers", held[0], len(held))
    else:
        raise EngineStartError(
            f"no layer of {type(model).__name__} has experts; leave --data-parallel out and start more engines"
        )
    return spread
