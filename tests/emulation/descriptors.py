"""Descriptors of matrices for the tensor memory accelerator, in an encoding of the emulation."""

from __future__ import annotations

import struct
from typing import Final

from infc.runtime.executors.gpu.driver import MatrixMap

from .errors import EmulationError

_MAGIC: Final = b"infcmap1"
_FORM: Final = "<8s16sqqq5q5q"
BYTES: Final = 128

ELEMENT_BYTES: Final = {
    "i8": 1, "u8": 1, "f8e4m3": 1, "f8e5m2": 1, "fp8": 1, "e4m3": 1, "e5m2": 1,
    "bf16": 2, "f16": 2, "i16": 2, "f32": 4, "i32": 4, "u32": 4, "i64": 8,
}  # fmt: skip


def encode(matrix: MatrixMap) -> bytes:
    """128 bytes; EmulationError where a device's driver would refuse."""
    size = ELEMENT_BYTES.get(matrix.dtype)
    if size is None:
        raise EmulationError(f"a descriptor of elements of type {matrix.dtype!r}")
    rank = len(matrix.shape)
    inner = matrix.box[-1] * size if matrix.box else 0
    problems = {
        f"{rank} dimensions": not 1 <= rank <= 5 or len(matrix.box) != rank,
        f"the address {matrix.address:#x}": matrix.address % 16 != 0,
        f"rows of {matrix.shape[-1] * size} bytes": rank > 1 and matrix.shape[-1] * size % 16 != 0,
        f"a box {matrix.box}": any(not 1 <= one <= 256 for one in matrix.box) or inner % 16 != 0,
        f"a swizzle of {matrix.swizzle_bytes} bytes": matrix.swizzle_bytes not in (0, 32, 64, 128),
        f"{inner} bytes side by side in a swizzle of {matrix.swizzle_bytes}": (
            matrix.swizzle_bytes > 0 and inner > matrix.swizzle_bytes
        ),
        f"a shape {matrix.shape}": any(one < 1 for one in matrix.shape),
    }
    for what, wrong in problems.items():
        if wrong:
            raise EmulationError(f"a descriptor with {what}")
    shape = (*matrix.shape, *[0] * (5 - rank))
    box = (*matrix.box, *[0] * (5 - rank))
    kind = matrix.dtype.encode().ljust(16)
    data = (rank, matrix.address, matrix.swizzle_bytes, *shape, *box)
    return struct.pack(_FORM, _MAGIC, kind, *data).ljust(BYTES, b"\0")


def decode(data: bytes) -> MatrixMap:
    """The inverse of `encode`."""
    magic, kind, rank, address, swizzle, *sizes = struct.unpack_from(_FORM, data)
    if magic != _MAGIC:
        raise EmulationError("a parameter that is no descriptor")
    return MatrixMap(
        address, kind.decode().strip(), tuple(sizes[:rank]), tuple(sizes[5 : 5 + rank]), swizzle
    )
