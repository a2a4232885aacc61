"""The words of `interlock ctl`: its verbs and what each can be asked with. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interlock.cli.main import Parser

STATES = ("RUNNING", "PAUSED", "SUSPENDED", "STOPPED")
COMMANDS = ("pause", "unpause", "update", "suspend", "resume", "drain", "stop", "start")
VERBS = ("status", *COMMANDS, "command", "events", "metrics", "forget")
AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
AGE_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def since(text: str) -> float | int:
    """An event's number as int, or an age in seconds as float."""
    if text.isdecimal():
        return int(text)
    found = AGE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an event's number nor an age as 90s, 10m, 2h")
    return float(found[1]) * AGE_SECONDS[found[2]]


def add_verbs(verbs: argparse._SubParsersAction[Parser], common: Parser, name: Callable[[str], str]) -> None:
    """`common`: what every verb can be asked with; `name`: a checked word of an operator."""

    def verb(word: str, help_text: str, *more: Parser) -> Parser:
        return verbs.add_parser(
            word, parents=[common, *more], help=help_text, description=help_text, allow_abbrev=False
        )

    held = type(common)(add_help=False)
    held.add_argument("--owner", type=name, help="whose hold it is (default: your user name)")
    held.add_argument(
        "--no-wait",
        action="store_true",
        help="return once it is accepted; `ctl command ID` says how it goes",
    )
    status = verb("status", "what the fleet is and shall be")
    status.add_argument(
        "--wait",
        choices=STATES,
        metavar="STATE",
        help=f"until the whole fleet is {', '.join(STATES[:-1])} or {STATES[-1]}",
    )
    pause = verb("pause", "stop between two steps, and hold", held)
    pause.add_argument(
        "--mode",
        choices=["keep", "wait", "abort"],
        default="keep",
        help="running requests: frozen (keep, the default), first ended (wait), or aborted (abort)",
    )
    pause.add_argument(
        "--allow-unknown", action="store_true", help="succeed also when a member cannot be seen"
    )
    pause.add_argument(
        "--hold-seconds",
        type=positive_seconds,
        metavar="S",
        help="the hold ends by itself after so long (default: never)",
    )
    unpause = verb("unpause", "release your hold; the fleet runs when no hold remains", held)
    unpause.add_argument(
        "--break-hold-of", type=name, metavar="OWNER", help="release somebody else's instead"
    )
    update = verb("update", "change the weights of a paused fleet", held)
    update.add_argument("version", type=name, metavar="VERSION", help="what the new weights are called")
    update.add_argument("weights", metavar="DIRECTORY", help="their checkpoint directory")
    update.add_argument(
        "--kv",
        choices=["recompute", "keep"],
        default="recompute",
        help="KV of frozen requests: computed anew by the new weights (the default), or kept",
    )
    verb("suspend", "a paused fleet gives its memory back; requests are kept", held)
    verb("resume", "a suspended fleet takes its memory again; it is paused then", held)
    ending = type(common)(add_help=False)
    ending.add_argument("--end", action="store_true", help="and then everything else: `interlock serve` ends")
    verb("drain", "let running requests end, then stop", held, ending)
    verb("stop", "end every engine; `start` begins again", held, ending)
    start = verb("start", "start the engines of a stopped fleet again", held)
    start.add_argument(
        "--version", type=name, metavar="VERSION", help="with these weights (default: as before)"
    )
    start.add_argument("--weights", metavar="DIRECTORY", help="their checkpoint directory")
    command = verb("command", "what became of a command, by the id that was shown")
    command.add_argument("id", metavar="ID", type=name)
    command.add_argument("--owner", type=name, help="who gave it (default: whoever did)")
    events = verb("events", "what has happened: states, targets, holds, commands, refusals")
    events.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
    events.add_argument(
        "--since",
        type=since,
        metavar="WHEN",
        help="after an event's number (120), or no older than 90s, 10m, 2h (default: all that are kept)",
    )
    verb("metrics", "the coordinator's metrics, as Prometheus reads them")
    forget = verb("forget", "declare a member gone: you vouch that none of its processes runs any more")
    forget.add_argument("member", metavar="MEMBER", type=name)
