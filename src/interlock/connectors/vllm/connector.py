"""`InterlockConnector`: vLLM's interface on one side, our two halves on the other, and nothing else.

vLLM builds one in its scheduler and one in each worker. Used as

    kv_connector="InterlockConnector", kv_connector_module_path="interlock.connectors.vllm", kv_role="kv_both",
    kv_load_failure_policy="recompute", kv_connector_extra_config={"store": "unix:/path", "engine": "name", ...}

Written against vLLM 0.32 (KVConnectorBase_V1).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from interlock.connectors.vllm.config import EngineShape, parse_config, shape_of
from interlock.connectors.vllm.keys import Salts
from interlock.connectors.vllm.life import engine_incarnation
from interlock.connectors.vllm.metadata import RankNews, StepTasks
from interlock.connectors.vllm.movers import mover_for
from interlock.connectors.vllm.packing import packing_of
from interlock.connectors.vllm.scheduler import SchedulerSide
from interlock.connectors.vllm.worker import WorkerSide
from interlock.host.blocking import BlockingHost
from interlock.host.owner import end_with
from interlock.store.client import StoreClient
from interlock.store.keys import ModelSalt
from interlock.store.models import checkpoint_digest, model_identity
from interlock.wire.identity import Identity
from interlock.wire.store_messages import Attach

logger = init_logger("vllm.interlock")


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's work for every rank, in vLLM's envelope."""

    tasks: StepTasks


@dataclass
class NewsMetadata(KVConnectorWorkerMetadata):
    """A rank's news in vLLM's envelope; vLLM aggregates those of one step."""

    news: RankNews

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """vLLM's: what two workers said, as one."""
        assert isinstance(other, NewsMetadata)
        return NewsMetadata(self.news.merged(other.news))


