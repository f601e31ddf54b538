"""Between our element types and torch's, imported only where torch is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ProgramError
from .types import DType

if TYPE_CHECKING:
    import torch

_NAMES = {
    DType.F64: "float64",
    DType.F32: "float32",
    DType.BF16: "bfloat16",
    DType.F16: "float16",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I8: "int8",
    DType.U8: "uint8",
    DType.BOOL: "bool",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def to_torch(dtype: DType | str) -> torch.dtype:
    """The torch dtype of an element type, given as such or by its spelling in IR text."""
    import torch

    result = getattr(torch, _NAMES[DType(dtype)])
    assert isinstance(result, torch.dtype)
    return result


def from_torch(dtype: torch.dtype) -> DType:
    """The element type of a torch dtype; ProgramError where the IR has none."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ProgramError(f"the IR has no element type for {dtype}")
    return _DTYPES[name]
