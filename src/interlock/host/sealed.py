"""State files that say whether they are whole: a JSON object whose last field is a checksum of all before it.

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
