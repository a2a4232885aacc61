"""What the commands' arguments are made of: a parser whose errors are one sentence, tables of options, and checked values.

A check raises `argparse.ArgumentTypeError` with a sentence; the parser adds which option it was and where help is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interlock.cli.errors import Usage

Options = Mapping[str, Mapping[str, Any]]
"""An option's flag, or a positional's name, to what `argparse` is told of it."""
COUNT_MAX = 1024
SECONDS_MAX = 3600.0
GIB_MAX = 16384.0
NAME_CHARS_MAX = 128


class Parser(argparse.ArgumentParser):
    """Wrong usage is one sentence and a pointer, not a page; an option is written out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises `Usage`, where argparse would print and exit."""
        raise Usage(f"{message}; see {self.prog} --help")


def add_options(parser: argparse._ActionsContainer, options: Options) -> None:
    """Adds a table of options to a parser, or to a group of one."""
    for flag, how in options.items():
        parser.add_argument(flag, **how)


def positive(text: str) -> int:
    """A number of things, 1 to 1024."""
    value = int(text) if text.isdecimal() else 0
    if not 0 < value <= COUNT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {COUNT_MAX}")
    return value


def count(text: str) -> int:
    """A number above 0 of things that nobody holds in memory at once."""
    value = int(text) if text.isdecimal() else 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def port(text: str) -> int:
    """A TCP port, 1 to 65535."""
    value = int(text) if text.isdecimal() else 0
    if not 0 < value < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return value


def seconds(text: str) -> float:
    """How long a caller waits: above 0, at most an hour."""
    value = _number(text)
    if not 0.0 < value <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0, at most {SECONDS_MAX:g}"
        )
    return value


def long_seconds(text: str) -> float:
    """A time that may be longer than anybody waits: above 0, and finite."""
    value = _number(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def gibibytes(text: str) -> float:
    """A size in GiB above 0, at most 16384."""
    value = _number(text)
    if not 0.0 < value <= GIB_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB above 0, at most {GIB_MAX:g}")
    return value


def mebibytes(text: str) -> int:
    """A size in whole MiB, 1 to 16384 GiB."""
    value = int(text) if text.isdecimal() else 0
    if not 0 < value <= GIB_MAX * 1024:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of MiB above 0, at most {GIB_MAX * 1024:g}"
        )
    return value


def gibibytes_or_none(text: str) -> float:
    """As `gibibytes`; 0 is allowed and means: none of it."""
    return 0.0 if text in ("0", "0.0") else gibibytes(text)


def folder(text: str) -> Path:
    """A directory that is there or can be made; `~` is the home of whoever asks."""
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no directory; name one, or one to be made")
    return path


def name(text: str) -> str:
    """A word of an operator: 1 to 128 printable characters."""
    if not 0 < len(text) <= NAME_CHARS_MAX or not text.isprintable():
        raise argparse.ArgumentTypeError(f"a name has 1 to {NAME_CHARS_MAX} printable characters")
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