class InterlockConnector(KVConnectorBase_V1):
    """Shares this engine's KV blocks with every engine at the same store node.

    Raises `UnsupportedEngineError` or `UnknownModelError` at construction, saying what to change; nothing afterwards.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = parse_config(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        if self.config.owner_pid is not None:
            end_with(self.config.owner_pid)
        self.shape = shape_of(vllm_config, kv_cache_config, self.config)
        self.host = BlockingHost()
        self.incarnation = engine_incarnation(self.host, self.config.state, self.shape.name, self.shape.life)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = self._make_scheduler()
        else:
            stage, tensor = get_pp_group().rank_in_group, get_tensor_model_parallel_rank()
            self.worker = self._make_worker(stage * self.shape.tensor_ranks + tensor)

    def _make_scheduler(self) -> SchedulerSide:
        client = self._client(None)
        client.start()
        return SchedulerSide(self.shape, self._salts(), client, weights_in_salt=self.config.weights_in_salt)

    def _make_worker(self, rank: int) -> WorkerSide:
        order = packing_of(self.shape.layout).order
        return WorkerSide(
            self.shape,
            rank,
            self._client(rank),
            make_mover=lambda kv, layout, head_start: mover_for(kv, layout, head_start, order),
        )

    def _salts(self) -> Salts:
        files, cache = self.host.files, self.config.state / "digests.json"
        model = self.config.model_id or model_identity(
            self.shape.model, self.shape.revision, files=files, cache=cache
        )
        packing = packing_of(self.shape.layout).name
        logger.info("Interlock shares KV of %s, model %s", self.shape.layout, model)
        return Salts(
            engine=ModelSalt(
                model=model,
                layout=self.shape.layout,
                tenant=self.config.tenant,
                variant=(*self.shape.variant, ("kv_packing", packing)) if packing else self.shape.variant,
            ),
            adapter_identity=lambda path: checkpoint_digest(path, files=files, cache=cache),
        )

    def _client(self, rank: int | None) -> StoreClient:
        shape: EngineShape = self.shape
        part = "scheduler" if rank is None else f"rank{rank}"
        attach = Attach(
            engine=shape.name,
            engine_incarnation=self.incarnation,
            rank=rank,
            ranks=shape.ranks,
            layout=shape.layout,
            shard=None if rank is None else shape.shard(rank),
        )
        me = Identity(f"{shape.name}/{part}", self.incarnation, os.urandom(16))
        return StoreClient(
            self.config.store,
            me,
            attach,
            tenant=self.config.tenant,
            lookup_timeout_s=self.config.lookup_seconds,
        )

    @property
    def client(self) -> StoreClient:
        """This half's access to the store: whether it is attached, and why not (`ready`, `last_error`, `counts()`)."""
        return self._scheduler.client if self.scheduler is not None else self._worker.client

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later, nothing else."""
        return False

    # --- scheduler -----------------------------------------------------------------------------------------------

    @property
    def _scheduler(self) -> SchedulerSide:
        assert self.scheduler is not None, "this connector was made for a worker"
        return self.scheduler

    def on_new_request(self, request: Any) -> None:
        self._scheduler.track(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM's: tokens that can be loaded beyond `num_computed_tokens`, and whether that takes until later; None: ask again."""
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM's: the request has its blocks; what was found for it is loaded into them."""
        block_ids = blocks.get_block_ids()[0] if num_external_tokens else []
        self._scheduler.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """vLLM's: what the ranks are to load and save in this step."""
        return StepMetadata(self._scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """vLLM's: what the ranks said became of their loads."""
        metadata = connector_output.kv_connector_worker_meta
        news = metadata.news if isinstance(metadata, NewsMetadata) else None
        self._scheduler.heard(
            connector_output.finished_recving or (), connector_output.invalid_block_ids, news
        )

    def request_finished(
        self,
        request: Any,
        block_ids: list[int],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are free at once: saves ended inside their step, and a load in flight vLLM itself waits for."""
        self._scheduler.forget(request.request_id)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Keeps the engine stepping, a paused one too, until no load touches its KV any more."""
        return self._scheduler.loading

    def reset_cache(self) -> bool:
        """Forgets what this engine looked up; what is shared belongs to others too (clearing it is the store's verb)."""
        self._scheduler.forget_lookups()
        return True

    # --- worker --------------------------------------------------------------------------------------------------

    @property
    def _worker(self) -> WorkerSide:
        assert self.worker is not None, "this connector was made for the scheduler"
        return self.worker

    @property
    def _tasks(self) -> StepTasks:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.tasks

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """vLLM's: the KV tensors of this rank. Raises `UnknownTensorsError` for what the layout does not describe."""
        scales = self._scales(list(kv_caches)) if self.shape.layout.scales else None
        self._worker.register(kv_caches, scales)

    def _scales(self, names: list[str]) -> dict[str, list[float]]:
        """What K and V were divided by, per layer, as this rank's attention has it once the weights are loaded."""
        layers = self._vllm_config.compilation_config.static_forward_context
        return {
            name: [float(layers[name]._k_scale), float(layers[name]._v_scale)]
            for name in names
            if hasattr(layers.get(name), "_k_scale")
        }

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Nothing to end: a victim's blocks are read only inside `wait_for_save`, which returned before this call."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """vLLM's: begins this step's loads, in another thread."""
        self._worker.start_loads(self._tasks.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No step computes from a block that is still being loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers are saved together in `wait_for_save`."""

    def wait_for_save(self) -> None:
        """vLLM's: on return no KV block that is saved is read any more (the source fence)."""
        self._worker.save(self._tasks.saves)

    def get_finished(
        self,
        finished_req_ids: set[str],  # noqa: ARG002
    ) -> tuple[set[str] | None, set[str] | None]:
        """vLLM's: requests whose blocks nothing here touches any more, each told once."""
        return None, self._worker.take_released(idle=self._tasks.idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """vLLM's: blocks that were not loaded and have to be computed."""
        return self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """vLLM's: what this rank tells the scheduler's side."""
        news = self._worker.take_news()
        return NewsMetadata(news) if news is not None else None

    def shutdown(self) -> None:
        """vLLM's: ends threads and connections; slots not reported on wait for this process's exit."""
        if self.worker is not None:
            self.worker.close()
        if self.scheduler is not None:
            self.scheduler.close()
