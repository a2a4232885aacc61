"""How much memory a tree of processes holds, as the kernel counts it.

PSS (each shared page divided by its users) where the kernel tells it, so that the shared KV cache and libraries are not counted
once a process; RSS of processes that do not let us look.
"""

from __future__ import annotations

import os
from pathlib import Path

from interlock.host.sweep import descendants

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ROLLUP_BYTES_MAX = 1 << 16


def resident_bytes(root: int) -> int:
    """Of `root` and all its descendants now. Blocks for some milliseconds a process: the kernel walks its pages."""
    return sum(_of_process(pid) for pid in {root, *descendants(root)})


def _of_process(pid: int) -> int:
    """0 for one that is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_bytes()[:ROLLUP_BYTES_MAX].splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
