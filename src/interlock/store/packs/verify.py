"""Every byte of a directory of packs against the checksums of those who wrote it: `interlock store verify-disk`.

Reads only, also while a node has the directory: what that one evicts or removes meanwhile is nobody's fault.
"""

from __future__ import annotations

import msgspec

from interlock.core import limits
from interlock.host.base import Directory
from interlock.store.packs.files import PackFiles
from interlock.store.packs.format import BadPackError, PackBlock, Toc
from interlock.store.packs.staging import Staging


class Finding(msgspec.Struct, frozen=True):
    """Something that is not what was written. `key` is a block's, in hex; without one it is the whole pack."""

    pack: int
    reason: str
    key: str = ""


class Verification(msgspec.Struct):
    """What was read and what was found."""

    packs: int = 0
    blocks: int = 0
    bytes: int = 0
    findings: list[Finding] = []


def verify_packs(directory: Directory) -> Verification:
    """Reads all packs of `directory`, one after the other. Raises `OSError` when it cannot be listed."""
    result = Verification(findings=[])
    staging = Staging(4 * limits.DISK_PACK_BYTES)
    files = PackFiles(directory, 0, staging)
    for pack in files.packs():
        try:
            toc, gone = files.toc(pack.number)
            result.packs += 1
            blocks = [block for block in toc.blocks if block.ordinal not in gone]
            each = max(1, limits.DISK_READ_BYTES // toc.stride)
            for start in range(0, len(blocks), each):
                _verify(files, staging, toc, blocks[start : start + each], result)
        except BadPackError as error:
            result.findings.append(Finding(pack.number, str(error)))
        except FileNotFoundError:
            continue
        except (OSError, EOFError) as error:
            result.findings.append(Finding(pack.number, f"it cannot be read: {error}"))
    return result


def _verify(
    files: PackFiles, staging: Staging, toc: Toc, blocks: list[PackBlock], result: Verification
) -> None:
    with staging.take(toc.stride * len(blocks)) as memory:
        good = files.read(toc, blocks, memory)
    result.blocks += len(blocks)
    result.bytes += toc.layout.block_bytes * len(blocks)
    if not all(good):
        _, gone = files.toc(toc.number)  # evicted while it was read?
        result.findings += [
            Finding(toc.number, "its bytes are not what was saved", block.key.hex())
            for block, ok in zip(blocks, good, strict=True)
            if not ok and block.ordinal not in gone
        ]
