"""The words of `interlock serve`: what it can be asked with. Nothing heavy is imported here."""

from __future__ import annotations

import argparse

from interlock.cli import store_peers
from interlock.cli.arguments import (
    Options,
    Parser,
    add_options,
    folder,
    gibibytes,
    gibibytes_or_none,
    name,
    port,
    positive,
    seconds,
)

ENGINE_KINDS = ("vllm", "transformers")
EXAMPLES = """\
examples:
  interlock serve                                    the demo model on two vLLM engines
  interlock serve --engine transformers              the same in a quarter of the time, slower tokens
  interlock serve --engine vllm:1,transformers:2     both kinds, one KV cache
  interlock serve ~/models/Qwen3-0.6B --engines 4    a local checkpoint
  interlock serve --engines 1 --tp 2 -- --max-num-seqs 64
"""


def engine_kinds(text: str) -> list[tuple[str, int | None]]:
    """ "vllm:1,transformers:2" as (kind, number or None where none is named)."""
    found: list[tuple[str, int | None]] = []
    for part in text.split(","):
        kind, colon, number = part.partition(":")
        if kind not in ENGINE_KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is no kind of engine: {' or '.join(ENGINE_KINDS)} is")
        found.append((kind, positive(number) if colon else None))
    return found


OPTIONS: Options = {
    "model": {
        "nargs": "?",
        "metavar": "MODEL",
        "help": "local checkpoint directory; default: the demo model",
    },
    "--engine": {
        "type": engine_kinds,
        "action": "append",
        "metavar": "KIND[:N],…",
        "help": "vllm (the default) or transformers, which starts in seconds; several, with how many of each: "
        "vllm:1,transformers:2",
    },
    "--engines": {"type": positive, "metavar": "N", "help": "engines of that kind (default 2)"},
    "--tp": {
        "type": positive,
        "default": 1,
        "metavar": "N",
        "help": "tensor-parallel ranks of each engine (default 1)",
    },
    "--data-parallel": {
        "type": positive,
        "default": 1,
        "metavar": "N",
        "help": "ranks of each Transformers engine that serve requests of their own and share a mixture-of-experts model's "
        "experts, in lockstep (default 1)",
    },
    "--step-seconds": {
        "type": seconds,
        "metavar": "S",
        "help": "what one step of such ranks has, beside 20 ms a token, until a rank that is late counts as frozen and its group "
        "is started anew: more for large models (default 5)",
    },
    "--host": {
        "default": "127.0.0.1",
        "help": "address to listen on (default 127.0.0.1); others need --api-key",
    },
    "--port": {
        "type": port,
        "default": 8000,
        "help": "HTTP port (default 8000); also names the fleet",
    },
    "--served-model-name": {"type": name, "metavar": "NAME", "help": "what clients call the model"},
    "--store-gib": {
        "type": gibibytes,
        "default": 1.0,
        "metavar": "X",
        "help": "memory of the shared KV cache (default 1 GiB)",
    },
    "--disk": {
        "type": folder,
        "metavar": "DIR",
        "help": "a directory for blocks that leave memory; a restart hits them",
    },
    "--disk-gib": {
        "type": gibibytes,
        "default": 10.0,
        "metavar": "X",
        "help": "its size (default 10 GiB)",
    },
    "--state-dir": {
        "type": folder,
        "metavar": "DIR",
        "help": "a directory for the fleet's state: started again with it, a fleet is what it was told to be last, and a "
        "suspended one has its requests (default: gone with the fleet)",
    },
    "--snapshots-gib": {
        "type": gibibytes_or_none,
        "metavar": "X",
        "help": "disk of each Transformers engine for prefixes of models that cannot share the cache (hybrid, "
        "sliding-window); kept across restarts under ~/.cache/interlock/snapshots (default 2 GiB; 0: none)",
    },
    "--api-key": {
        "metavar": "KEY",
        "help": "asked of every client; default: $INTERLOCK_API_KEY, else none",
    },
}


def add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command; `serve.serve` is what its arguments are given to."""
    serve = commands.add_parser(
        "serve",
        help="start a fleet on this machine",
        description="Starts engines, a shared KV cache and an OpenAI-compatible endpoint on this machine.",
        usage="%(prog)s [MODEL] [options] [-- VLLM ARGS…]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(serve, OPTIONS)
    store_peers.add_serve_options(serve)
