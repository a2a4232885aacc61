"""Where a buffer lies: one address, one size, and what keeps it there."""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.errors import LocalProtocolError
from interlock.host.foreign import address_of


class Memory(msgspec.Struct, frozen=True):
    """Contiguous bytes. They stay as long as `holder` is referred to."""

    address: int
    size_bytes: int
    writable: bool
    holder: Any
    shared: Any = None
    """The SharedMemory they are, whose descriptor may be handed to readers; None where nobody else can map them."""
    device: str = "cpu"


def memory_of(buffer: Any) -> Memory:
    """`buffer`: anything with the buffer protocol (bytes, bytearray, NumPy array), a torch tensor, or shared memory of `host`.

    Raises `LocalProtocolError` for what is not one contiguous run of bytes. A torch tensor must not be resized in place
    while it is registered; its device is kept, and only some lanes reach other devices than "cpu".
    """
    if isinstance(buffer, Memory):
        return buffer
    if hasattr(buffer, "open_read_only"):  # host.SharedMemory
        view = buffer.view
        return Memory(address_of(view), len(view), not view.readonly, (buffer, view), buffer)
    if hasattr(buffer, "data_ptr"):
        return _of_tensor(buffer)
    try:
        view = memoryview(buffer)
    except TypeError as error:
        raise LocalProtocolError(
            f"a {type(buffer).__name__} is no memory: {error}", hint="give a buffer, an array or a tensor"
        ) from error
    if not view.contiguous or view.nbytes == 0:
        raise LocalProtocolError(
            "the buffer is empty or not contiguous", hint="register the array it is a view of"
        )
    flat = view.cast("B")
    return Memory(address_of(flat), flat.nbytes, not flat.readonly, (buffer, flat))


def _of_tensor(tensor: Any) -> Memory:
    if not tensor.is_contiguous() or tensor.numel() == 0:
        raise LocalProtocolError(
            "the tensor is empty or not contiguous", hint="register the tensor it is a view of"
        )
    return Memory(
        int(tensor.data_ptr()),
        int(tensor.numel() * tensor.element_size()),
        writable=True,
        holder=tensor,
        device=str(tensor.device),
    )
