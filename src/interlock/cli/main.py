"""The command line: what there is to say, checked before anything heavy is imported.

Exit status: 0 done, 1 it failed, 2 it was asked wrongly, 3 it was refused, 4 it did not get there in time, 130 interrupted.
What failed is one sentence on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from interlock import __version__
from interlock.cli import store_peers
from interlock.cli.errors import Failure, Usage

ENGINE_KINDS = ("vllm", "transformers")
SERVE_EXAMPLES = """\
examples:
  interlock serve                                    the demo model on two vLLM engines
  interlock serve --engine transformers              the same in a quarter of the time, slower tokens
  interlock serve --engine vllm:1,transformers:2     both kinds, one KV cache
  interlock serve ~/models/Qwen3-0.6B --engines 4    a local checkpoint
  interlock serve --engines 1 --tp 2 -- --max-num-seqs 64
"""


class Parser(argparse.ArgumentParser):
    """Wrong usage is one sentence and a pointer, not a page."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise Usage(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 0 < value <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1024")
    return value


def engine_kinds(text: str) -> list[tuple[str, int | None]]:
    """ "vllm:1,transformers:2" as (kind, number or None where none is named)."""
    found: list[tuple[str, int | None]] = []
    for part in text.split(","):
        kind, colon, number = part.partition(":")
        if kind not in ENGINE_KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is no kind of engine: {' or '.join(ENGINE_KINDS)} is")
        found.append((kind, positive(number) if colon else None))
    return found


