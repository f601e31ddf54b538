"""Element types of the program in ONNX, and constants in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from onnx import TensorProto

from ...ir.types import DType

STORED: Final[Mapping[DType, int]] = {
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
    DType.I64: TensorProto.INT64,
    DType.I32: TensorProto.INT32,
    DType.I8: TensorProto.INT8,
    DType.U8: TensorProto.UINT8,
    DType.BOOL: TensorProto.BOOL,
}
"""The types of tensors that are stored: weights, and keys and values."""

NUMPY: Final[Mapping[DType, Any]] = {
    DType.F32: np.float32,
    DType.I64: np.int64,
    DType.I32: np.int32,
    DType.I8: np.int8,
    DType.U8: np.uint8,
    DType.BOOL: np.bool_,
}


def is_narrow(dtype: DType) -> bool:
    """Whether it is a type of 16 bits, which onnxruntime has few kernels for on a CPU."""
    return dtype in (DType.F16, DType.BF16)


def computed(dtype: DType) -> DType:
    """The type in which a value of the program is computed and held: 16 bits are widened."""
    return DType.F32 if is_narrow(dtype) else dtype
