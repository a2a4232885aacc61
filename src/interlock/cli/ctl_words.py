"""The words of `interlock ctl`: its verbs and what each can be asked with. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

from interlock.cli.arguments import Options, Parser, add_options, long_seconds, name, port, seconds

PORT_DEFAULT = 8000
STATES = ("RUNNING", "PAUSED", "SUSPENDED", "STOPPED")
AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
AGE_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LONG_SECONDS = 600.0
"""A vLLM engine on CPU that starts anew takes about a minute, on a busy machine several; and requests end when they end."""


class Verb(NamedTuple):
    """One verb: what it does in a line, and its options beside those that every verb has."""

    words: str
    options: Options = {}
    seconds: float = 60.0
    """To wait for it where nothing else is said."""


def since(text: str) -> float | int:
    """An event's number as int, or an age in seconds as float."""
    if text.isdecimal():
        return int(text)
    found = AGE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an event's number nor an age as 90s, 10m, 2h")
    return float(found[1]) * AGE_SECONDS[found[2]]


COMMON: Options = {
    "--port": {
        "type": port,
        "default": PORT_DEFAULT,
        "help": f"HTTP port of the fleet (default {PORT_DEFAULT})",
    },
    "--json": {"action": "store_true", "default": False, "help": "answer as JSON, one object a line"},
    "--timeout": {
        "type": seconds,
        "metavar": "S",
        "help": "seconds to wait (default 60; 600 for update, resume, drain and start)",
    },
}
"""They may stand before the verb or after it; the last one said counts."""
HELD: Options = {
    "--owner": {"type": name, "help": "whose hold it is (default: your user name)"},
    "--no-wait": {
        "action": "store_true",
        "help": "return once it is accepted; `ctl command ID` says how it goes",
    },
}
END: Options = {
    "--end": {"action": "store_true", "help": "and then everything else: `interlock serve` ends"},
}
STATUS: Options = {
    "--wait": {
        "type": str.upper,
        "choices": STATES,
        "metavar": "STATE",
        "help": f"until the whole fleet is {', '.join(STATES[:-1])} or {STATES[-1]}",
    },
}
PAUSE: Options = {
    "--mode": {
        "choices": ["keep", "wait", "abort"],
        "default": "keep",
        "help": "running requests: frozen (keep, the default), first ended (wait), or aborted (abort)",
    },
    "--allow-unknown": {"action": "store_true", "help": "succeed also when a member cannot be seen"},
    "--hold-seconds": {
        "type": long_seconds,
        "metavar": "S",
        "help": "the hold ends by itself after so long (default: never)",
    },
}
UNPAUSE: Options = {
    "--break-hold-of": {"type": name, "metavar": "OWNER", "help": "release somebody else's instead"},
}
UPDATE: Options = {
    "version": {"type": name, "metavar": "VERSION", "help": "what the new weights are called"},
    "weights": {"metavar": "DIRECTORY", "help": "their checkpoint directory"},
    "--kv": {
        "choices": ["recompute", "keep"],
        "default": "recompute",
        "help": "KV of frozen requests: computed anew by the new weights (the default), or kept",
    },
}
START: Options = {
    "--version": {"type": name, "metavar": "VERSION", "help": "with these weights (default: as before)"},
    "--weights": {"metavar": "DIRECTORY", "help": "their checkpoint directory"},
}
COMMAND: Options = {
    "id": {"metavar": "ID", "type": name},
    "--owner": {"type": name, "help": "who gave it (default: whoever did)"},
}
EVENTS: Options = {
    "--follow": {"action": "store_true", "help": "go on until Ctrl-C"},
    "--since": {
        "type": since,
        "metavar": "WHEN",
        "help": "after an event's number (120), or no older than 90s, 10m, 2h (default: all that are kept)",
    },
}
FORGET: Options = {"member": {"metavar": "MEMBER", "type": name}}

COMMANDS = {
    "pause": Verb("stop between two steps, and hold", PAUSE),
    "unpause": Verb("release your hold; the fleet runs when no hold remains", UNPAUSE),
    "update": Verb("change the weights of a paused fleet", UPDATE, LONG_SECONDS),
    "suspend": Verb("a paused fleet gives its memory back; requests are kept"),
    "resume": Verb("a suspended fleet takes its memory again; it is paused then", seconds=LONG_SECONDS),
    "drain": Verb("let running requests end, then stop", END, LONG_SECONDS),
    "stop": Verb("end every engine; `start` begins again", END),
    "start": Verb("start the engines of a stopped fleet again", START, LONG_SECONDS),
}
"""What changes a fleet: each has an owner, and can be sent without waiting (HELD)."""
QUESTIONS = {
    "command": Verb("what became of a command, by the id that was shown", COMMAND),
    "events": Verb("what has happened: states, targets, holds, commands, refusals", EVENTS),
    "metrics": Verb("the coordinator's metrics, as Prometheus reads them"),
    "forget": Verb("declare a member gone: you vouch that none of its processes runs any more", FORGET),
}
VERBS = {
    "status": Verb("what the fleet is and shall be", STATUS),
    **{word: verb._replace(options={**HELD, **verb.options}) for word, verb in COMMANDS.items()},
    **QUESTIONS,
}


def add_verbs(ctl: Parser) -> None:
    """One parser a verb, in the table's order. What was said before the verb stands, unless it is said again after it."""
    add_options(ctl, COMMON)
    again = {flag: {**how, "default": argparse.SUPPRESS} for flag, how in COMMON.items()}
    verbs = ctl.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for word, verb in VERBS.items():
        parser = verbs.add_parser(word, help=verb.words, description=verb.words)
        add_options(parser, {**again, **verb.options})


def timeout_of(parsed: argparse.Namespace) -> float:
    """Seconds to wait: what was said, else the verb's own."""
    return float(parsed.timeout or VERBS[parsed.verb].seconds)
