"""vLLM's CPU worker, with the one thing that a later pipeline stage lacks when nothing is compiled.

vLLM 0.32 allocates what a stage receives from the one before it (`intermediate_tensors`) in its profiling run, and its CPU
worker leaves that run out in eager mode, so the second stage fails at its first step, with or without a connector.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class StageWorker(CPUWorker):
    def determine_available_memory(self) -> Any:
        runner = self.model_runner
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return super().determine_available_memory()
