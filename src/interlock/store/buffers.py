"""The bytes of arrays, without a copy where there need be none: buffer protocol, torch, DLPack.

torch is never imported here: who has a tensor has imported it. Only memory that the CPU reads is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from interlock.core.errors import LocalProtocolError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Array = Any
"""Bytes-like, a NumPy array, a torch tensor on the CPU, or anything with `__dlpack__`."""
Parts = list[Bytes] | Bytes
"""One block's bytes by index: memory of their own each, or the rows of one array."""


def bytes_of(array: Array, *, writable: bool = False) -> Bytes:
    """A flat view of the array's bytes. Raises `LocalProtocolError` for what is no CPU memory, or cannot be written.

    To be read, an array that is not contiguous is copied (its checksum needs its bytes in order); to be written it is refused.
    """
    flat = _flat(array, writable)
    if writable and not flat.flags.writeable:
        raise LocalProtocolError(f"a {type(array).__name__} that is read-only cannot take blocks")
    return flat


def split(arrays: Array | Sequence[Array], count: int, block_bytes: int, *, writable: bool = False) -> Parts:
    """One block's bytes by index: a list of views of a sequence of arrays, or `[count, block_bytes]` of one array.

    Raises `LocalProtocolError` when their number or a size is another.
    """
    if isinstance(arrays, list | tuple):
        parts = [bytes_of(array, writable=writable) for array in arrays]
    else:
        whole = bytes_of(arrays, writable=writable)
        if len(whole) != count * block_bytes:
            raise LocalProtocolError(
                f"{count} blocks take {count * block_bytes} bytes, this array has {len(whole)}"
            )
        return whole.reshape(count, block_bytes)
    if len(parts) != count:
        raise LocalProtocolError(f"{count} keys and {len(parts)} arrays do not go together")
    for index, part in enumerate(parts):
        if len(part) != block_bytes:
            raise LocalProtocolError(
                f"array {index} has {len(part)} bytes, and a block of this layout has {block_bytes}"
            )
    return parts


def _flat(array: Array, writable: bool) -> Bytes:
    if isinstance(array, np.ndarray):
        return _of_numpy(array, writable)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_tensor(torch, array, writable)
    try:
        view = memoryview(array)
    except TypeError:
        pass
    else:
        if writable and not view.c_contiguous:
            raise LocalProtocolError("only contiguous memory can take a block")
        return np.frombuffer(view if view.c_contiguous else view.tobytes(), dtype=np.uint8)
    if hasattr(array, "__dlpack__"):
        try:
            return _of_numpy(np.from_dlpack(array), writable)
        except (BufferError, RuntimeError, TypeError) as error:
            raise LocalProtocolError(f"a {type(array).__name__} is no CPU memory: {error}") from error
    raise LocalProtocolError(f"a {type(array).__name__} holds no bytes that can be stored")


def _of_numpy(array: np.ndarray[Any, Any], writable: bool) -> Bytes:
    if array.dtype.hasobject:
        raise LocalProtocolError("an array of Python objects holds no bytes that can be stored")
    if not array.flags.c_contiguous:
        if writable:
            raise LocalProtocolError("only contiguous memory can take a block")
        array = np.ascontiguousarray(array)
    return array.reshape(-1).view(np.uint8)


def _of_tensor(torch: Any, tensor: Any, writable: bool) -> Bytes:
    if tensor.device.type != "cpu":
        raise LocalProtocolError(
            f"a tensor on {tensor.device} is no CPU memory", hint="move it to the CPU, pinned if you can"
        )
    if not tensor.is_contiguous():
        if writable:
            raise LocalProtocolError("only contiguous memory can take a block")
        tensor = tensor.contiguous()
    # Through uint8: NumPy has no bfloat16 and no float8.
    flat: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat
