"""State files that say whether they are whole: a JSON object whose last field is a checksum of all before it, or bytes of any
kind between the name of that kind and a checksum.

A disk that flips a bit may turn one valid number into another. Who reads such a file must not act on it: `unseal` refuses it,
and its reader says so by name, or goes on as if the file were lost.
"""

from __future__ import annotations

import hashlib
import re

_END = re.compile(rb',"checksum":"([0-9a-f]{32})"}$')


def seal(body: bytes) -> bytes:
    """`body`: a JSON object of at least one field, as msgspec encodes it."""
    if not body.endswith(b"}") or len(body) < 3:
        raise ValueError("only a JSON object with a field can be sealed")
    return body[:-1] + b',"checksum":"' + _checksum(body) + b'"}'


def unseal(data: bytes) -> bytes:
    """The JSON object as it was sealed. Raises ValueError when it is not whole."""
    end = _END.search(data)
    if end is None:
        raise ValueError("it does not end in a checksum")
    body = data[: end.start()] + b"}"
    if _checksum(body) != end[1]:
        raise ValueError("its checksum does not match: the disk changed it")
    return body


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).hexdigest().encode()


_MAGIC = b"interlock "
_SUM_BYTES = 16


def seal_bytes(kind: str, body: bytes) -> bytes:
    """`kind` says whose and which file it is: a reader of another kind refuses it, whole as it may be."""
    head = _MAGIC + kind.encode() + b"\n"
    return head + body + hashlib.blake2b(head + body, digest_size=_SUM_BYTES).digest()


def unseal_bytes(kind: str, data: bytes) -> bytes:
    """The body as it was sealed. Raises ValueError when it is not whole, or of another kind."""
    head = _MAGIC + kind.encode() + b"\n"
    if len(data) < len(_MAGIC) + _SUM_BYTES + 1 or not data.startswith(_MAGIC):
        raise ValueError("it is no state file of ours, or its beginning is lost")
    whole, end = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
    if hashlib.blake2b(whole, digest_size=_SUM_BYTES).digest() != end:
        raise ValueError("its checksum does not match: it was cut short, or the disk changed it")
    if not whole.startswith(head):
        found = whole[len(_MAGIC) :].split(b"\n", 1)[0][:80].decode(errors="replace")
        raise ValueError(f"it is a file of kind {found!r}, not {kind!r}")
    return whole[len(head) :]
