"""One state file that is whole or set aside: sealed, synced, bounded, and never guessed at.

*Emptying* writes an empty body over it instead of removing it: a removal that is not synced may be undone by a power cut, and
what comes back would then be taken for the present.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from interlock.host.base import Files
from interlock.host.sealed import seal_bytes, unseal_bytes


class StateFile:
    """All calls block for as long as the disk does: make them in a thread where that matters."""

    def __init__(self, files: Files, path: Path, kind: str, bytes_max: int) -> None:
        self._files, self.path = files, path
        self._kind, self._bytes_max = kind, bytes_max

    def save(self, body: bytes) -> None:
        """Durable when it returns. Raises `OSError`, naming the file; then the one before it is still whole."""
        data = seal_bytes(self._kind, body)
        if len(data) > self._bytes_max:
            raise OSError(
                f"{self.path} would have {len(data)} bytes, and {self._bytes_max} are read back at most"
            )
        try:
            self._files.write_durably(self.path, data)
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror or error}") from error

    def empty(self) -> None:
        """Nothing is kept any more, also after a power cut. Raises `OSError`: then it may be kept still."""
        try:
            self.save(b"")
        except OSError:  # a full disk: room first, and the file that makes it is the one nobody needs
            with contextlib.suppress(OSError):
                self._files.remove(self.path)
            self.save(b"")

    def load(self) -> bytes | None:
        """The body; None where there is none, or an empty one.

        Raises `ValueError` for one that is not whole, is too long or of another kind (`set_aside` is next), and `OSError` for
        a disk that fails: it has lost nothing yet, and nothing must be written over it.
        """
        data = self._files.read(self.path, self._bytes_max)
        if data is None:
            return None
        try:
            return unseal_bytes(self._kind, data) or None
        except ValueError as error:
            raise ValueError(f"{self.path} cannot be used: {error}") from error

    def set_aside(self) -> Path:
        """Out of the way, for a person to look at. Raises `OSError`."""
        return self._files.set_aside(self.path)
