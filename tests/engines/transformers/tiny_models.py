"""Families of models at a size that computes in milliseconds, and an engine over one of them that is stepped by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from interlock.core.sampling import Sampling
from interlock.engines.base import Progress, Work
from interlock.engines.transformers.engine import TransformersEngine
from interlock.engines.transformers.setup import TransformersConfig
from interlock.host.real import RealHost

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCABULARY = 128
TOKENS = 20
PROMPT_LENGTHS = (5, 40, 17, 70, 33, 1)
"""Shorter and longer than the windows (8), the blocks (16) and the steps (32 to 48)."""

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that the next token depends on the whole context: small weights repeat one token for ever.
    "initializer_range": 0.5,
}


def _config(family: str) -> Any:
    t, base = transformers, _BASE
    four = {**base, "num_hidden_layers": 4}
    match family:
        case "llama":
            return t.LlamaConfig(**base)
        case "qwen2":
            return t.Qwen2Config(**base)
        case "qwen3":
            return t.Qwen3Config(**base, head_dim=8)
        case "mixtral":
            longer = {**base, "max_position_embeddings": 2048}
            return t.MixtralConfig(**longer, num_local_experts=4, num_experts_per_tok=2)
        case "gemma2":
            return t.Gemma2Config(
                **base, head_dim=8, sliding_window=8, tie_word_embeddings=False, query_pre_attn_scalar=8
            )
        case "gemma3":
            return t.Gemma3TextConfig(
                **four,
                head_dim=8,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
                tie_word_embeddings=False,
                query_pre_attn_scalar=8,
            )
        case "mamba2":
            return t.Mamba2Config(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8,
                n_groups=1, expand=2, chunk_size=4, initializer_range=0.5,
            )  # fmt: skip
        case "falcon_h1":
            return t.FalconH1Config(
                **base, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4
            )
        case "jamba":
            return t.JambaConfig(
                **base, attn_layer_period=2, attn_layer_offset=1, num_experts=2, expert_layer_period=2,
                expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
            )  # fmt: skip
        case "qwen3_next":
            return t.Qwen3NextConfig(
                **four, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
            )  # fmt: skip
        case "deepseek_v3":
            return t.DeepseekV3Config(
                **{**base, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4,
                num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
                v_head_dim=8, qk_nope_head_dim=8, first_k_dense_replace=1, n_shared_experts=1,
            )  # fmt: skip
        case "rwkv":
            return t.RwkvConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
            )
        case "recurrent_gemma":
            return t.RecurrentGemmaConfig(
                **{**base, "num_hidden_layers": 3}, attention_window_size=8, lru_width=32
            )
    raise KeyError(family)


class Library:
    """Checkpoints by (family, seed), and greedy continuations by `generate`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[tuple[str, int], Any] = {}

    def model(self, family: str, seed: int = 0) -> Any:
        if (family, seed) not in self._models:
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(_config(family)).eval()
            model.config.eos_token_id = model.generation_config.eos_token_id = None
            model.save_pretrained(self.path(family, seed))
            self._models[family, seed] = model
        return self._models[family, seed]

    def path(self, family: str, seed: int = 0) -> Path:
        return self._folder / f"{family}-{seed}"

    @torch.no_grad()
    def greedy(self, family: str, prompt: list[int], tokens: int = TOKENS, seed: int = 0) -> list[int]:
        model = self.model(family, seed)
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )  # fmt: skip
        return list(made[0, len(prompt) :].tolist())

    @torch.no_grad()
    def logits(self, family: str, tokens: list[int]) -> torch.Tensor:
        """[vocabulary] after these tokens."""
        return self.model(family)(torch.tensor([tokens])).logits[0, -1].float()


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def work(key: str, prompt: list[int], **sampling: Any) -> Work:
    chosen = {"max_tokens": TOKENS, "temperature": 0.0, **sampling}
    return Work.of(key, prompt, Sampling(**chosen), "")


class Heard:
    """All that one request's iterator yielded."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []
        self.last: Progress | None = None

    @property
    def finish(self) -> str:
        return self.last.finish if self.last is not None else ""

    async def listen(self, stream: Any) -> Heard:
        async for progress in stream:
            self.tokens += progress.tokens
            self.logprobs += progress.logprobs
            self.last = progress
        return self


class Bench:
    """A started engine. `gated`: it steps only when `step` says so."""

    def __init__(
        self, library: Library, family: str, folder: Path, options: dict[str, Any], *, gated: bool
    ) -> None:
        library.model(family)
        folder.mkdir()
        (folder / "scratch").mkdir()
        checkpoint = str(library.path(family))
        chosen: dict[str, Any] = {"model": checkpoint, "step_tokens": 32, "block_tokens": 16, **options}
        self.engine = TransformersEngine(
            RealHost(),
            TransformersConfig(
                model_id=family, name=folder.name, state_dir=str(folder / "state"),
                scratch_dir=str(folder / "scratch"), log=str(folder / "log"), **chosen,
            ),
        )  # fmt: skip
        self._gated = gated
        self._permits = 0

    async def start(self) -> None:
        self.capabilities = await self.engine.start()
        loop = self.loop
        if not self._gated:
            return
        step = loop._step

        def counted() -> None:
            self._permits -= 1
            step()

        loop.gate = lambda: self._permits > 0
        loop._step = counted

    @property
    def loop(self) -> Any:
        return self.engine._loop

    async def step(self, count: int = 1) -> None:
        """So many steps; each is over when this returns."""
        for _ in range(count):

            def permit() -> None:
                self._permits = 1

            await self.engine._ask(permit)
            await self.engine._ask(lambda: None)

    async def run(self, *works: Work) -> list[Heard]:
        import asyncio

        return list(await asyncio.gather(*(Heard().listen(self.engine.generate(w)) for w in works)))
