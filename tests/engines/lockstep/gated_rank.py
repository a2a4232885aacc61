"""A rank's process whose steps pass a gate: the test holds it before its forward, and hears when it enters a collective.

Started in place of `interlock.engines.lockstep.rank`; the gate's address is in the environment.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import torch.distributed as distributed
from gatekeeper import GATE

from interlock.engines.lockstep import rank as rank_process
from interlock.engines.lockstep.stepping import LockstepLoop
from interlock.engines.transformers import ranks

FAILS_ON_RANK_1 = "fails-on-rank-1"
"""A checkpoint of this name loads on rank 0 alone."""


class Gate:
    def __init__(self, rank: int) -> None:
        self.rank, self.step, self.said = rank, 0, True
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(os.environ[GATE])

    def _say(self, at: str) -> None:
        self.socket.sendall(json.dumps({"rank": self.rank, "step": self.step, "at": at}).encode() + b"\n")

    def pass_through(self, step: int) -> None:
        self.step, self.said = step, False
        self._say("gate")
        assert self.socket.recv(1) == b"!", "the test is gone"

    def enter(self) -> None:
        """Once a step, right before its first collective."""
        if not self.said:
            self.said = True
            self._say("inside")


def main() -> int:
    config = json.loads(sys.argv[1])
    gate = Gate(config["engine"]["expert_group"]["rank"])
    step, meet = LockstepLoop._step, distributed.all_to_all_single

    def gated(self: LockstepLoop) -> None:
        assert self.seat.step is not None
        gate.pass_through(self.seat.step)
        step(self)

    def meeting(*arguments: Any, **named: Any) -> Any:
        gate.enter()
        return meet(*arguments, **named)

    load = ranks.load_model

    def loaded(config: Any, path: str) -> Any:
        if path.endswith(FAILS_ON_RANK_1) and gate.rank == 1:
            raise OSError("its disk is gone")
        return load(config, path)

    ranks.load_model = loaded
    LockstepLoop._step = gated  # type: ignore[method-assign]
    distributed.all_to_all_single = meeting
    return rank_process.main()


if __name__ == "__main__":
    rank_process.exit_now(main())
