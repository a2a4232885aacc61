"""The command line: what there is to say, checked before anything heavy is imported.

Exit status: 0 done, 1 it failed, 2 it was asked wrongly, 3 it was refused, 4 it did not get there in time, 130 interrupted.
What failed is one sentence on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from interlock import __version__
from interlock.cli.arguments import Parser
from interlock.cli.ctl_words import VERBS, add_verbs
from interlock.cli.errors import Failure, Usage
from interlock.cli.serve_words import add_serve


def make_parser() -> Parser:
    """Knows `serve` and `ctl` whole, and of the others the name alone: their own modules read their arguments."""
    parser = Parser(prog="interlock", description="Runs a fleet of LLM engines as one service.")
    parser.add_argument("--version", action="version", version=f"interlock {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    add_serve(commands)
    _add_ctl(commands)
    _add_others(commands)
    return parser


def _add_ctl(commands: argparse._SubParsersAction[Parser]) -> None:
    ctl = commands.add_parser(
        "ctl",
        help="status, pause, unpause, update, suspend, resume, drain, stop, start, events of a running fleet",
        description="One question or one command to a running fleet. Exit status: 0 done, 1 failed, 2 asked wrongly, "
        "3 refused (nothing was changed), 4 not there in time.",
    )
    add_verbs(ctl)


def _add_others(commands: argparse._SubParsersAction[Parser]) -> None:
    for command, words in OTHERS.items():
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
    """The whole command line, `sys.argv` where no arguments are given. Returns the exit status (see above); `--help` and
    `--version` leave by `SystemExit`."""
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
    except BrokenPipeError:  # nobody reads what we print, as in `… | head`
        with contextlib.suppress(OSError, ValueError):  # what is left in the buffer goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
            raise Usage(f"ctl needs one of: {', '.join(VERBS)}")
        from interlock.cli.ctl import ctl

        return ctl(parsed)
    raise Usage(f"say what to do: {', '.join(['serve', 'ctl', *OTHERS])}; see interlock --help")


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in given:
        return given, []
    at = given.index("--")
    return given[:at], given[at + 1 :]


def _run_other(command: str, rest: list[str]) -> int:
    """A command whose module brings its own arguments: `add_parser(commands)` and `run(arguments) -> status`."""
    import importlib

    module = importlib.import_module(f"interlock.cli.{command}")
    parser = Parser(prog="interlock")
    module.add_parser(parser.add_subparsers(parser_class=Parser))
    return int(module.run(parser.parse_args([command, *rest])))
