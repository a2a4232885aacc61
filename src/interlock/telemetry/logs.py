"""Log lines: one a record, to standard error, with the process's name, so that a fleet's output can be read as one."""

from __future__ import annotations

import logging
import sys


class OneLine(logging.Formatter):
    """A traceback or a message with line breaks stays one line: what came from outside cannot forge another record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, its line breaks escaped: nobody outside can write a line of ours."""
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def configure_logging(process_name: str, level: str = "INFO") -> None:
    """Once a process, first thing. Raises `ValueError` for an unknown level."""
    handler = logging.StreamHandler(sys.stderr)
    name = process_name.replace("%", "%%")
    handler.setFormatter(OneLine(f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers[:] = [handler]
