"""A rank's process for `lockstep.py`: as the engine's own, but that ranks agree on each step as the side named says.

`grants`: by the leader's grants, unchanged. `reduction`: before each step an all-reduce over gloo, the maximum of (tokens wanted, pause
asked), as Megatron's coordinator and vLLM's data-parallel ranks agree. `none`: not at all; both ranks are given equally many
steps, so they meet in the experts' all-to-alls by themselves.

A null step (`STEP_MS` below 0) computes nothing and meets nobody: what is left is the engine's loop and the agreement.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as distributed

from interlock.engines.lockstep import rank as rank_process
from interlock.engines.lockstep.stepping import LockstepLoop, OneForward
from interlock.engines.transformers.computer import Computer
from interlock.engines.transformers.loop import Loop
from interlock.engines.transformers.plans import Step

SIDE, STEP_MS = "LOCKSTEP_BENCH_SIDE", "LOCKSTEP_BENCH_STEP_MS"


def without_grants(side: str) -> None:
    def step(self: LockstepLoop) -> None:
        if side == "reduction":
            wanted = torch.tensor([1, int(self.paused)])
            distributed.all_reduce(wanted, op=distributed.ReduceOp.MAX)
            assert int(wanted[0]) == 1
        scheduler = self.scheduler
        assert isinstance(scheduler, OneForward)
        scheduler.tokens_max = 1 << 30
        Loop._step(self)

    def wants_none(_: LockstepLoop) -> bool:
        return False

    patched: Any = LockstepLoop
    patched._step, patched._look, patched._seconds_to_step = step, wants_none, Loop._seconds_to_step


def slower(seconds: float) -> None:
    """Steps of a larger model: the thread sleeps, as it does while an accelerator computes."""
    patched: Any = LockstepLoop
    step = patched._step

    def slept(self: LockstepLoop) -> None:
        time.sleep(seconds)
        step(self)

    patched._step = slept


def null_steps() -> None:
    """Every request's next token is the same, and no model is asked for it."""
    logits: dict[int, torch.Tensor] = {}

    def step(self: Computer, step: Step) -> dict[str, torch.Tensor]:
        row = logits.setdefault(0, torch.zeros(self.model.vocabulary))
        self.forget(step.drops)
        answered = [chunk.key for chunk in step.chunks if chunk.answer] + [key for key, _ in step.decode]
        return dict.fromkeys(answered, row)

    def nothing(_: Computer) -> None:
        pass

    patched: Any = Computer
    patched.step, patched.empty_forward = step, nothing


if __name__ == "__main__":
    if os.environ[SIDE] != "grants":
        without_grants(os.environ[SIDE])
    step_ms = float(os.environ[STEP_MS])
    if step_ms > 0:
        slower(step_ms / 1e3)
    elif step_ms < 0:
        null_steps()
    rank_process.exit_now(rank_process.main())
