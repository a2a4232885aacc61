"""Torch tensors and NumPy arrays into a snapshot's memory and out of it: bytes as they are, no dtype changed.

`stage` is the only copy that the engine waits for. Of a tensor on a GPU it is begun on a stream of its own into pinned memory
and ends when the file is sealed, in the writer's thread; the caller must not change such a tensor in place on another stream
than its current one, which waits for the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interlock.snapshots.format import SIZES, Raw

if TYPE_CHECKING:
    import torch

_NUMPY = {
    "F64": "<f8", "I64": "<i8", "U64": "<u8", "C64": "<c8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2",
    "I16": "<i2", "U16": "<u2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_FROM_NUMPY = {np.dtype(kind).str: name for name, kind in _NUMPY.items()}


def torch_dtypes() -> dict[str, torch.dtype]:
    """The format's names for torch's dtypes."""
    import torch

    names = {
        "F64": "float64", "I64": "int64", "U64": "uint64", "C64": "complex64", "F32": "float32", "I32": "int32",
        "U32": "uint32", "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8",
        "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    }  # fmt: skip
    return {name: getattr(torch, kind) for name, kind in names.items() if hasattr(torch, kind)}


def describe(value: Any) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of a torch tensor, a NumPy array or a `Raw`. Raises `TypeError` for anything else."""
    if isinstance(value, Raw):
        return value.dtype, value.shape
    if isinstance(value, np.ndarray):
        name = _FROM_NUMPY.get(value.dtype.newbyteorder("<").str)
        if name is None:
            raise TypeError(f"arrays of dtype {value.dtype} cannot be kept in a snapshot")
        return name, value.shape
    kinds = {str(kind): name for name, kind in torch_dtypes().items()}
    name = kinds.get(str(getattr(value, "dtype", "")))
    if name is None:
        raise TypeError(
            f"a {type(value).__name__} of {getattr(value, 'dtype', 'no dtype')} cannot be kept in a snapshot"
        )
    return name, tuple(value.shape)


class Staging:
    """Copies under way into one snapshot's memory. `wait` ends them; nothing may be sealed before."""

    def __init__(self) -> None:
        self._late: list[tuple[Any, torch.Tensor, memoryview]] = []

    def copy(self, value: Any, into: memoryview) -> None:
        """Begins copying `value` to `into`; done on return unless it lies on a device."""
        if isinstance(value, Raw):
            into[:] = value.data
        elif isinstance(value, np.ndarray):
            dtype = _NUMPY[describe(value)[0]]
            np.copyto(np.frombuffer(into, dtype).reshape(value.shape), value, casting="equiv")
        elif len(into):
            self._copy_tensor(value, into)

    def _copy_tensor(self, value: torch.Tensor, into: memoryview) -> None:
        import torch

        value = value.detach()
        if value.device.type == "cpu":
            torch.frombuffer(into, dtype=value.dtype).view(value.shape).copy_(value)
            return
        stream = torch.cuda.Stream(value.device)
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            pinned.copy_(value, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        value.record_stream(stream)
        torch.cuda.current_stream(value.device).wait_event(done)  # what comes next may change it in place
        self._late.append((done, pinned, into))

    def wait(self) -> None:
        late, self._late = self._late, []
        for done, pinned, into in late:
            done.synchronize()
            self._copy_tensor(pinned, into)


def to_torch(tensors: Mapping[str, Raw]) -> dict[str, torch.Tensor]:
    """Tensors of their own memory. Raises `ValueError` for a dtype that this torch has not."""
    import torch

    kinds, made = torch_dtypes(), {}
    for name, raw in tensors.items():
        if raw.dtype not in kinds:
            raise ValueError(f"tensor {name} is {raw.dtype}, which this torch has not")
        flat = torch.empty(0, dtype=kinds[raw.dtype])
        if len(raw.data):
            flat = torch.frombuffer(bytearray(raw.data), dtype=kinds[raw.dtype])
        made[name] = flat.view(raw.shape) if len(raw.data) else flat.reshape(raw.shape)
    return made


def to_numpy(tensors: Mapping[str, Raw]) -> dict[str, np.ndarray]:
    """Arrays of their own memory. Raises `ValueError` for bf16 and fp8, which NumPy has not: read those with torch."""
    for name, raw in tensors.items():
        if raw.dtype not in _NUMPY:
            raise ValueError(f"tensor {name} is {raw.dtype}, which NumPy has not; read it with torch")
    return {
        name: np.frombuffer(bytearray(raw.data), _NUMPY[raw.dtype]).reshape(raw.shape)
        for name, raw in tensors.items()
    }


assert set(_NUMPY) <= set(SIZES)
