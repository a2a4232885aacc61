"""A store node in a process of its own and vLLM engines in this one, for the connector's tests and benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from interlock.core.layouts import shard_of_rank
from interlock.host.blocking import BlockingHost, monotonic_s, sleep_s
from interlock.store.client import StoreClient
from interlock.store.keys import KeyChain
from interlock.testing.equality import Comparison, Completion, compare
from interlock.wire.blocking import BlockingChannel
from interlock.wire.identity import passing_identity
from interlock.wire.store_messages import Attach, GetStats, NodeMessage, Stats

PATIENCE_S = 20.0
BLOCK_TOKENS = 32
PROMPT_TOKENS = 300
FULL_BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
PROGRAM = (
    "import asyncio, sys; from pathlib import Path; from interlock.host.real import RealHost; "
    "from interlock.store.main import StoreConfig, run_node; "
    "asyncio.run(run_node(RealHost(), StoreConfig(address=sys.argv[1], state_dir=Path(sys.argv[2]), "
    "slab_bytes=int(sys.argv[3]), disk=Path(sys.argv[4]) if sys.argv[4] else None, disk_bytes=1 << 29)))"
)


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, 512, tokens)]


PROMPTS = [prompt(seed) for seed in range(8)]


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Polls a state that only another process can reach; the deadline is the test's failure."""
    deadline_s = monotonic_s() + PATIENCE_S
    while monotonic_s() < deadline_s:
        if value := condition():
            return value
        sleep_s(0.01)
    raise AssertionError(f"never came true: {what}")


class Store:
    """A node as the supervisor starts it; ends with this process's end of the pipe."""

    def __init__(self, directory: Path, slab_bytes: int = 256 << 20, disk: Path | None = None) -> None:
        self.directory, self._slab_bytes, self._disk = directory, slab_bytes, disk
        self.address = f"unix:{directory}/store.sock"
        self._state = directory / "node"
        self._state.mkdir(mode=0o700, exist_ok=True)
        self.start()

    def start(self) -> None:
        read_fd, self._write_fd = os.pipe()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROGRAM,
                self.address,
                str(self._state),
                str(self._slab_bytes),
                str(self._disk or ""),
            ],
            env={**os.environ, "INTERLOCK_PARENT_FD": str(read_fd)},
            pass_fds=(read_fd,),
        )
        os.close(read_fd)
        eventually(self._answers, "the store node answers")

    def _answers(self) -> bool:
        try:
            return bool(self.stats())
        except (OSError, ConnectionError):
            assert self.process.poll() is None, "the store node did not start"
            return False

    def stats(self) -> dict[str, float]:
        channel = BlockingChannel.connect(
            self.address,
            me=passing_identity(BlockingHost(), "test"),
            role="test",
            accept=NodeMessage,
            timeout_s=PATIENCE_S,
        )
        try:
            answer = channel.request(GetStats(), PATIENCE_S)
            assert isinstance(answer, Stats)
            return answer.values
        finally:
            channel.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self._write_fd)

    def close(self) -> None:
        if self.process.poll() is None:
            os.close(self._write_fd)
            self.process.wait(PATIENCE_S)


