"""A small state that changes often: two slots in one file, overwritten in turn, each kept twice.

    | slot 0 | slot 1 | slot 0 again | slot 1 again |

What can go wrong. A file that is replaced (`state_file`) costs two syncs that each wait for the file system's journal: some ten
milliseconds on a disk that others use, and a fleet that is paused waits for them. A file that is overwritten instead costs one, and
no journal, for no block and no length changes; but a crash tears it, and a flipped bit must not be mistaken for a tear: a reader who
then took the older state would act on what was overruled.

Why it cannot here. A save overwrites the slot that does not hold the last state that is durable, so a tear leaves that one whole. The
highest number among whole copies counts, and each slot stands twice: what was saved is lost only where both of its copies are. A
number is never used twice. The first save of each life replaces the whole file, so that nothing of which an earlier life did not
know whether it was synced lies beside what this one overwrites.
"""

from __future__ import annotations

from pathlib import Path

from interlock.host.base import Files
from interlock.host.sealed import seal_bytes, unseal_bytes

PAGE_BYTES = 4096
SLOT_BYTES_MIN = 16 * PAGE_BYTES
"""A file is made with slots at least so long, and twice as long as what stands in them: then it is seldom made anew."""
SLOTS, COPIES = 2, 2
_LENGTH_BYTES = 4
_NUMBER_BYTES = 8


class SlotFile:
    """One life's hand on the file at `path`. All calls block for as long as the disk does. One writer at a time."""

    def __init__(self, files: Files, path: Path, kind: str, bytes_max: int) -> None:
        """`kind` as in `seal_bytes`; `bytes_max` bounds a body."""
        self._files, self.path = files, path
        self._kind, self._bytes_max = kind, bytes_max
        self._number = 0
        """Of the last save that was begun, in this life or before it."""
        self._slot_bytes = 0
        """0: the file is not of this life yet."""
        self._durable = 0
        """The slot that is not to be touched."""

    def load(self) -> bytes | None:
        """The last body that was saved; None where there is no file. To be called before the first `save`.

        Raises `ValueError` where no copy is whole, and `OSError` for a disk that fails: it has lost nothing yet.
        """
        longest = 2 * len(self._packed(b"")) + 2 * self._bytes_max
        data = self._files.read(self.path, SLOTS * COPIES * _room_for(longest))
        if data is None:
            return None
        size, rest = divmod(len(data), SLOTS * COPIES)
        if not size or rest:
            raise ValueError(f"{self.path} cannot be used: {len(data)} bytes are no {SLOTS * COPIES} slots")
        whole, why = [], ""
        for at in range(0, len(data), size):
            try:
                whole.append(self._unpacked(data[at : at + size]))
            except ValueError as error:
                why = why or str(error)
        if not whole:
            raise ValueError(f"{self.path} cannot be used: none of its copies is whole: {why}")
        self._number, body = max(whole)
        return body

    def save(self, body: bytes) -> None:
        """Durable when it returns. Raises `OSError`: then what was saved before still stands, or this does."""
        if len(body) > self._bytes_max:
            raise OSError(
                f"{self.path} would keep {len(body)} bytes, and {self._bytes_max} are read back at most"
            )
        self._number += 1
        record = self._packed(body)
        if len(record) > self._slot_bytes:
            self._begin(record)
            return
        slot = 1 - self._durable
        places = [(slot + SLOTS * copy) * self._slot_bytes for copy in range(COPIES)]
        try:
            self._files.write_in_place(self.path, [(place, record) for place in places])
        except FileNotFoundError:  # somebody took it away: else no save would succeed any more
            self._begin(record)
        else:
            self._durable = slot

    def _begin(self, record: bytes) -> None:
        """A new file, written in full: its blocks are there, and none is allotted later."""
        self._slot_bytes = 0
        size = _room_for(2 * len(record))
        slots = [record.ljust(size, b"\0"), bytes(size)] * COPIES
        self._files.write_durably(self.path, b"".join(slots))
        self._slot_bytes, self._durable = size, 0

    def _packed(self, body: bytes) -> bytes:
        sealed = seal_bytes(self._kind, self._number.to_bytes(_NUMBER_BYTES, "big") + body)
        return len(sealed).to_bytes(_LENGTH_BYTES, "big") + sealed

    def _unpacked(self, slot: bytes) -> tuple[int, bytes]:
        """(number, body). Raises `ValueError` for a slot that is empty, torn or changed."""
        length = int.from_bytes(slot[:_LENGTH_BYTES], "big")
        if not 0 < length <= len(slot) - _LENGTH_BYTES:
            raise ValueError("it is empty, or its length is lost")
        body = unseal_bytes(self._kind, slot[_LENGTH_BYTES : _LENGTH_BYTES + length])
        if len(body) < _NUMBER_BYTES:
            raise ValueError("it has no number")
        return int.from_bytes(body[:_NUMBER_BYTES], "big"), body[_NUMBER_BYTES:]


def _room_for(record_bytes: int) -> int:
    """A slot's length for a record so long: whole pages, a power of two."""
    size = SLOT_BYTES_MIN
    while size < record_bytes:
        size *= 2
    return size