def port(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 0 < value < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 3600.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, at most 3600")
    return value


def gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 16384.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB above 0")
    return value


def gibibytes_or_none(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else gibibytes(text)


def name(text: str) -> str:
    if not 0 < len(text) <= 128 or not text.isprintable():
        raise argparse.ArgumentTypeError("a name has 1 to 128 printable characters")
    return text


def make_parser() -> Parser:
    parser = Parser(
        prog="interlock", description="Runs a fleet of LLM engines as one service.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"interlock {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_serve(commands)
    _add_ctl(commands)
    _add_others(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="start a fleet on this machine",
        description="Starts engines, a shared KV cache and an OpenAI-compatible endpoint on this machine.",
        usage="%(prog)s [MODEL] [options] [-- VLLM ARGS…]",
        epilog=SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.add_argument(
        "model", nargs="?", metavar="MODEL", help="local checkpoint directory; default: the demo model"
    )
    serve.add_argument(
        "--engine",
        type=engine_kinds,
        action="append",
        metavar="KIND[:N],…",
        help="vllm (the default) or transformers, which starts in seconds; several, with how many of each: "
        "vllm:1,transformers:2",
    )
    serve.add_argument("--engines", type=positive, metavar="N", help="engines of that kind (default 2)")
    serve.add_argument(
        "--tp", type=positive, default=1, metavar="N", help="tensor-parallel ranks of each engine (default 1)"
    )
    serve.add_argument(
        "--data-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="ranks of each Transformers engine that serve requests of their own and share a mixture-of-experts model's "
        "experts, in lockstep (default 1)",
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1); others need --api-key"
    )
    serve.add_argument(
        "--port", type=port, default=8000, help="HTTP port (default 8000); also names the fleet"
    )
    serve.add_argument("--served-model-name", type=name, metavar="NAME", help="what clients call the model")
    serve.add_argument(
        "--store-gib",
        type=gibibytes,
        default=1.0,
        metavar="X",
        help="memory of the shared KV cache (default 1 GiB)",
    )
    serve.add_argument(
        "--disk",
        type=Path,
        metavar="DIR",
        help="a directory for blocks that leave memory; a restart hits them",
    )
    serve.add_argument(
        "--disk-gib", type=gibibytes, default=10.0, metavar="X", help="its size (default 10 GiB)"
    )
    serve.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="a directory for the fleet's state: started again with it, a fleet is what it was told to be last, and a suspended one "
        "has its requests (default: gone with the fleet)",
    )
    serve.add_argument(
        "--snapshots-gib",
        type=gibibytes_or_none,
        metavar="X",
        help="disk of each Transformers engine for prefixes of models that cannot share the cache (hybrid, "
        "sliding-window); kept across restarts under ~/.cache/interlock/snapshots (default 2 GiB; 0: none)",
    )
    serve.add_argument(
        "--api-key", metavar="KEY", help="asked of every client; default: $INTERLOCK_API_KEY, else none"
    )
    store_peers.add_serve_options(serve)


def _add_ctl(commands: argparse._SubParsersAction[Parser]) -> None:
    from interlock.cli.ctl_words import add_verbs

    ctl = commands.add_parser(
        "ctl",
        help="status, pause, unpause, update, suspend, resume, drain, stop, events of a running fleet",
        description="One question or one command to a running fleet. Exit status: 0 done, 1 failed, 2 asked wrongly, "
        "3 refused (nothing was changed), 4 not there in time.",
        allow_abbrev=False,
    )
    common = Parser(add_help=False)
    common.add_argument("--port", type=port, default=8000, help="HTTP port of the fleet (default 8000)")
    common.add_argument(
        "--json", action="store_true", help="answer as JSON on standard output, one object a line"
    )
    common.add_argument(
        "--timeout", type=seconds, default=60.0, metavar="S", help="seconds to wait (default 60)"
    )
    add_verbs(ctl.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser), common, name)


def _add_others(commands: argparse._SubParsersAction[Parser]) -> None:
    for command, words in OTHERS.items():
        # Their own modules read their arguments: they know more than this one should import.
        commands.add_parser(command, help=words, add_help=False)


OTHERS = {
    "attach": "make a running vLLM server a member of a fleet, by its URL",
    "transfer": "transfer engines by hand: serve memory, ping, explain, bench",
    "demo": "show reuse, pause, and an engine's death on a running fleet, and check every token",
    "store": "a KV store node by itself, for plain vLLM engines",
    "snapshots": "list, show, verify and remove the snapshots of a directory",
    "explore": "walk every interleaving of a protocol",
    "simulate": "run whole fleets on a simulated machine, every fault from one seed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except Usage as error:
        print(f"interlock: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"interlock: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


def _run(given: list[str]) -> int:
    if given[:1] == ["_process"]:
        from interlock.cli.processes import run_process

        run_process(given[1:])
    if given[:1] and given[0] in OTHERS:
        return _run_other(given[0], given[1:])
    own, engine_arguments = _split(given)
    parsed = make_parser().parse_args(own)
    if parsed.command == "serve":
        from interlock.cli.serve import serve

        return serve(parsed, engine_arguments)
    if engine_arguments:
        raise Usage("arguments after -- are for `interlock serve` only")
    if parsed.command == "ctl":
        if parsed.verb is None:
            from interlock.cli.ctl_words import VERBS

            raise Usage(f"ctl needs one of: {', '.join(VERBS)}")
        from interlock.cli.ctl import ctl

        return ctl(parsed)
    raise Usage("say what to do: serve, ctl, attach, demo, store, explore or simulate; see interlock --help")


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in given:
        return given, []
    at = given.index("--")
    return given[:at], given[at + 1 :]


def _run_other(command: str, rest: list[str]) -> int:
    """A command whose module brings its own arguments: `add_parser(commands)` and `run(arguments) -> status`."""
    import importlib

    try:
        module = importlib.import_module(f"interlock.cli.{command}")
    except ModuleNotFoundError as error:
        if error.name == f"interlock.cli.{command}":
            raise Failure(f"this build has no `{command}`") from error
        raise
    parser = Parser(prog="interlock", allow_abbrev=False)
    module.add_parser(parser.add_subparsers(parser_class=Parser))
    return int(module.run(parser.parse_args([command, *rest])))