class Engine:
    """One vLLM engine: scheduler in this process, ranks too or (TP > 1) in their own."""

    def __init__(
        self,
        model: Path,
        *,
        store: str | None = None,
        state: Path | None = None,
        name: str = "engine",
        connector: tuple[str, str] = ("InterlockConnector", "interlock.connectors.vllm"),
        extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from vllm import LLM

        if store is not None:
            options["kv_transfer_config"] = {
                "kv_connector": connector[0],
                "kv_connector_module_path": connector[1],
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "store": store,
                    "engine": name,
                    "state_dir": str(state),
                    # A machine that runs tests beside each other must not turn hits into misses.
                    "lookup_seconds": 1.0,
                    **(extra or {}),
                },
            }
        self.llm: Any = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK_TOKENS,
            **{
                "max_model_len": 1024,
                "max_num_batched_tokens": 1024,
                "kv_cache_memory_bytes": 128 << 20,
                "disable_log_stats": True,
                **options,
            },
        )
        self.core: Any = self.llm.llm_engine.engine_core.engine_core
        self.scheduler: Any = self.core.scheduler
        self.connector: Any = self.scheduler.connector
        self.worker: Any = None
        if store is not None:
            assert self.connector.client.wait_ready(PATIENCE_S), self.connector.client.last_error
            if self.connector.shape.ranks == 1:
                from vllm.distributed.kv_transfer import get_kv_transfer_group

                self.worker = get_kv_transfer_group()
                assert self.worker.client.wait_ready(PATIENCE_S), self.worker.client.last_error

    @property
    def counts(self) -> dict[str, int]:
        return self.connector.scheduler.counts

    def run(self, prompts: Sequence[Sequence[int]], tokens: int = 12, **sampling: Any) -> list[Completion]:
        """Greedy completions with the log-probabilities that equality needs."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            self.sampling(tokens, **sampling),
            use_tqdm=False,
        )
        self.cached = [output.num_cached_tokens for output in outputs]
        return [completion(output.outputs[0]) for output in outputs]

    @staticmethod
    def sampling(tokens: int, **sampling: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0, max_tokens=tokens, logprobs=2, detokenize=False, ignore_eos=True, **sampling
        )

    def add(self, request: str, prompt: Sequence[int], tokens: int = 12) -> None:
        self.llm.llm_engine.add_request(request, {"prompt_token_ids": list(prompt)}, self.sampling(tokens))

    def step(self) -> list[Any]:
        return self.llm.llm_engine.step()

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        """The keys of a prompt's full blocks on this engine."""
        request = SimpleNamespace(
            prompt_token_ids=list(prompt),
            prompt_embeds=None,
            pooling_params=None,
            resumable=False,
            lora_request=None,
            mm_features=[],
            cache_salt=None,
        )
        salt = self.connector.scheduler._salts.of(request)
        return list(KeyChain(salt, BLOCK_TOKENS).upto(len(prompt) // BLOCK_TOKENS, prompt))

    def empty_own_cache(self) -> None:
        assert self.llm.reset_prefix_cache()

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def close(self) -> None:
        """Idempotent. Until then no second engine: one process has one worker group."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.core = self.scheduler = self.connector = self.worker = None
            cleanup_dist_env_and_memory()


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Engine]:
    running = Engine(model, **options)
    try:
        yield running
    finally:
        running.close()


def completion(output: Any) -> Completion:
    logprobs, margins = [], []
    for token, alternatives in zip(output.token_ids, output.logprobs, strict=True):
        logprobs.append(alternatives[token].logprob)
        best = sorted((entry.logprob for entry in alternatives.values()), reverse=True)
        margins.append(best[0] - best[1])
    return Completion(list(output.token_ids), logprobs, margins)


def comparisons(references: Sequence[Completion], others: Sequence[Completion]) -> list[Comparison]:
    return [
        compare(f"prompt {n}", reference, other)
        for n, (reference, other) in enumerate(zip(references, others, strict=True))
    ]


def assert_equal(references: Sequence[Completion], others: Sequence[Completion]) -> None:
    different = [str(one) for one in comparisons(references, others) if not one.equal]
    assert not different, different


class Probe:
    """A rank of nobody's engine: sees the slab, finds blocks, and spoils them."""

    def __init__(self, store: Store, layout: Any) -> None:
        me = passing_identity(BlockingHost(), "probe")
        shard = shard_of_rank(0, 1, layers=layout.layers, heads=layout.heads)
        self.layout = layout
        attach = Attach(me.name, me.incarnation, 0, 1, layout, shard)
        self.client = StoreClient(store.address, me, attach, lookup_timeout_s=PATIENCE_S)
        assert self.client.wait_ready(PATIENCE_S), self.client.last_error

    def stored(self, keys: Sequence[bytes]) -> list[Any]:
        found = self.client.match(keys)
        assert found is not None
        self._slab = self.client.slab_of(found.slab)
        return found.locations

    def wait_stored(self, keys: Sequence[bytes]) -> None:
        eventually(lambda: len(self.stored(keys)) == len(keys), f"{len(keys)} blocks are published")

    def flip_byte(self, keys: Sequence[bytes], block: int, head: int) -> None:
        """Flips one bit of one element of that head of that block, where it lies."""
        location = self.stored(keys)[block]
        self._slab.view[self._slab.offset(location.slot) + head * self.layout.head_bytes + 3] ^= 0x20

    def flip_block(self, keys: Sequence[bytes], block: int) -> None:
        """Flips the sign of every float32 of that block; done twice it is undone."""
        location = self.stored(keys)[block]
        bytes_ = np.frombuffer(self._slab.block(location.slot), dtype=np.uint8)
        bytes_[3::4] ^= 0x80

    def close(self) -> None:
        self.client.close()
